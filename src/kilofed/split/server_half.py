"""The server's half in split learning: forward and backward above the cut, with optimiser steps that can be undone.

SplitFed, Thapa et al. 2022, arXiv:2004.12088: `averaged` is its version 1, `sequential` its version 2. `joint` is one
forward over the batches of all clients with equal client weights; each client gets the gradient of its own loss.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from kilofed.config.recipe import TrainSpec
from kilofed.data.examples import IGNORED
from kilofed.errors import ModelError, NonFiniteLoss, PayloadError
from kilofed.federation.expected import Expected, TensorLike
from kilofed.federation.sums import WeightedSum
from kilofed.models import halves, training
from kilofed.models.halves import Halves
from kilofed.models.learner import Learner
from kilofed.payload import Payload
from kilofed.privacy.mechanisms import ROWS
from kilofed.split import activation_codec

Sharing = Literal["averaged", "sequential", "joint"]

SHARED = -1
MAX_MAGNITUDE = 1e6
"""Of hidden states and their gradients: ten times what models have, and far from where a forward or a norm overflows."""
LENGTHS, LABELS, CLASSES = "lengths", "labels", "classes"
Targets = Literal["none", "tokens", "classes"]
"""What a client sends to learn from: nothing where labels stay with it."""
_NAMES: dict[Targets, tuple[str, ...]] = {"none": (), "tokens": (LABELS,), "classes": (CLASSES,)}


@dataclass(frozen=True)
class BatchLimits:
    """What a client's batch may be, known before it comes."""

    num_rows: int
    """Most rows."""
    length: int
    """Most tokens of a row."""
    width: int
    """D, channels per token at the cut."""
    dtype: activation_codec.WireDtype
    targets: Targets
    num_outputs: int
    """V, tokens or classes."""

    @classmethod
    def of(
        cls, model: nn.Module, spec: TrainSpec, *, length: int, dtype: activation_codec.WireDtype, labels: bool
    ) -> "BatchLimits":
        """The limits of batches for `model`, which are sent with their labels if `labels`."""
        config, find = model.config, getattr(model, "get_output_embeddings", None)
        head = find() if find else None
        outputs = config.num_labels if head is None else head.weight.shape[0]  # type: ignore[union-attr]
        kind: Targets = "none" if not labels else "classes" if head is None else "tokens"
        return cls(spec.batch_size, length, halves.width(model), dtype, kind, int(outputs))  # type: ignore[arg-type]

    def expected(self, scalars: Mapping[str, type[int]]) -> Expected:
        """What a message with such a batch is like: hidden states, lengths of rows, targets, and `scalars`."""
        most = self.num_rows * self.length
        rows = activation_codec.expected(most, self.width, self.dtype)
        names = {"none": {}, "classes": {CLASSES: self.num_rows}, "tokens": {LABELS: most}}[self.targets]
        numbers = {LENGTHS: self.num_rows, **names}
        whole = {name: TensorLike(torch.int32, (range(1, num + 1),)) for name, num in numbers.items()}
        return Expected({**rows.tensors, **whole}, scalars)


@dataclass(frozen=True)
class ClientBatch:
    """One client's batch at the server; all values finite."""

    hidden_BTD: Tensor
    """Hidden states at the cut, 0 at the padding."""
    mask_BT: Tensor
    batch: training.Batch | None = None
    """The targets, with input_ids of 0, since the server does not get the tokens; None if they stay at the client."""
    top_BTD: Tensor | None = None
    """Instead of labels: the gradient of the client's loss with respect to the output of the last block."""


@dataclass(frozen=True)
class BatchGradient:
    """Gradient and loss of one client's batch."""

    gradient_BTD: Tensor
    """Gradient of the client's own loss with respect to its hidden states at the cut."""
    loss: float
    """Nats; 0 if the labels stay at the client."""


@dataclass
class _Step:
    """One step over all clients, with what is needed to repeat it without one of them."""

    number: int
    rate: float
    before: dict[str, Tensor]
    batches: dict[int, ClientBatch] = field(default_factory=dict)
    """In the order in which they were processed."""
    unacknowledged: set[int] = field(default_factory=set)
    """Clients that have not confirmed that they received their gradient."""


def lengths(batch: training.Batch) -> dict[str, Tensor]:
    """The payload tensor with the lengths of a batch's rows."""
    return {LENGTHS: batch.attention_mask.sum(1).int().cpu()}


