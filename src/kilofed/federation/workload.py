"""What a round makes each party compute: which batches meet which part of which model.

A method says it in these terms before anything is run; `kilofed.costs.counter` turns it into operations and bytes.

Shapes: B rows, T tokens with padding, K positions of a row that go through the output head.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from kilofed.config.recipe import ModelSpec, Recipe, TrainSpec
from kilofed.data.examples import Example
from kilofed.federation.parties import Server, generator
from kilofed.models import training

Part = Literal["whole", "below", "above", "between", "head"]
"""whole; of a model that is cut: below the cut, above it, above it without the head, the head alone."""


@dataclass(frozen=True)
class Pass:
    """One batch through a model."""

    rows: int
    """B."""
    width: int
    """T."""
    kept: int = 0
    """K; 0 where rows are classified."""
    learns: bool = False
    """Whether a backward follows the forward."""
    part: Part = "whole"
    cut: int = 0
    """Blocks below the cut, where there is one."""
    model: ModelSpec | None = None
    """None is the model that the party loads."""
    times: float = 1.0
    """How often."""
    plain: bool = False
    """Whether the model is without what is trained."""
    taught: int = 0
    """Words of each position that a teacher scores, or that are scored for one; 0 where there is none."""


@dataclass(frozen=True)
class Work:
    """What one party does in one round."""

    passes: Sequence[Pass] = ()
    scratch: int = 0
    """Bytes held beside weights, gradients, moments, activations and messages."""
    waits: bool = False
    """Whether activations are held from one message to the next."""


@dataclass
class Scene:
    """A run that has not begun: what its parties hold, but for the models' numbers."""

    recipe: Recipe
    server: Server
    """With an outline for a model, and trained tensors that have no numbers."""
    rows_of: Callable[[int], Sequence[Example]]
    """A client's rows, for the model that it loads."""
    public_of: Callable[[ModelSpec], Sequence[Example]]
    """The public rows for a model."""
    ids: Sequence[int] = ()
    """Who takes part in the round."""
    round: int = 1
    cache: dict[str, object] = field(default_factory=dict)
    """What a method works out once for all rounds."""

    def learnt(self, client: int, spec: TrainSpec, **about: object) -> list[Pass]:
        """The batches that `train.fit_round` walks in this round; `about` are fields of a Pass."""
        size = -(-spec.batch_size // spec.accumulation)
        return [
            shape(batch[start : start + size], learns=True, **about)
            for batch in self.batches(client, spec)
            for start in range(0, len(batch), size)
        ]

    def batches(self, client: int, spec: TrainSpec) -> Iterator[list[Example]]:
        """The same batches as lists of examples."""
        rows = self.rows_of(client)
        steps = training.num_steps(spec, len(rows))

        def order(name: str) -> torch.Generator:
            return generator(self.recipe.seed, 0, client, name)

        return training.batches(rows, spec, first=(self.round - 1) * steps, count=steps, order=order)


def shape(rows: Sequence[Example], **about: object) -> Pass:
    """A batch of `rows` as a Pass."""
    batch = training.collate(rows)
    kept = len(batch.kept_K) if isinstance(batch, training.TokenBatch) else 0
    num_rows, num_tokens = batch.input_ids.shape
    return replace(Pass(num_rows, num_tokens, kept), **about)  # type: ignore[arg-type]


def shapes(rows: Sequence[Example], batch_size: int, *, ordered: bool = False, **about: object) -> list[Pass]:
    """All rows in batches, as they come or the shortest first."""
    every = sorted(rows, key=lambda row: len(row.input_ids)) if ordered else list(rows)
    return [shape(every[start : start + batch_size], **about) for start in range(0, len(every), batch_size)]


def two_forwards(scene: Scene, client: int, steps: int, batch_size: int) -> Work:
    """Zeroth-order steps: two forwards each, with scratch for the weights of one module."""
    spec = replace(scene.recipe.train, steps=steps, batch_size=batch_size, epochs=0, accumulation=1)
    largest = max(
        sum(p.numel() * p.element_size() for p in module.parameters(recurse=False) if p.requires_grad)
        for module in scene.server.model.modules()
    )
    return Work([shape(batch, times=2.0) for batch in scene.batches(client, spec)], largest)
