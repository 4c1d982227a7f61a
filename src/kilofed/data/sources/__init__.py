"""Data sets that need no download: one file per source, found by its name.

A source is a module here with `load(*, seed, ...) -> Rows`; its keyword arguments are its options.
"""

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Collection
from typing import NamedTuple

__all__ = ["Rows", "load", "names"]


class Rows(NamedTuple):
    """Training and held-out rows of text columns, and a sentence on what was chosen."""

    train: list[dict[str, str]]
    test: list[dict[str, str]]
    note: str


def names() -> list[str]:
    """Names of the sources."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def load(name: str, *, seed: int, **options: object) -> Rows:
    """Load the source of that name.

    Args:
        name: a module of this package, such as `pydocs`.
        seed: decides every choice the source makes.
        options: the source's own keyword arguments.

    Raises:
        ValueError: there is no such source, or it has no such option.
    """
    if name not in names():
        raise ValueError(f"{name} is not a source{_nearest(name, names())}; sources: {', '.join(names())}")
    loader: Callable[..., Rows] = importlib.import_module(f"{__name__}.{name}").load
    known = [option for option in inspect.signature(loader).parameters if option != "seed"]
    for option in options:
        if option not in known:
            raise ValueError(
                f"{option} is not an option of {name}{_nearest(option, known)}; options: {', '.join(known)}"
            )
    return loader(seed=seed, **options)


def _nearest(word: str, known: Collection[str]) -> str:
    found = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {found[0]}?)" if found else ""
