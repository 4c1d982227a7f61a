"""Fit the weights of CombLM's mixtures on rows (Ormazabal et al. 2023, arXiv:2305.16876).

Of a position only what the loss depends on is kept, six numbers, so that no vocabulary is ever held for all rows.
N tokens, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kilofed.data.examples import IGNORED, Example
from kilofed.models import training
from kilofed.proxy.combination import EntropyMix, Mix, mix_features

BATCH = 16
"""Rows per forward."""
LEARNING_RATE = 2e-3
"""Of Adam, as in CombLM's code."""


class Observed(NamedTuple):
    """What two models say of one text."""

    features: Tensor
    """(N, 4), `mix_features`."""
    log_p: Tensor
    """(N, 2) log-probability of the token that came, under the large and the tuned model."""


@torch.no_grad()
def observe(large: nn.Module, tuned: nn.Module, rows: Sequence[Example], vocabulary: int | None) -> list[Observed]:
    """What both models say of the learnt tokens of each row, on the CPU; rows without any are left out.

    Args:
        vocabulary: width that logits are cut to; None leaves them.
    """
    found = []
    for start in range(0, len(rows), BATCH):
        batch = training.collate_tokens(rows[start : start + BATCH])
        scores = []
        for model in (large, tuned):
            device = next(model.parameters()).device
            scores.append(training.token_logits(model, batch.to(device))[0][:, :vocabulary].cpu())
        counts = (batch.targets_BT != IGNORED).sum(1).tolist()
        parts = [torch.split(part, counts) for part in (*scores, batch.targets_N)]
        found += [observed(*text) for text in zip(*parts, strict=True) if len(text[2])]
    return found


def observed(large: Tensor, tuned: Tensor, targets: Tensor) -> Observed:
    """From logits (N, V) of both models and the tokens that came, (N,)."""
    chosen = [part.log_softmax(-1).gather(-1, targets[:, None])[:, 0] for part in (large, tuned)]
    return Observed(mix_features(large, tuned), torch.stack(chosen, -1))


def fit_constant(texts: Sequence[Observed], *, grid: int = 100) -> Mix:
    """The constant share of the small model that has the least loss.

    Args:
        texts: at least one.
        grid: number of steps between 0 and 1 that are tried, both ends too.
    """
    log_p = torch.cat([text.log_p for text in texts])
    weights = torch.linspace(0, 1, grid + 1)
    losses = torch.stack([_loss(log_p, weight.expand(len(log_p))) for weight in weights])
    return Mix(float(weights[losses.argmin()]))


def fit_entropy_mix(texts: Sequence[Observed], *, epochs: int, seed: int) -> EntropyMix:
    """Learn `EntropyMix` by Adam, one text per step.

    Args:
        texts: at least one.
        epochs: passes over the texts; more fit them closer.
        seed: of the net's first weights.
    """
    rule = EntropyMix(seed=seed)
    rule.net.requires_grad_(True)
    optimizer = torch.optim.Adam(rule.net.parameters(), lr=LEARNING_RATE)
    with torch.enable_grad():
        for _ in range(epochs):
            for text in texts:
                _loss(text.log_p, rule.weight(text.features)).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    rule.net.requires_grad_(False)
    return rule


def _loss(log_p: Tensor, weight: Tensor) -> Tensor:
    """Mean negative log-probability of the mixture, nats; `weight` (N,) is the small model's share."""
    shares = torch.stack([1 - weight, weight], -1)
    return -(shares.clamp(min=1e-12).log() + log_p).logsumexp(-1).mean()
