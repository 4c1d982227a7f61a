"""Local training: losses, the training loop, optimiser and schedule; nothing federated."""

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
    """Rows for next-token prediction, padded on the right: B rows, T tokens in the longest."""

    input_ids: Tensor
    """(B, T), 0 at the padding."""
    attention_mask: Tensor
    """(B, T), 1 at tokens and 0 at the padding."""
    labels: Tensor
    """(B, T), the token itself if it is a target, else IGNORED."""

    @property
    def targets_BT(self) -> Tensor:
        """(B, T - 1): the target of each position but the last, or IGNORED."""
        return self.labels[:, 1:]

    @property
    def targets_N(self) -> Tensor:
        """(N,): the targets, row by row."""
        return self.targets_BT[self.targets_BT != IGNORED]

    @property
    def positions_K(self) -> Tensor:
        """(K,): positions that have a target in at least one row."""
        return (self.targets_BT != IGNORED).any(dim=0).nonzero()[:, 0]

    @property
    def num_targets(self) -> int:
        """N: number of targets, over which the loss is the mean."""
        return int((self.targets_BT != IGNORED).sum())

    def to(self, device: str | torch.device) -> "TokenBatch":
        """The same rows on `device`."""
        return TokenBatch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))


@dataclass(frozen=True)
class ClassBatch:
    """Rows for classification, padded on the right: B rows, T tokens in the longest."""

    input_ids: Tensor
    """(B, T), 0 at the padding."""
    attention_mask: Tensor
    """(B, T), 1 at tokens and 0 at the padding."""
    classes: Tensor
    """(B,), index of each row's class, IGNORED if unknown."""

    @property
    def num_targets(self) -> int:
        """Number of rows that have a class, over which the loss is the mean."""
        return int((self.classes != IGNORED).sum())

    def to(self, device: str | torch.device) -> "ClassBatch":
        """The same rows on `device`."""
        return ClassBatch(self.input_ids.to(device), self.attention_mask.to(device), self.classes.to(device))


Batch = TokenBatch | ClassBatch


@dataclass(frozen=True)
class Fit:
    """Result of a training loop."""

    loss: float
    """Mean training loss over the steps, nats per token."""
    num_steps: int
    num_examples: int
    num_tokens: int
    """Number of target tokens."""


Loss = Callable[[nn.Module, Batch], Tensor]


def collate(examples: Sequence[Example], device: str | torch.device = "cpu") -> Batch:
    """A ClassBatch of examples with classes, else a TokenBatch; all examples have to be of one kind."""
    return collate_tokens(examples, device) if examples[0].label is None else collate_classes(examples, device)


def collate_tokens(examples: Sequence[Example], device: str | torch.device = "cpu") -> TokenBatch:
    """Pad on the right to the longest example; padding is masked and has no target."""
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
    """Logits (N, V), float32, at the positions that have a target, and targets (N,), row by row."""
    # Positions without a target skip the output head, which is most of the work of a small model.
    positions_K = batch.positions_K
    options = {"logits_to_keep": positions_K} if keeps_logits(model) else {}
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **options).logits
    logits_BKV = logits if options else logits[:, positions_K]
    targets_BK = batch.targets_BT[:, positions_K]
    has_target = targets_BK != IGNORED
    return logits_BKV[has_target].float(), targets_BK[has_target]


