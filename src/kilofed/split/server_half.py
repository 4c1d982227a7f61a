"""The server's side of split learning: forward from the cut, gradient back to it, and steps that can be undone.

SplitFed, Thapa et al. 2022, arXiv:2004.12088: `averaged` is its version 1, `sequential` its version 2. `joint` is one
forward over the batches of all clients; each of them counts alike and gets the gradient of its own loss.
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
from kilofed.federation.sums import WeightedSum
from kilofed.models import training
from kilofed.models.halves import Halves
from kilofed.models.learner import Learner
from kilofed.payload import Payload
from kilofed.split import activation_codec

Sharing = Literal["averaged", "sequential", "joint"]

SHARED = -1
LENGTHS, LABELS, CLASSES = "lengths", "labels", "classes"


@dataclass(frozen=True)
class Sent:
    """What the server has of one client's batch; finite numbers."""

    hidden_BTD: Tensor
    """Hidden states at the cut, zeros at the padding."""
    mask_BT: Tensor
    batch: training.Batch | None = None
    """What is to be learnt, with input_ids of 0: the server does not get the tokens; None where the labels stay with
    the client."""
    top_BTD: Tensor | None = None
    """Instead of labels: the gradient of the client's loss with respect to what left the last block."""


@dataclass(frozen=True)
class Answer:
    """What a batch brought."""

    gradient_BTD: Tensor
    """Of the client's own loss, with respect to its hidden states at the cut."""
    loss: float
    """Nats; 0 where the labels stay with the client."""


@dataclass
class _Sweep:
    """One step of all clients: enough to do it again without one of them."""

    number: int
    rate: float
    before: dict[str, Tensor]
    done: dict[int, Sent] = field(default_factory=dict)
    """In the order in which they were worked on."""
    open: set[int] = field(default_factory=set)
    """Clients that have not shown that their gradient reached them."""


def lengths(batch: training.Batch) -> dict[str, Tensor]:
    """What tells the server where a batch's rows end."""
    return {LENGTHS: batch.attention_mask.sum(1).int().cpu()}


def labels(batch: training.Batch) -> dict[str, Tensor]:
    """What tells the server what is to be learnt."""
    if isinstance(batch, training.ClassBatch):
        return {CLASSES: batch.classes.int().cpu()}
    return {LABELS: activation_codec.pack(batch.labels, batch.attention_mask).int().cpu()}


def read(tensors: Mapping[str, Tensor], width: int, *, labels: bool) -> Sent:
    """One client's batch, with its labels if they are to be there. Raises PayloadError: it is none, or not finite."""
    ends = tensors.get(LENGTHS, torch.zeros(0))
    if ends.dtype != torch.int32 or ends.dim() != 1 or not len(ends) or int(ends.min()) < 1:
        raise PayloadError("it sent no lengths of its rows")
    mask, num = activation_codec.mask_of(ends), int(ends.sum())
    hidden = activation_codec.unpack(finite(activation_codec.grow(tensors, num, width)), mask)
    if not labels:
        return Sent(hidden, mask)
    classes, found = tensors.get(CLASSES), tensors.get(LABELS, torch.zeros(0))
    if classes is not None and len(classes) == len(ends):
        return Sent(hidden, mask, training.ClassBatch(torch.zeros_like(mask), mask, classes.long()))
    if len(found) != num:
        raise PayloadError(f"it sent {len(found)} labels for {num} tokens in {len(ends)} rows")
    whole = torch.full(mask.shape, IGNORED)
    whole[mask.bool()] = found.long()
    return Sent(hidden, mask, training.TokenBatch(torch.zeros_like(mask), mask, whole))


def finite(rows: Tensor) -> Tensor:
    """`rows`. Raises PayloadError: a number in them is not finite."""
    if not bool(rows.isfinite().all()):
        raise PayloadError("it sent NaN or infinite numbers")
    return rows


