"""Local learning: one loss, one loop, optimiser and schedule; nothing federated."""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from kilofed.config.recipe import TrainSpec
from kilofed.data.examples import IGNORED, Example
from kilofed.errors import NonFiniteLoss


@dataclass(frozen=True)
class TokenBatch:
    """Rows whose tokens are learnt, padded on the right: B rows, T tokens in the longest."""

    input_ids: Tensor
    """(B, T), 0 at the padding."""
    attention_mask: Tensor
    """(B, T), 1 at tokens and 0 at the padding."""
    labels: Tensor
    """(B, T), the token itself where it is learnt and IGNORED elsewhere."""

    @property
    def targets_BT(self) -> Tensor:
        """(B, T - 1): what each position but the last has to predict, IGNORED where that is not learnt."""
        return self.labels[:, 1:]

    @property
    def targets_N(self) -> Tensor:
        """(N,): the learnt tokens, row by row."""
        return self.targets_BT[self.targets_BT != IGNORED]

    @property
    def kept_K(self) -> Tensor:
        """(K,): positions from which at least one row has to predict a learnt token."""
        return (self.targets_BT != IGNORED).any(dim=0).nonzero()[:, 0]

    @property
    def num_learnt(self) -> int:
        """N: tokens that the loss is over, those that some position predicts."""
        return int((self.targets_BT != IGNORED).sum())

    def to(self, device: str | torch.device) -> "TokenBatch":
        """The same rows on `device`."""
        return TokenBatch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))


@dataclass(frozen=True)
class ClassBatch:
    """Rows that are classified as a whole, padded on the right: B rows, T tokens in the longest."""

    input_ids: Tensor
    """(B, T), 0 at the padding."""
    attention_mask: Tensor
    """(B, T), 1 at tokens and 0 at the padding."""
    classes: Tensor
    """(B,), number of each row's class, IGNORED where it is not known."""

    @property
    def num_learnt(self) -> int:
        """Rows that the loss is over, those that have a class."""
        return int((self.classes != IGNORED).sum())

    def to(self, device: str | torch.device) -> "ClassBatch":
        """The same rows on `device`."""
        return ClassBatch(self.input_ids.to(device), self.attention_mask.to(device), self.classes.to(device))


Batch = TokenBatch | ClassBatch


@dataclass(frozen=True)
class Fit:
    """What a stretch of training did."""

    loss: float
    """Mean training loss over its steps, nats per token."""
    num_steps: int
    num_examples: int
    num_tokens: int
    """Tokens that were learnt."""


Loss = Callable[[nn.Module, Batch], Tensor]


def collate(examples: Sequence[Example], device: str | torch.device = "cpu") -> Batch:
    """A ClassBatch of examples that have classes, a TokenBatch of others; all are to be of one kind."""
    return collate_tokens(examples, device) if examples[0].label is None else collate_classes(examples, device)


def collate_tokens(examples: Sequence[Example], device: str | torch.device = "cpu") -> TokenBatch:
    """Pad on the right to the longest example; padding is masked and not learnt."""
    assert all(example.label is None for example in examples)
    input_ids, mask = _padded(examples)
    labels = torch.full_like(input_ids, IGNORED)
    for row, example in enumerate(examples):
        labels[row, : len(example.labels)] = torch.tensor(example.labels)
    return TokenBatch(input_ids, mask, labels).to(device)


def collate_classes(examples: Sequence[Example], device: str | torch.device = "cpu") -> ClassBatch:
    """Pad on the right to the longest example; padding is masked."""
    classes = [example.label for example in examples if example.label is not None]
    assert len(classes) == len(examples)
    input_ids, mask = _padded(examples)
    return ClassBatch(input_ids, mask, torch.tensor(classes)).to(device)


