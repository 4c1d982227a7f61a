"""A handler named by an import path and strings, for processes that must build their own; their start, and their errors."""

import importlib
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

import torch

from kilofed import errors
from kilofed.engines.inprocess import Handler
from kilofed.errors import KilofedError, RecipeError

_KINDS = {kind.__name__: kind for kind in vars(errors).values() if isinstance(kind, type)}


@dataclass(frozen=True)
class Opener:
    """Says how a process builds its handler; only text travels to it."""

    path: str
    """`module:function`; the function takes `arguments` and returns the handler."""
    arguments: tuple[str, ...] = ()
    threads: int = 0
    """Threads that torch may use there; 0 leaves torch's own choice."""

    def open(self) -> Handler:
        """Build the handler in this process.

        Raises:
            RecipeError: `path` names no function. Whatever the function raises.
        """
        if self.threads:
            torch.set_num_threads(self.threads)
        module, _, name = self.path.partition(":")
        function: Callable[..., Handler] | None = vars(importlib.import_module(module)).get(name)
        if not callable(function):
            raise RecipeError(f"{self.path!r} names no function; expected module:function")
        return function(*self.arguments)


@contextmanager
def safe_path() -> Iterator[None]:
    """Processes started within do not look for modules in the current folder before they have their parent's path."""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


def as_text(error: Exception) -> str:
    """`error` for another process: its kind and sentence if kilofed raised it on purpose, else its traceback."""
    if isinstance(error, KilofedError):
        return f"{type(error).__name__}:{error}"
    return ":" + "".join(traceback.format_exception(error))


def raise_again(text: str, where: str) -> NoReturn:
    """Raise what `as_text` wrote: the same KilofedError, or a RuntimeError that says `where` and has the traceback."""
    kind, _, words = text.partition(":")
    if kind in _KINDS:
        raise _KINDS[kind](words)
    raise RuntimeError(f"{where} failed:\n{words}")
