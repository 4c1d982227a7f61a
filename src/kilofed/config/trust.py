"""Whose code a recipe may run: what is imported already, and what the user trusts.

A recipe is data, but a method with a dotted name, such as my_package.my_method, is code that runs with all rights of its
user. So it runs only where this process has imported it by its own will, where the environment variable KILOFED_TRUST
names it, or where the user says so when asked.
"""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.machinery import ModuleSpec, PathFinder

from kilofed.errors import RecipeError

VARIABLE = "KILOFED_TRUST"
"""Names of modules, with commas between them; processes that this one starts inherit it."""
OWN = "kilofed"

Answer = Callable[[str, str], bool]
"""Told a module and its file; whether its code may run."""


def _never(name: str, place: str) -> bool:
    return False


_answer: Answer = _never


def ask(answer: Answer) -> None:
    """Let `answer` decide on code that nobody has trusted yet, in this process; by default it is refused."""
    global _answer
    _answer = answer


def trust(name: str) -> None:
    """Let the module `name` run in this process and in those that it starts."""
    os.environ[VARIABLE] = ",".join(sorted({*trusted(), name}))


def trusted() -> set[str]:
    """Modules that the environment trusts."""
    return {name.strip() for name in os.environ.get(VARIABLE, "").split(",")} - {""}


def allow(name: str) -> None:
    """Make sure that the module `name` may be imported; where it is trusted, from the current folder as well.

    The current folder comes after all that is installed, so that nothing in it takes the place of a library.

    Raises:
        RecipeError: it does not exist, or nobody has trusted it; its code has not run then.
    """
    if name in sys.modules or name.partition(".")[0] == OWN:
        return
    if name not in trusted():
        place = find(name)
        if place is None:
            raise RecipeError(
                f"method {name!r} does not exist: no such module is installed, on PYTHONPATH or in the current folder; "
                "check the name"
            )
        if not _answer(name, place):
            raise RecipeError(
                f"method {name!r} would run the code of {place}; expected a method of kilofed or code that you trust: read "
                f"it, then add --trust to the command, or set {VARIABLE}={name}, or import it before kilofed runs"
            )
        trust(name)
    with suppress(OSError):  # The current folder was removed.
        if (here := os.getcwd()) not in sys.path:
            sys.path.append(here)


def find(name: str) -> str | None:
    """The file of the module `name`, found without running any code; None where there is none."""
    with suppress(OSError):
        spec, folders = None, [*sys.path, os.getcwd()]
        for part in name.split("."):
            # One part at a time: looking for a whole dotted name would import its packages.
            spec = PathFinder.find_spec(part, folders) or (_hooked(part) if spec is None else None)
            if spec is None:
                return None
            folders = list(spec.submodule_search_locations or ())
        assert spec is not None
        return spec.origin or ", ".join(folders)
    return None


def _hooked(name: str) -> ModuleSpec | None:
    """What the finders of installed projects know; a project that is installed for editing is known to its own."""
    for finder in sys.meta_path:
        if (find_spec := getattr(finder, "find_spec", None)) and (spec := find_spec(name, None, None)):
            return spec  # type: ignore[no-any-return]
    return None
