"""Whether steering a large model with a small one is likely to pay, from a few steps of training and a few rows.

Proxy-tuning pays where the large model is already better at the text and tuning is a light shift; where tuning teaches
a new format or label set, the small model's offset carries everything and the large one adds nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kilofed.config.recipe import TrainSpec
from kilofed.data.examples import Example
from kilofed.models import loading, training
from kilofed.proxy.combination import Difference, Rule

STEPS = 30
"""Optimiser steps of the trial."""
BATCH = 16
"""Rows per step of the trial, as several clients see together, and per forward."""


@dataclass(frozen=True)
class ProxyParts:
    """A large model, a small tuned one and the small one before tuning."""

    large: nn.Module
    tuned: nn.Module
    base: nn.Module | None = None
    """None: it lies under the adapter of `tuned`."""
    vocabulary: int | None = None
    """Width that logits are cut to; None leaves them."""


@dataclass(frozen=True)
class Trial:
    """Held-out losses in nats per token before anything is trained, and after a short trial of the small model."""

    large: float
    small: float
    tuned: float
    """The small model after the trial."""
    steered: float
    """The large model, steered by the small one after the trial."""

    @property
    def gain(self) -> float:
        """How much the steered model is below the small one after the trial; what a run would add to."""
        return self.tuned - self.steered

    @property
    def pays(self) -> bool:
        """Whether the steered model beats its parts in the trial."""
        return self.steered < min(self.tuned, self.large)

    @property
    def sentence(self) -> str:
        """The losses and the verdict."""
        seen = (
            f"after {STEPS} steps of the small model, held-out loss: steered large {self.steered:.3f}, small tuned "
            f"{self.tuned:.3f}, large alone {self.large:.3f}, small alone {self.small:.3f}"
        )
        if self.pays:
            return f"{seen}: steering is likely to pay"
        if self.steered < self.tuned:
            return f"{seen}: the large model alone is as good, steering adds nothing: try a smaller method.alpha"
        return (
            f"{seen}: steering is NOT likely to pay, use the small model (method=fedavg) or tune the large one itself"
        )


def run_trial(
    parts: ProxyParts,
    rows: Sequence[Example],
    held_out: Sequence[Example],
    spec: TrainSpec,
    *,
    rule: Callable[[], Rule],
    order: Callable[[str], torch.Generator],
) -> Trial:
    """Train the small model for STEPS steps, score, and put it back as it was.

    Args:
        rows: what the trial trains on.
        held_out: what it is scored on.
        spec: how clients will train.
        rule: how scores become one, called once the small model is trained.
        order: the random stream of a name.
    """
    start = loading.read_trained(parts.tuned)
    before = sweep(parts, held_out, {0.0: Difference(0.0)})
    trial = replace(
        spec, steps=STEPS, epochs=0, batch_size=max(spec.batch_size, BATCH), schedule="constant", warmup=0.0
    )
    batches = training.batches(rows, trial, first=0, count=STEPS, order=order)
    try:
        training.fit(parts.tuned, batches, trial, first=0, total=STEPS, dropout=order("dropout"))
        after = sweep(parts, held_out, {1.0: rule()})
    finally:
        loading.write_trained(parts.tuned, start)
    return Trial(before[0.0], before.tuned, after.tuned, after[1.0])


class Sweep(dict[float, float]):
    """Losses of the steered model by strength, and that of the small tuned model alone, nats per token."""

    tuned: float = 0.0


@torch.inference_mode()
def sweep(parts: ProxyParts, rows: Sequence[Example], rules: Mapping[float, Rule]) -> Sweep:
    """Score the rule of every strength of steering on `rows` with one forward of each model."""
    found, count = Sweep(dict.fromkeys(rules, 0.0)), 0
    for start in range(0, len(rows), BATCH):
        batch = training.collate_tokens(rows[start : start + BATCH])
        large, tuned = _scores(parts.large, batch, parts.vocabulary), _scores(parts.tuned, batch, parts.vocabulary)
        if parts.base is not None:
            base = _scores(parts.base, batch, parts.vocabulary)
        else:
            with loading.without_adapter(parts.tuned) as untouched:
                base = _scores(untouched, batch, parts.vocabulary)
        targets = batch.targets_N
        for alpha, rule in rules.items():
            found[alpha] += _sum_loss(rule(large, tuned, base), targets)
        found.tuned += _sum_loss(tuned, targets)
        count += len(targets)
    whole = Sweep({alpha: total / max(count, 1) for alpha, total in found.items()})
    whole.tuned = found.tuned / max(count, 1)
    return whole


def _sum_loss(scores: Tensor, targets: Tensor) -> float:
    return float(nn.functional.cross_entropy(scores, targets, reduction="sum"))


def _scores(model: nn.Module, batch: training.TokenBatch, vocabulary: int | None) -> Tensor:
    """Logits (N, V) of the learnt tokens on the CPU."""
    device = next(model.parameters()).device
    return training.token_logits(model, batch.to(device))[0][:, :vocabulary].cpu()