def labels(batch: training.Batch) -> dict[str, Tensor]:
    """The payload tensor with a batch's targets."""
    if isinstance(batch, training.ClassBatch):
        return {CLASSES: batch.classes.int().cpu()}
    return {LABELS: activation_codec.unpad(batch.labels, batch.attention_mask).int().cpu()}


def decode_batch(tensors: Mapping[str, Tensor], limits: BatchLimits) -> ClientBatch:
    """Decode a client's batch; nothing of its padded size is allocated before its lengths are known to be in `limits`.

    Raises:
        PayloadError: tensors are missing or too many, of another dtype or shape than `limits` and the lengths say, or
            hold values that are not finite, no tokens or no classes.
    """
    names = {ROWS, LENGTHS, *_NAMES[limits.targets], *([activation_codec.SCALES] if limits.dtype == "int8" else [])}
    if odd := sorted(names ^ tensors.keys())[:3]:
        raise PayloadError(f"the reply has {sorted(tensors)[:8]}, which differs in {odd}; expected {sorted(names)}")
    _check_int32(tensors[LENGTHS], LENGTHS)
    if not 1 <= len(tensors[LENGTHS]) <= limits.num_rows:
        raise PayloadError(f"the reply has {len(tensors[LENGTHS])} rows; expected 1 to {limits.num_rows}")
    lengths_B = _integers(tensors[LENGTHS], LENGTHS, 1, limits.length)
    num = int(lengths_B.sum())
    rows_ND = check_finite(activation_codec.decode(tensors, num, limits.width, limits.dtype))
    mask_BT = activation_codec.mask_of(lengths_B)
    hidden_BTD = activation_codec.pad(rows_ND, mask_BT)
    return ClientBatch(hidden_BTD, mask_BT, _targets(tensors, mask_BT, num, limits))


def _targets(tensors: Mapping[str, Tensor], mask_BT: Tensor, num: int, limits: BatchLimits) -> training.Batch | None:
    """The targets of a batch of `num` tokens. Raises PayloadError: as `decode_batch`."""
    if limits.targets == "none":
        return None
    (name,) = _NAMES[limits.targets]
    _check_int32(tensors[name], name)
    if len(tensors[name]) != (num if limits.targets == "tokens" else len(mask_BT)):
        raise PayloadError(f"the reply has {len(tensors[name])} {name} for {num} tokens in {len(mask_BT)} rows")
    sent = _integers(tensors[name], name, 0, limits.num_outputs - 1, IGNORED)
    batch: training.Batch = training.ClassBatch(torch.zeros_like(mask_BT), mask_BT, sent)
    if limits.targets == "tokens":
        labels_BT = torch.full(mask_BT.shape, IGNORED)
        labels_BT[mask_BT.bool()] = sent
        batch = training.TokenBatch(torch.zeros_like(mask_BT), mask_BT, labels_BT)
    if not batch.num_targets:
        raise PayloadError(f"the reply has no {name} to learn from in {len(mask_BT)} rows")
    return batch


def _check_int32(sent: Tensor, name: str) -> None:
    if sent.dtype != torch.int32 or sent.dim() != 1:
        raise PayloadError(
            f"the reply has {name} of {sent.dtype} {tuple(sent.shape)}; expected int32 in one dimension"
        )


def _integers(sent: Tensor, name: str, least: int, most: int, but: int | None = None) -> Tensor:
    """(n,) int64 from `least` to `most`, or `but`. Raises PayloadError."""
    odd = ((sent < least) | (sent > most)) & (sent != but if but is not None else True)
    if bool(odd.any()):
        raise PayloadError(f"the reply has {int(sent[odd][0])} among its {name}; expected {least} to {most}")
    return sent.long()


def check_finite(rows: Tensor) -> Tensor:
    """Return `rows`, not empty. Raises PayloadError: a value is not finite, or beyond MAX_MAGNITUDE."""
    # Minimum and maximum, not a comparison: that would take as much memory again.
    largest = max(-float(rows.min()), float(rows.max()))
    if not math.isfinite(largest):
        raise PayloadError("the reply has NaN or infinite values")
    if largest > MAX_MAGNITUDE:
        raise PayloadError(f"the reply has values up to {largest:g}; expected at most {MAX_MAGNITUDE:g}")
    return rows