class Tail:
    """The server's blocks at work for one round.

    Args:
        model: the whole model; its own trained tensors are not touched.
        cut: blocks that clients hold.
        values: the server's share of the trained tensors at the start of the round.
        rng: random stream of a name, for dropout.
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
        self._sweeps: list[_Sweep] = []
        self._graphs: dict[int, tuple[Tensor, Tensor]] = {}
        """(hidden states at the cut, after the last block) of batches whose head is at the client."""

    def begin(self, number: int, rate: float) -> None:
        """Step number `number` begins, at learning rate `rate`."""
        while self._sweeps and not self._sweeps[0].open:
            self._sweeps.pop(0)
        before = {} if self._sharing == "averaged" else self._learner(SHARED).save()
        self._sweeps.append(_Sweep(number, rate, before))

    def ascend(self, client: int, sent: Sent) -> Tensor:
        """Hidden states (B, T, D) after the last block, for a head at the client; `learn` is to follow."""
        learner, hidden = self._learner(client), _leaf(sent.hidden_BTD, self._device)
        with self._at_work(client):
            top = learner.run(lambda: self._halves.between(hidden, sent.mask_BT.to(self._device)))
        self._graphs[client] = hidden, top
        return top.detach()

    def learn(self, sent: Mapping[int, Sent]) -> dict[int, Answer]:
        """A step for each batch in the order given, or one for all of them if the server's part is joint.

        Raises:
            NonFiniteLoss: a loss is no finite number. ModelError: both sides would train the same tensor.
        """
        answers: dict[int, Answer] = {}
        for group in self._groups(sent):
            learner = self._learner(group[0])
            if sent[group[0]].batch is None:
                answers |= self._descend(group, sent)
            else:
                answers |= self._through(learner, group, sent)
            learner.step(self._sweeps[-1].rate)
            if self._sharing != "averaged":
                self._sweeps[-1].done.update({client: sent[client] for client in group})
                self._sweeps[-1].open.update(group)
        return answers

    def received(self, client: int) -> None:
        """The client has the gradients of its batches, so what was learnt from them stays."""
        for sweep in self._sweeps:
            sweep.open.discard(client)

    def drop(self, client: int) -> None:
        """The client is gone: its own copy goes, and a step whose gradient it may not have is undone."""
        self._graphs.pop(client, None)
        if self._sharing == "averaged":
            self._learners.pop(client, None)
        first = next((place for place, sweep in enumerate(self._sweeps) if client in sweep.open), None)
        if first is None:
            return
        again, self._sweeps = self._sweeps[first:], self._sweeps[:first]
        waiting = dict(self._graphs)
        learner = self._learner(SHARED)
        learner.load(again[0].before)
        for sweep in again:
            self._sweeps.append(_Sweep(sweep.number, sweep.rate, learner.save()))
            kept = {one: batch for one, batch in sweep.done.items() if one != client or one not in sweep.open}
            for group in self._groups(kept):
                for one in group:
                    if kept[one].batch is None:
                        self.ascend(one, kept[one])
                self.learn({one: kept[one] for one in group})
            self._sweeps[-1].open = sweep.open - {client}
        self._graphs = waiting

    def average(self, weights: Mapping[int, float]) -> None:
        """Give all copies of the server's part their weighted mean; a single part stays as it is."""
        if self._sharing == "averaged":
            mean = self.result(weights)
            for learner in self._learners.values():
                learner.write(mean)

    def result(self, weights: Mapping[int, float]) -> dict[str, Tensor]:
        """The server's share of the trained tensors, float32; copies of clients without a weight do not count."""
        if self._sharing != "averaged":
            return self._learner(SHARED).read()
        total = WeightedSum()
        for client in sorted(self._learners.keys() & weights.keys()):
            total.add(Payload(self._learners[client].read()), weights[client])
        return dict(total.mean().tensors) if total.num else self._values

    @property
    def _device(self) -> torch.device:
        return next(self._halves.model.parameters()).device

    def _groups(self, sent: Mapping[int, Sent]) -> list[list[int]]:
        """Clients whose batches share a step."""
        if self._sharing == "joint":
            return [list(sent)] if sent else []
        return [[client] for client in sent]

    def _learner(self, client: int) -> Learner:
        key = client if self._sharing == "averaged" else SHARED
        if key not in self._learners:
            self._learners[key] = Learner(self._halves.model, self._values, self._spec)
        return self._learners[key]

    def _descend(self, group: Sequence[int], sent: Mapping[int, Sent]) -> dict[int, Answer]:
        """Back from the gradients of the heads, through the graphs that `ascend` left."""
        answers = {}
        for client in group:
            (hidden, top), given = self._graphs.pop(client), sent[client].top_BTD
            assert given is not None
            top.backward(given.to(top.device, top.dtype) / len(group))  # type: ignore[no-untyped-call]
            answers[client] = Answer(_gradient(hidden) * len(group), 0.0)
        return answers

    def _through(self, learner: Learner, group: Sequence[int], sent: Mapping[int, Sent]) -> dict[int, Answer]:
        """One forward and backward over the batches of a group."""
        parts = [part for client in group if (part := sent[client].batch) is not None]
        assert len(parts) == len(group)
        width = max(part.input_ids.shape[1] for part in parts)
        hidden = _leaf(torch.cat([_widened(sent[client].hidden_BTD, width, 0.0) for client in group]), self._device)
        batch = _joined(parts, width).to(self._device)

        def forward() -> Tensor:
            with self._halves.from_cut(hidden):
                return training.losses(self._halves.model, batch)[0]

        with self._at_work(group[0]):
            losses = learner.run(forward)
            by_client = torch.split(losses, [part.num_learnt for part in parts])
            means = torch.stack([part.mean() for part in by_client])
        for client, value in zip(group, means.tolist(), strict=True):
            if not math.isfinite(value):
                raise NonFiniteLoss(
                    f"the server's loss on a batch of client {client} is {value}: try a smaller train.lr or max_grad_norm"
                )
        means.mean().backward()  # type: ignore[no-untyped-call]
        if any(p.grad is not None for p in self._halves.model.parameters()):
            raise ModelError("this architecture uses a tensor on both sides of the cut: train with adapter.kind=lora")
        answers, row = {}, 0
        for client, value in zip(group, means.tolist(), strict=True):
            rows, width = sent[client].mask_BT.shape
            answers[client] = Answer(_gradient(hidden)[row : row + rows, :width] * len(group), value)
            row += rows
        return answers

    @contextmanager
    def _at_work(self, client: int) -> Iterator[None]:
        """The model in training mode, with the random stream of this client and step."""
        model, device = self._halves.model, self._device
        model.train()
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._rng(f"dropout {self._sweeps[-1].number} {client}").initial_seed())
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