def token_logits(model: nn.Module, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Logits (N, V), float32, and targets (N,) of the learnt tokens, row by row."""
    # Positions at which no row learns anything need no pass through the output head, which is most of a small model.
    kept_K = batch.kept_K
    partly = {"logits_to_keep": kept_K} if keeps_logits(model) else {}
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **partly).logits
    logits_BKV = logits if partly else logits[:, kept_K]
    targets_BK = batch.targets_BT[:, kept_K]
    learnt = targets_BK != IGNORED
    return logits_BKV[learnt].float(), targets_BK[learnt]


def token_losses(model: nn.Module, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Cross entropy (nats) and whether the best guess was right, one entry per learnt token."""
    logits_NV, targets_N = token_logits(model, batch)
    losses = nn.functional.cross_entropy(logits_NV, targets_N, reduction="none")
    return losses, logits_NV.argmax(-1) == targets_N


def class_logits(model: nn.Module, batch: ClassBatch) -> Tensor:
    """Logits (B, C) of a model that classifies rows, float32."""
    out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    return cast(Tensor, out.logits).float()


def class_losses(model: nn.Module, batch: ClassBatch) -> tuple[Tensor, Tensor]:
    """Cross entropy (nats) and whether the best guess was right, one entry per row that has a class."""
    learnt = batch.classes != IGNORED
    logits_NC, targets_N = class_logits(model, batch)[learnt], batch.classes[learnt]
    return nn.functional.cross_entropy(logits_NC, targets_N, reduction="none"), logits_NC.argmax(-1) == targets_N


def losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """`token_losses` of a TokenBatch, `class_losses` of a ClassBatch."""
    return token_losses(model, batch) if isinstance(batch, TokenBatch) else class_losses(model, batch)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross entropy over the learnt tokens, or over the rows where they have classes, in nats."""
    return losses(model, batch)[0].mean()


def num_steps(spec: TrainSpec, num_examples: int) -> int:
    """Optimiser steps per round for a client with `num_examples` rows."""
    if spec.epochs:
        return spec.epochs * math.ceil(num_examples / spec.batch_size)
    return spec.steps


def batches(
    examples: Sequence[Example], spec: TrainSpec, *, first: int, count: int, order: Callable[[str], torch.Generator]
) -> Iterator[list[Example]]:
    """Batches number `first` to `first + count - 1` of an endless walk over shuffled epochs.

    The walk is a pure function of `order`, which gives the random stream of a name, so any stretch of it can be
    walked again; every example is met once per epoch.
    """
    size = min(spec.batch_size, len(examples))
    per_epoch = math.ceil(len(examples) / size)
    epoch, shuffled = -1, []
    for number in range(first, first + count):
        if number // per_epoch != epoch:
            epoch = number // per_epoch
            shuffled = torch.randperm(len(examples), generator=order(f"epoch {epoch}")).tolist()
        start = (number % per_epoch) * size
        yield [examples[i] for i in shuffled[start : start + size]]


def fit_round(
    model: nn.Module,
    examples: Sequence[Example],
    spec: TrainSpec,
    *,
    round: int,
    num_rounds: int,
    order: Callable[[str], torch.Generator],
    dropout: torch.Generator,
    objective: Loss = loss,
) -> Fit:
    """One client's training in round number `round` (from 1) of `num_rounds`; schedule and epochs go on across rounds."""
    steps = num_steps(spec, len(examples))
    first = (round - 1) * steps
    stretch = batches(examples, spec, first=first, count=steps, order=order)
    return fit(model, stretch, spec, first=first, total=steps * num_rounds, dropout=dropout, objective=objective)


def fit(
    model: nn.Module,
    stretch: Iterator[list[Example]],
    spec: TrainSpec,
    *,
    first: int,
    total: int,
    dropout: torch.Generator,
    objective: Loss = loss,
) -> Fit:
    """Train the parameters that require gradients, one optimiser step per batch, with a fresh optimiser.

    Args:
        stretch: the batches.
        first: number of the first step in the whole run, for the schedule.
        total: steps in the whole run.
        dropout: stream for dropout.
        objective: what is minimised; (model, batch) to a scalar.

    Raises:
        NonFiniteLoss: a loss was NaN or infinite, and the model keeps the weights of the step before; or the last
            step made a weight so.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    optimizer = optimizer_for(parameters, spec)
    sum_loss, steps, rows, tokens = 0.0, 0, 0, 0
    model.train()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(dropout.initial_seed())
            for step, examples in enumerate(stretch, first):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(spec, step, total)
                value, learnt = _backward(model, examples, spec, objective, device)
                if not math.isfinite(value):
                    raise NonFiniteLoss(
                        f"the loss is {value} at step {step + 1}: try a smaller train.lr or max_grad_norm"
                    )
                if spec.max_grad_norm:
                    nn.utils.clip_grad_norm_(parameters, spec.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                sum_loss, steps, rows, tokens = sum_loss + value, steps + 1, rows + len(examples), tokens + learnt
        # The last step has no loss after it that would show what it did.
        if not all(bool(p.isfinite().all()) for p in parameters):
            raise NonFiniteLoss(
                f"the weights are not finite after step {first + steps}: try a smaller train.lr or max_grad_norm"
            )
    finally:
        model.eval()
        for parameter in parameters:
            parameter.grad = None
    return Fit(sum_loss / max(steps, 1), steps, rows, tokens)


def learning_rate(spec: TrainSpec, step: int, total: int) -> float:
    """Learning rate of step number `step` (from 0) of `total`: linear warm-up, then spec.schedule."""
    warm = int(spec.warmup * total)
    if step < warm:
        return spec.lr * (step + 1) / warm
    if spec.schedule == "constant":
        return spec.lr
    done = (step - warm) / max(total - warm, 1)
    return spec.lr * (1 - done if spec.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


def distance_sq(model: nn.Module, start: Sequence[Tensor]) -> Tensor:
    """Squared L2 distance of the trained parameters from `start` (same order as model.parameters())."""
    own = [p for p in model.parameters() if p.requires_grad]
    return torch.stack([(p - s).square().sum() for p, s in zip(own, start, strict=True)]).sum()


def keeps_logits(model: nn.Module) -> bool:
    """Whether the transformers model, below an adapter or not, can leave positions out of its output head."""
    inner = getattr(model, "get_base_model", None)
    return "logits_to_keep" in inspect.signature((inner() if inner else model).forward).parameters


def optimizer_for(parameters: list[nn.Parameter], spec: TrainSpec) -> torch.optim.Optimizer:
    """A fresh optimiser as the recipe asks for."""
    if spec.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=spec.lr, weight_decay=spec.weight_decay)
    kind = torch.optim.AdamW if spec.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, lr=spec.lr, weight_decay=spec.weight_decay)


def _padded(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Tokens (B, T) and attention mask (B, T)."""
    width = max(len(example.input_ids) for example in examples)
    input_ids = torch.zeros(len(examples), width, dtype=torch.long)
    mask = torch.zeros(len(examples), width, dtype=torch.long)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[row, :length] = torch.tensor(example.input_ids)
        mask[row, :length] = 1
    return input_ids, mask


def _backward(
    model: nn.Module, examples: list[Example], spec: TrainSpec, objective: Loss, device: torch.device
) -> tuple[float, int]:
    """Gradients of the batch's loss, in `accumulation` parts weighted by their learnt tokens."""
    if spec.accumulation == 1:
        parts = [collate(examples, device)]
    else:
        size = math.ceil(len(examples) / spec.accumulation)
        parts = [collate(examples[i : i + size], device) for i in range(0, len(examples), size)]
    counts = [part.num_learnt for part in parts]
    whole, value = sum(counts), 0.0
    for part, count in zip(parts, counts, strict=True):
        with torch.autocast(device.type, torch.bfloat16, enabled=spec.autocast == "bfloat16"):
            part_loss = objective(model, part)
        if len(parts) > 1:
            part_loss = part_loss * (count / whole)
        part_loss.backward()  # type: ignore[no-untyped-call]
        value += float(part_loss.detach())
    return value, whole