class ServerHalf:
    """The server's blocks during one round.

    Args:
        model: the whole model; its own trained tensors are not changed.
        cut: number of blocks at the clients.
        values: the server's trained tensors at the start of the round.
        rng: makes the random generator of a purpose, for dropout.
    """

    def __init__(
        self,
        model: nn.Module,
        cut: int,
        values: Mapping[str, Tensor],
        spec: TrainSpec,
        sharing: Sharing,
        rng: Callable[[str], torch.Generator],
    ) -> None:
        self._halves, self._values, self._spec = Halves(model, cut), dict(values), spec
        self._sharing, self._rng = sharing, rng
        self._learners: dict[int, Learner] = {}
        self._steps: list[_Step] = []
        self._graphs: dict[int, tuple[Tensor, Tensor]] = {}
        """Hidden states (at the cut, after the last block) of batches whose head is at the client."""

    def begin_step(self, number: int, rate: float) -> None:
        """Begin step `number` with learning rate `rate`."""
        while self._steps and not self._steps[0].unacknowledged:
            self._steps.pop(0)
        before = {} if self._sharing == "averaged" else self._learner(SHARED).save()
        self._steps.append(_Step(number, rate, before))

    def forward_to_head(self, client: int, sent: ClientBatch) -> Tensor:
        """Hidden states (B, T, D) after the last block, for a head at the client; call `train` next."""
        learner, hidden = self._learner(client), _leaf(sent.hidden_BTD, self._device)
        with self._training_mode(client):
            top = learner.run(lambda: self._halves.between(hidden, sent.mask_BT.to(self._device)))
        self._graphs[client] = hidden, top
        return top.detach()

    def train(self, sent: Mapping[int, ClientBatch]) -> dict[int, BatchGradient]:
        """A step for each batch in the order given, or one for all of them if the server's part is joint.

        Raises:
            NonFiniteLoss: a loss is no finite number. ModelError: both sides would train the same tensor.
        """
        gradients: dict[int, BatchGradient] = {}
        for group in self._groups(sent):
            learner = self._learner(group[0])
            if sent[group[0]].batch is None:
                gradients |= self._backward_from_heads(group, sent)
            else:
                gradients |= self._forward_backward(learner, group, sent)
            learner.step(self._steps[-1].rate)
            if self._sharing != "averaged":
                self._steps[-1].batches.update({client: sent[client] for client in group})
                self._steps[-1].unacknowledged.update(group)
        return gradients

    def acknowledge(self, client: int) -> None:
        """The client has received its gradients, so the steps on its batches are final."""
        for step in self._steps:
            step.unacknowledged.discard(client)

    def drop(self, client: int) -> None:
        """Drop a lost client: discard its copy, and undo a step whose gradient it may not have received."""
        self._graphs.pop(client, None)
        if self._sharing == "averaged":
            self._learners.pop(client, None)
        first = next((place for place, step in enumerate(self._steps) if client in step.unacknowledged), None)
        if first is None:
            return
        undone, self._steps = self._steps[first:], self._steps[:first]
        pending_graphs = dict(self._graphs)
        learner = self._learner(SHARED)
        learner.load(undone[0].before)
        for step in undone:
            self._steps.append(_Step(step.number, step.rate, learner.save()))
            kept = {
                one: batch for one, batch in step.batches.items() if one != client or one not in step.unacknowledged
            }
            for group in self._groups(kept):
                for one in group:
                    if kept[one].batch is None:
                        self.forward_to_head(one, kept[one])
                self.train({one: kept[one] for one in group})
            self._steps[-1].unacknowledged = step.unacknowledged - {client}
        self._graphs = pending_graphs

    def average(self, weights: Mapping[int, float]) -> None:
        """Set all copies of the server's tensors to their weighted mean; nothing to do for a single copy."""
        if self._sharing == "averaged":
            mean = self.result(weights)
            for learner in self._learners.values():
                learner.write(mean)

    def result(self, weights: Mapping[int, float]) -> dict[str, Tensor]:
        """The server's trained tensors, float32: the mean of the copies of clients that have a weight."""
        if self._sharing != "averaged":
            return self._learner(SHARED).read()
        total = WeightedSum()
        for client in sorted(self._learners.keys() & weights.keys()):
            total.add(Payload(self._learners[client].read()), weights[client])
        return dict(total.mean().tensors) if total.num else self._values

    @property
    def _device(self) -> torch.device:
        return next(self._halves.model.parameters()).device

    def _groups(self, sent: Mapping[int, ClientBatch]) -> list[list[int]]:
        """Groups of clients whose batches share a step."""
        if self._sharing == "joint":
            return [list(sent)] if sent else []
        return [[client] for client in sent]

    def _learner(self, client: int) -> Learner:
        key = client if self._sharing == "averaged" else SHARED
        if key not in self._learners:
            self._learners[key] = Learner(self._halves.model, self._values, self._spec)
        return self._learners[key]

    def _backward_from_heads(self, group: Sequence[int], sent: Mapping[int, ClientBatch]) -> dict[int, BatchGradient]:
        """Backward from the gradients of the clients' heads through the graphs of `forward_to_head`."""
        gradients = {}
        for client in group:
            (hidden, top), given = self._graphs.pop(client), sent[client].top_BTD
            assert given is not None
            top.backward(given.to(top.device, top.dtype) / len(group))  # type: ignore[no-untyped-call]
            gradients[client] = BatchGradient(_gradient(hidden) * len(group), 0.0)
        return gradients

    def _forward_backward(
        self, learner: Learner, group: Sequence[int], sent: Mapping[int, ClientBatch]
    ) -> dict[int, BatchGradient]:
        """One forward and backward over the batches of a group."""
        parts = [part for client in group if (part := sent[client].batch) is not None]
        assert len(parts) == len(group)
        width = max(part.input_ids.shape[1] for part in parts)
        hidden = _leaf(torch.cat([_widened(sent[client].hidden_BTD, width, 0.0) for client in group]), self._device)
        batch = _joined(parts, width).to(self._device)

        def forward() -> Tensor:
            with self._halves.from_cut(hidden):
                return training.losses(self._halves.model, batch)[0]

        with self._training_mode(group[0]):
            losses = learner.run(forward)
            by_client = torch.split(losses, [part.num_targets for part in parts])
            means = torch.stack([part.mean() for part in by_client])
        for client, value in zip(group, means.tolist(), strict=True):
            if not math.isfinite(value):
                raise NonFiniteLoss(
                    f"the server's loss on a batch of client {client} is {value}; lower train.lr or train.max_grad_norm"
                )
        means.mean().backward()  # type: ignore[no-untyped-call]
        if any(p.grad is not None for p in self._halves.model.parameters()):
            raise ModelError("this architecture uses a trained tensor on both sides of the cut; set adapter.kind=lora")
        gradients, row = {}, 0
        for client, value in zip(group, means.tolist(), strict=True):
            rows, width = sent[client].mask_BT.shape
            gradients[client] = BatchGradient(_gradient(hidden)[row : row + rows, :width] * len(group), value)
            row += rows
        return gradients

    @contextmanager
    def _training_mode(self, client: int) -> Iterator[None]:
        """Training mode with the random generator of this client and step."""
        model, device = self._halves.model, self._device
        model.train()
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._rng(f"dropout {self._steps[-1].number} {client}").initial_seed())
                with torch.autocast(device.type, torch.bfloat16, enabled=self._spec.autocast == "bfloat16"):
                    yield
        finally:
            model.eval()


def _joined(parts: Sequence[training.Batch], width: int) -> training.Batch:
    """Batches of one kind one below the other, padded to `width` tokens."""
    ids = torch.cat([_widened(part.input_ids, width, 0) for part in parts])
    mask = torch.cat([_widened(part.attention_mask, width, 0) for part in parts])
    labels = [part.labels for part in parts if isinstance(part, training.TokenBatch)]
    if labels:
        return training.TokenBatch(ids, mask, torch.cat([_widened(one, width, IGNORED) for one in labels]))
    classes = [part.classes for part in parts if isinstance(part, training.ClassBatch)]
    return training.ClassBatch(ids, mask, torch.cat(classes))


def _widened(tensor: Tensor, width: int, value: float) -> Tensor:
    """(B, T, ...) padded to (B, width, ...)."""
    # Padding of dimension 1, counted from the last one.
    return nn.functional.pad(tensor, [*[0] * (2 * (tensor.dim() - 2)), 0, width - tensor.shape[1]], value=value)


def _leaf(hidden: Tensor, device: torch.device) -> Tensor:
    return hidden.detach().to(device, copy=True).requires_grad_()


def _gradient(hidden: Tensor) -> Tensor:
    assert hidden.grad is not None
    return hidden.grad.float().cpu()
