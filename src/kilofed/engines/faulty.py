"""Any engine with faults on a seeded plan: what a method and a run make of them can be tested, and rehearsed by users.

engine = Faulty(engine, Faults(drop=0.1, truncate=0.05), seed=1)
"""

import dataclasses
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from kilofed.errors import RecipeError
from kilofed.federation.cohort import Engine


@dataclass(frozen=True)
class Faults:
    """Shares of replies, from 0 to 1 and at most 1 in all, that meet each fault."""

    drop: float = 0.0
    """The reply never comes."""
    delay: float = 0.0
    """The reply comes `seconds` late."""
    duplicate: float = 0.0
    """The client gets its message twice and works twice; its second reply counts."""
    truncate: float = 0.0
    """The reply ends anywhere."""
    corrupt: float = 0.0
    """Random bytes stand in the reply's header. Damage to the numbers alone is for the transport to find."""
    kill: float = 0.0
    """The exchange breaks off with a ConnectionResetError, the client's work done."""
    seconds: float = 0.05
    """Length of a delay."""


class Faulty:
    """`engine` with `faults`; the plan depends on seed, exchange and client alone, not on who answers first.

    Raises:
        RecipeError: the shares are below 0 or above 1 in all.
    """

    def __init__(self, engine: Engine, faults: Faults, seed: int = 0) -> None:
        self._engine, self._faults, self._seed = engine, faults, seed
        self._num_exchanges = 0
        self._shares = {name: share for name, share in dataclasses.asdict(faults).items() if name != "seconds"}
        if min(self._shares.values()) < 0 or sum(self._shares.values()) > 1:
            raise RecipeError(f"the shares of {faults} must be at least 0 and at most 1 in all")

    def client_ids(self) -> list[int]:
        return self._engine.client_ids()

    def exchange(self, asks: Mapping[int, bytes]) -> Iterator[tuple[int, bytes]]:
        draws = {client: random.Random(f"{self._seed}/{self._num_exchanges}/{client}") for client in asks}
        self._num_exchanges += 1
        plan = {client: self._pick(draw.random()) for client, draw in draws.items()}
        twice = {client: body for client, body in asks.items() if plan[client] == "duplicate"}
        for _ in self._engine.exchange(twice):
            pass
        for client, reply in self._engine.exchange(asks):
            fault, draw = plan[client], draws[client]
            if fault == "drop":
                continue
            if fault == "kill":
                raise ConnectionResetError(f"the connection broke at client {client}, as planned")
            if fault == "delay":
                time.sleep(self._faults.seconds)
            if fault == "truncate":
                reply = reply[: draw.randrange(len(reply))]
            if fault == "corrupt":
                reply = draw.randbytes(min(64, len(reply))) + reply[64:]
            yield client, reply

    def overhead(self) -> int:
        return self._engine.overhead()

    def close(self) -> None:
        self._engine.close()

    def _pick(self, number: float) -> str:
        for fault, share in self._shares.items():
            if number < share:
                return fault
            number -= share
        return "none"
