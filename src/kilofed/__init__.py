"""kilofed: federated fine-tuning of language models, for people whose data may not move.

    import kilofed

    run = kilofed.run("tiny", {"rounds": 3})
    print(run.rows["federated"]["loss"], run.folder)

A name is imported when it is first used, so that `import kilofed` takes no time.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kilofed.errors import KilofedError
    from kilofed.ledger import Ledger
    from kilofed.method import Client, Cohort, Engine, Method, Server, on_client
    from kilofed.payload import Payload
    from kilofed.privacy import Mechanism
    from kilofed.recipe import Recipe, load
    from kilofed.run import Run, resume, run

__all__ = [
    "Client",
    "Cohort",
    "Engine",
    "KilofedError",
    "Ledger",
    "Mechanism",
    "Method",
    "Payload",
    "Recipe",
    "Run",
    "Server",
    "load",
    "on_client",
    "resume",
    "run",
]

_HOMES = {
    "errors": ("KilofedError",),
    "ledger": ("Ledger",),
    "method": ("Client", "Cohort", "Engine", "Method", "Server", "on_client"),
    "payload": ("Payload",),
    "privacy": ("Mechanism",),
    "recipe": ("Recipe", "load"),
    "run": ("Run", "resume", "run"),
}


def __getattr__(name: str) -> object:
    for home, names in _HOMES.items():
        if name in names:
            found = vars(importlib.import_module(f"kilofed.{home}"))[name]
            globals()[name] = found
            return found
    raise AttributeError(f"module 'kilofed' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """Keeps `kilofed.run` the function, although importing the file run.py would put the module there."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name == "run" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