def token_losses(model: nn.Module, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Cross entropy (nats) and whether the top-1 prediction is correct, one entry per target."""
    logits_NV, targets_N = token_logits(model, batch)
    losses = nn.functional.cross_entropy(logits_NV, targets_N, reduction="none")
    return losses, logits_NV.argmax(-1) == targets_N


def class_logits(model: nn.Module, batch: ClassBatch) -> Tensor:
    """Logits (B, C) of a model that classifies rows, float32."""
    out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    return cast(Tensor, out.logits).float()


def class_losses(model: nn.Module, batch: ClassBatch) -> tuple[Tensor, Tensor]:
    """Cross entropy (nats) and whether the top-1 prediction is correct, one entry per row that has a class."""
    has_target = batch.classes != IGNORED
    logits_NC, targets_N = class_logits(model, batch)[has_target], batch.classes[has_target]
    return nn.functional.cross_entropy(logits_NC, targets_N, reduction="none"), logits_NC.argmax(-1) == targets_N


def losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """`token_losses` of a TokenBatch, `class_losses` of a ClassBatch."""
    return token_losses(model, batch) if isinstance(batch, TokenBatch) else class_losses(model, batch)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross entropy over target tokens, or over rows that have classes, in nats."""
    return losses(model, batch)[0].mean()


def num_steps(spec: TrainSpec, num_examples: int) -> int:
    """Optimiser steps per round for a client with `num_examples` rows."""
    if spec.epochs:
        return spec.epochs * math.ceil(num_examples / spec.batch_size)
    return spec.steps


def num_seen(spec: TrainSpec, num_examples: int) -> int:
    """The most examples, counted as often as they come, that a client with `num_examples` rows trains on in a round."""
    if spec.epochs:
        return spec.epochs * num_examples
    return spec.steps * min(spec.batch_size, num_examples)


def batches(
    examples: Sequence[Example], spec: TrainSpec, *, first: int, count: int, order: Callable[[str], torch.Generator]
) -> Iterator[list[Example]]:
    """Batches number `first` to `first + count - 1` of an endless sequence of shuffled epochs.

    The sequence is a pure function of `order`, which makes the random generator of a name, so any part of it can be
    repeated; every example occurs once per epoch.
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
    """One client's training in round `round` (from 1) of `num_rounds`; schedule and epochs continue across rounds."""
    steps = num_steps(spec, len(examples))
    first = (round - 1) * steps
    own = batches(examples, spec, first=first, count=steps, order=order)
    return fit(model, own, spec, first=first, total=steps * num_rounds, dropout=dropout, objective=objective)


def fit(
    model: nn.Module,
    batches: Iterator[list[Example]],
    spec: TrainSpec,
    *,
    first: int,
    total: int,
    dropout: torch.Generator,
    objective: Loss = loss,
) -> Fit:
    """Train the parameters that require gradients, one optimiser step per batch, with a new optimiser.

    Args:
        batches: examples of each step.
        first: number of the first step in the whole run, for the schedule.
        total: steps in the whole run.
        dropout: random generator for dropout.
        objective: the loss to minimise; (model, batch) to a scalar.

    Raises:
        NonFiniteLoss: a loss is NaN or infinite, and the model keeps the weights of the previous step; or a weight is
            after the last step.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    optimizer = optimizer_for(parameters, spec)
    sum_loss, steps, rows, tokens = 0.0, 0, 0, 0
    model.train()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(dropout.initial_seed())
            for step, examples in enumerate(batches, first):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(spec, step, total)
                value, has_target = _backward(model, examples, spec, objective, device)
                if not math.isfinite(value):
                    raise NonFiniteLoss(
                        f"the loss is {value} at step {step + 1}; lower train.lr or train.max_grad_norm"
                    )
                if spec.max_grad_norm:
                    nn.utils.clip_grad_norm_(parameters, spec.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                sum_loss, steps, rows, tokens = sum_loss + value, steps + 1, rows + len(examples), tokens + has_target
        # No later loss would show that the last step failed.
        if not all(bool(p.isfinite().all()) for p in parameters):
            raise NonFiniteLoss(
                f"the weights are not finite after step {first + steps}; lower train.lr or train.max_grad_norm"
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
    """Whether the transformers model, with or without an adapter, takes `logits_to_keep`."""
    inner = getattr(model, "get_base_model", None)
    return "logits_to_keep" in inspect.signature((inner() if inner else model).forward).parameters


def optimizer_for(parameters: list[nn.Parameter], spec: TrainSpec) -> torch.optim.Optimizer:
    """A new optimiser of the kind in the recipe."""
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
    """Gradients of the batch's loss, in `accumulation` micro-batches weighted by their number of targets."""
    if spec.accumulation == 1:
        micro_batches = [collate(examples, device)]
    else:
        size = math.ceil(len(examples) / spec.accumulation)
        micro_batches = [collate(examples[i : i + size], device) for i in range(0, len(examples), size)]
    counts = [micro_batch.num_targets for micro_batch in micro_batches]
    total, value = sum(counts), 0.0
    for micro_batch, count in zip(micro_batches, counts, strict=True):
        with torch.autocast(device.type, torch.bfloat16, enabled=spec.autocast == "bfloat16"):
            micro_loss = objective(model, micro_batch)
        if len(micro_batches) > 1:
            micro_loss = micro_loss * (count / total)
        micro_loss.backward()  # type: ignore[no-untyped-call]
        value += float(micro_loss.detach())
    return value, total
