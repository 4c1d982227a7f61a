"""A run of a method without files: rounds of a cohort of unequal clients, state and ledger at hand."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from kilofed.config.fields import Value
from kilofed.config.recipe import Recipe
from kilofed.config.tables import changed, to_toml
from kilofed.engines.inprocess import InProcess
from kilofed.federation.ledger import Ledger
from kilofed.federation.method import forecast
from kilofed.federation.workload import RunPreview
from kilofed.payload import Payload
from kilofed.runs.sites import Sites

Engine = Callable[..., InProcess]

SMALL: dict[str, dict[str, Value]] = {
    "fedkseed": {"num_seeds": 64, "steps": 3, "lr": 1e-3},
    "fedmezo": {"steps": 3, "lr": 1e-2},
    "kd": {"steps": 2, "client_distill_steps": 1, "batch_size": 4, "lr": 1e-2, "top_k": 8, "public_rows": 3},
    "fedpt": {"steps": 2, "batch_size": 4, "lr": 1e-2, "top_k": 8, "tolerance": 9.0},
}
"""Fields with which a method whose defaults are for large models learns in a test."""


class OneAway(InProcess):
    """The client with the highest number never answers."""

    def exchange(self, asks: Mapping[int, bytes]) -> Iterator[tuple[int, bytes]]:
        yield from super().exchange({client: body for client, body in asks.items() if client != self._ids[-1]})


@dataclass
class Federation:
    """A method at work on all clients of a recipe; goes on from `state` after round `done`."""

    recipe: Recipe
    folder: Path | None = None
    """Where client states are kept; None keeps them in memory."""
    forgetful: bool = False
    """Every message meets a new process, as far as Python objects can be one."""
    engine: Engine = InProcess
    done: int = 0
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)
    metrics: list[Mapping[str, object]] = field(default_factory=list)
    failures: list[dict[int, str]] = field(default_factory=list)
    """Of each round, by client."""
    shared: bool = False
    """Several tests look at it, so it stays as it is."""

    def __post_init__(self) -> None:
        self.sites = Sites(self.recipe, self.folder)
        self.server = replace(self.sites.server(), state=self.state)
        if not self.state:
            self.sites.method.setup(self.server)

    def run(self, rounds: int) -> "Federation":
        """Up to and with round number `rounds`."""
        assert not self.shared, "take federate(..., fresh=True) to go on"
        ids = self.sites.client_ids()
        for number in range(self.done + 1, rounds + 1):
            self.server.round = self.done = number
            engine = self.engine(ids, self._answer)
            cohort = self.sites.cohort(ids, engine, self.ledger, round=number)
            self.metrics.append(self.sites.method.round(self.server, cohort))
            self.failures.append(dict(cohort.failures))
        return self

    def preview(self) -> RunPreview:
        """The next round, before it runs."""
        method, recipe = self.sites.method, self.recipe
        return RunPreview(
            recipe,
            self.server,
            lambda client: self.sites.corpus.train_examples(client, method.client_model(recipe, client)),
            self.sites.corpus.public_examples,
            self.sites.client_ids(),
            self.done + 1,
        )

    def forecast(self) -> dict[int, dict[str, int]]:
        """Bytes of the next round by client and direction."""
        told = forecast(self.sites.method, self.preview(), self.sites.policy)
        return {
            client: {"down": sum(one.down for one in sent), "up": sum(one.up for one in sent)}
            for client, sent in told.items()
        }

    @property
    def content(self) -> bytes:
        """The server's state as it would lie on the disk."""
        return Payload(self.server.state).encode()

    def _answer(self, client: int, body: bytes) -> bytes:
        sites = Sites(self.recipe, self.folder) if self.forgetful else self.sites
        return sites.handle(client, body)


@pytest.fixture(scope="session")
def finished() -> dict[tuple[str, int], Federation]:
    """Federations by recipe and number of rounds."""
    return {}


@pytest.fixture
def federate(
    uneven: Recipe, tiny_large: Path, finished: dict[tuple[str, int], Federation]
) -> Callable[..., Federation]:
    """`federate("fedprox", rounds=2, mu=0.5)`: a federation after some rounds; other words as in `Federation`.

    Equal asks share one federation, unless `fresh=True` or one of Federation's own words is given.
    """

    def made(
        name: str,
        *,
        rounds: int = 2,
        overrides: Mapping[str, Value] | None = None,
        fresh: bool = False,
        **words: object,
    ) -> Federation:
        own = {item: words.pop(item) for item in ("folder", "forgetful", "engine", "done", "state") if item in words}
        fields = {f"method.{key}": value for key, value in {**SMALL.get(name, {}), **words}.items()}
        if name == "fedpt":
            fields = {"method.large": str(tiny_large), "data.public_share": 0.2, **fields}
        if name == "kd":
            fields = {"data.public_share": 0.2, **fields}
        recipe = changed(uneven, {"method": name, **fields, **(overrides or {})})  # type: ignore[dict-item]
        key = to_toml(recipe), rounds
        if "engine" in own:  # One that loses clients.
            recipe = changed(recipe, {"on_failure": "skip"})
        if fresh or own:
            return Federation(recipe, **own).run(rounds)  # type: ignore[arg-type]
        if key not in finished:
            finished[key] = Federation(recipe).run(rounds)
            finished[key].shared = True
        return finished[key]

    return made


@pytest.fixture
def one_away() -> Engine:
    """An engine in which one client never answers."""
    return OneAway


@pytest.fixture
def away_in() -> Callable[[int], Engine]:
    """`away_in(2)`: an engine in which client 1 does not answer in the second round that is run, and then does again."""

    def made(number: int) -> Engine:
        rounds: list[InProcess] = []

        class Away(InProcess):
            def __init__(self, *words: object) -> None:
                super().__init__(*words)  # type: ignore[arg-type]
                rounds.append(self)

            def exchange(self, asks: Mapping[int, bytes]) -> Iterator[tuple[int, bytes]]:
                away = {1} if len(rounds) == number else set[int]()
                yield from super().exchange({client: body for client, body in asks.items() if client not in away})

        return Away

    return made
