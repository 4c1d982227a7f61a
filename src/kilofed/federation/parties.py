"""Who takes part: a client and what it owns, the server and what it owns, and the random stream of each purpose."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from kilofed.config.recipe import ModelSpec, TrainSpec
from kilofed.data.examples import Example
from kilofed.federation.states import States
from kilofed.models import training


def generator(seed: int, round: int, client: int, purpose: str) -> torch.Generator:
    """The random stream of one purpose; equal arguments give equal draws in every process and on every machine."""
    digest = hashlib.sha256(f"{seed}/{round}/{client}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@dataclass
class Client:
    """What one site owns, as a method's client functions see it."""

    id: int
    """The client's own number; never an engine's."""
    data: Sequence[Example]
    """The rows that do not leave."""
    train: TrainSpec
    """How it trains by gradients."""
    num_rounds: int
    """Rounds of the whole run, for schedules."""
    seed: int
    model: nn.Module = field(default_factory=nn.Identity)
    """What `Method.client_model` asked for; shared by all clients of one process, so write into it before use."""
    state: dict[str, Tensor] = field(default_factory=dict)
    """Kept on the client's own disk from message to message."""
    states: States = field(default_factory=States)
    """Where `state` is kept; `handle` reads and writes it."""
    cache: dict[str, object] = field(default_factory=dict)
    """May vanish between two messages."""
    public: Sequence[Example] = ()
    """Rows that anyone may see, tokenised for this client's model; the same rows as the server's."""
    start: Callable[[], Mapping[str, Tensor]] = dict
    """Gives the trained tensors of `model` as they were before any training, which equal seeds make equal."""
    round: int = 0
    """Round of the message in hand, from 1."""

    def fit_round(self, objective: training.Loss = training.loss) -> training.Fit:
        """Train `model` on the rows for the round in hand, as the recipe's [train] says.

        Raises:
            NonFiniteLoss: see `training.fit`.
        """
        return training.fit_round(
            self.model,
            self.data,
            self.train,
            round=self.round,
            num_rounds=self.num_rounds,
            order=self.order,
            dropout=self.rng("dropout"),
            objective=objective,
        )

    def rng(self, purpose: str) -> torch.Generator:
        """This client's random stream for one purpose in this round."""
        return generator(self.seed, self.round, self.id, purpose)

    def order(self, purpose: str) -> torch.Generator:
        """This client's random stream for one purpose in the whole run, such as the order of an epoch."""
        return generator(self.seed, 0, self.id, purpose)


@dataclass
class Server:
    """What the coordinator owns."""

    seed: int
    num_rounds: int
    train: TrainSpec
    model: nn.Module = field(default_factory=nn.Identity)
    """What `Method.server_model` asked for."""
    state: dict[str, Tensor] = field(default_factory=dict)
    """All that the server knows between two rounds; checkpointed after each."""
    public: Sequence[Example] = ()
    """Rows that anyone may see: the recipe's data.public."""
    spec: ModelSpec | None = None
    """What `model` was loaded from; None where it was not."""
    folder: Path | None = None
    """The run folder, for what is kept beside the state, such as an API's answers; None where there is none."""
    cache: dict[str, object] = field(default_factory=dict)
    """May vanish between two rounds."""
    num_rows: Callable[[int], int] | None = None
    """Training rows of a client, as its site told when it joined; None where nobody told."""
    max_length: int = 0
    """Longest example in tokens, the recipe's data.max_length; 0 where it is not known."""
    round: int = 0
    """Round in hand, from 1; 0 before the first."""

    def close(self) -> None:
        """Let go of what the cache holds open, such as the way to an API."""
        for kept in self.cache.values():
            if callable(close := getattr(kept, "close", None)):
                close()

    def rng(self, purpose: str) -> torch.Generator:
        """The server's random stream for one purpose in this round."""
        return generator(self.seed, self.round, -1, purpose)
