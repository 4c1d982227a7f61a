"""kilofed: federated fine-tuning of language models, for people whose data may not move.

    import kilofed

    run = kilofed.run("tiny", {"rounds": 3})
    print(run.rows["federated"].loss, run.folder)

A name is imported when it is first used, so that `import kilofed` takes no time.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kilofed.config.recipe import Recipe
    from kilofed.config.tables import load
    from kilofed.errors import KilofedError
    from kilofed.federation.cohort import Cohort, Engine
    from kilofed.federation.ledger import Ledger
    from kilofed.federation.method import Method, on_client
    from kilofed.federation.parties import Client, Server
    from kilofed.payload import Payload
    from kilofed.privacy.mechanisms import Mechanism
    from kilofed.runs.loop import Run, resume, run

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
    "config.recipe": ("Recipe",),
    "config.tables": ("load",),
    "errors": ("KilofedError",),
    "federation.cohort": ("Cohort", "Engine"),
    "federation.ledger": ("Ledger",),
    "federation.method": ("Method", "on_client"),
    "federation.parties": ("Client", "Server"),
    "payload": ("Payload",),
    "privacy.mechanisms": ("Mechanism",),
    "runs.loop": ("Run", "resume", "run"),
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
