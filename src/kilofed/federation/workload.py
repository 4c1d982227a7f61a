"""What a round asks of each party, told before it runs: its messages, and which batches meet which part of which model.

A method says both in these terms; `check`, `plan` and the report read them. `kilofed.costs.counter` turns batches into
operations and bytes of memory.

Shapes: B rows, T tokens with padding, K positions of a row that go through the output head.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn

from kilofed.config.recipe import ModelSpec, Recipe, TrainSpec
from kilofed.data.examples import Example
from kilofed.federation.parties import Server, generator
from kilofed.models import training
from kilofed.payload import Payload


@dataclass(frozen=True)
class Message:
    """One exchange between the server and a client, with made-up numbers."""

    action: str
    verb: str
    ask: Payload
    reply: Payload
    times: int = 1
    """How often the client takes part in it per round."""


@dataclass(frozen=True)
class PassKind:
    """What a batch goes through, by default the whole model; equal kinds are counted once.

    A family that runs another part of a model, or another loss, has its own kind beside its maths.
    """

    def prepare(self, model: nn.Module, one: "Pass") -> Callable[[], Tensor]:
        """The forward that is counted, after whatever must have run once before it.

        It gives logits (B, C) of classes or (B, K, V) of tokens, or hidden states (B, T, D).
        """

        def forward() -> Tensor:
            ids = torch.zeros(one.rows, one.width, dtype=torch.long)
            return logits(model, ids, torch.ones_like(ids), one.kept)

        return forward

    def loss(self, out: Tensor, one: "Pass") -> Tensor:
        """What follows a forward; a scalar where a backward does."""
        flat = out.reshape(-1, out.shape[-1]).float().clone()
        return nn.functional.cross_entropy(flat, torch.zeros(len(flat), dtype=torch.long))


WHOLE = PassKind()


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
    kind: PassKind = WHOLE
    model: ModelSpec | None = None
    """None is the model that the party loads."""
    times: float = 1.0
    """How often."""
    plain: bool = False
    """Whether the model is without what is trained."""


@dataclass(frozen=True)
class Work:
    """What one party computes in one round."""

    passes: Sequence[Pass] = ()
    scratch: int = 0
    """Bytes held beside weights, gradients, moments, activations and messages."""
    waits: bool = False
    """Whether activations are held from one message to the next."""


@dataclass
class RunPreview:
    """One round of a run, looked at before it runs."""

    recipe: Recipe
    server: Server
    """Its model may have shapes and no numbers."""
    rows_of: Callable[[int], Sequence[Example]]
    """A client's rows, for the model that it loads."""
    public_of: Callable[[ModelSpec], Sequence[Example]]
    """The public rows for a model."""
    ids: Sequence[int] = ()
    """Who takes part in the round."""
    round: int = 1
    cache: dict[str, object] = field(default_factory=dict)
    """What a method works out once for all rounds."""

    def alike(self, *messages: Message) -> dict[int, Sequence[Message]]:
        """The same messages for every client of the round."""
        return dict.fromkeys(self.ids, messages)

    def local_training(self, client: int, *, kind: PassKind = WHOLE) -> list[Pass]:
        """The batches on which a client trains in this round, as `training.fit_round` takes them."""
        spec = self.recipe.train
        size = -(-spec.batch_size // spec.accumulation)
        return [
            replace(shape(batch[start : start + size]), learns=True, kind=kind)
            for batch in self.batches(client, spec)
            for start in range(0, len(batch), size)
        ]

    def batches(self, client: int, spec: TrainSpec) -> Iterator[list[Example]]:
        """The same batches as lists of examples, before they are cut into parts."""
        rows = self.rows_of(client)
        steps = training.num_steps(spec, len(rows))

        def order(name: str) -> torch.Generator:
            return generator(self.recipe.seed, 0, client, name)

        return training.batches(rows, spec, first=(self.round - 1) * steps, count=steps, order=order)


class Costs:
    """What a method's parties compute in a round of a run that has not begun; by default nobody can tell."""

    def client(self, preview: RunPreview, client: int) -> Work | None:
        """What one client computes; None where nobody can tell."""
        return None

    def server(self, preview: RunPreview) -> Work | None:
        """What the server computes; None where nobody can tell."""
        return None


class LocalTraining(Costs):
    """Clients train by gradients as the recipe's [train] says; the server only averages."""

    def client(self, preview: RunPreview, client: int) -> Work:
        return Work(preview.local_training(client))

    def server(self, preview: RunPreview) -> Work:
        return Work()


@dataclass(frozen=True)
class TwoPointSteps(Costs):
    """Clients make zeroth-order steps of two forwards each; the server only averages."""

    steps: int
    batch_size: int

    def client(self, preview: RunPreview, client: int) -> Work:
        """With scratch for the weights of one module."""
        spec = replace(preview.recipe.train, steps=self.steps, batch_size=self.batch_size, epochs=0, accumulation=1)
        largest = max(
            sum(p.numel() * p.element_size() for p in module.parameters(recurse=False) if p.requires_grad)
            for module in preview.server.model.modules()
        )
        return Work([replace(shape(batch), times=2.0) for batch in preview.batches(client, spec)], largest)

    def server(self, preview: RunPreview) -> Work:
        return Work()


def shape(rows: Sequence[Example]) -> Pass:
    """A batch of `rows` as a Pass."""
    batch = training.collate(rows)
    kept = len(batch.positions_K) if isinstance(batch, training.TokenBatch) else 0
    num_rows, num_tokens = batch.input_ids.shape
    return Pass(num_rows, num_tokens, kept)


def shapes(rows: Sequence[Example], batch_size: int, *, ordered: bool = False) -> list[Pass]:
    """All rows in batches, as they come or the shortest first."""
    every = sorted(rows, key=lambda row: len(row.input_ids)) if ordered else list(rows)
    return [shape(every[start : start + batch_size]) for start in range(0, len(every), batch_size)]


def logits(model: nn.Module, ids: Tensor, mask: Tensor, kept: int) -> Tensor:
    """(B, C) logits of classes, or (B, K, V) of tokens.

    Args:
        ids: (B, T).
        mask: (B, T).
        kept: K; 0 where rows are classified.
    """
    if not kept:
        return cast(Tensor, model(input_ids=ids, attention_mask=mask).logits)
    partly = {"logits_to_keep": torch.arange(kept)} if training.keeps_logits(model) else {}
    out = model(input_ids=ids, attention_mask=mask, use_cache=False, **partly).logits
    return cast(Tensor, out[:, :kept])
