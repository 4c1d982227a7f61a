"""Rules that steer a large model's next-token scores with small ones: proxy-tuning, DExperts, DeRa, CombLM.

Shapes: V vocabulary; every tensor of scores is (..., V), raw logits before temperature, and so is what a rule returns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from kilofed.errors import RecipeError

LEAST_LEFT = 1e-9
"""Least probability that is left for unseen tokens: rounding must not rule them out."""
MOST_SHARINGS = 16
"""Times that what is above the least likely seen token is shared again; few are needed."""


class Rule(Protocol):
    """How the scores of the models become one."""

    @property
    def needs_base(self) -> bool:
        """Whether the untuned small model has a say."""

    def __call__(self, large: Tensor, tuned: Tensor, base: Tensor) -> Tensor:
        """Scores of the joint model; `base` is ignored where the rule does not need it."""


def combine(large: Tensor, tuned: Tensor, base: Tensor, alpha: float) -> Tensor:
    """large + alpha (tuned - base) on raw logits (Liu et al. 2024, arXiv:2401.08565, equation 1).

    DExperts is the same sum with the language model as `large`, the expert as `tuned` and the anti-expert as `base`
    (Liu et al. 2021, arXiv:2105.03023, equation 1).

    Args:
        large: (..., V), the large model's logits.
        tuned: (..., V), those of the small tuned model.
        base: (..., V), those of the small model as it was.
        alpha: 0 is the large model alone.
    """
    return large + alpha * (tuned - base)


def realign(reference: Tensor, aligned: Tensor, weight: float) -> Tensor:
    """weight aligned + (1 - weight) reference on raw logits (Liu et al. 2024, arXiv:2402.02992, equation 11).

    Args:
        weight: lambda; 0 is the reference, 1 the aligned model, above 1 goes beyond it.
    """
    return combine(reference, aligned, reference, weight)


def mix(large: Tensor, small: Tensor, weight: Tensor | float) -> Tensor:
    """log(weight softmax(large) + (1 - weight) softmax(small)) (Ormazabal et al. 2023, arXiv:2305.16876, equation 1).

    Args:
        weight: share of the large model, 0 to 1; a number or one per position, (...).
    """
    share = torch.as_tensor(weight, dtype=torch.float32, device=large.device).unsqueeze(-1)
    parts = torch.stack([share.log() + large.log_softmax(-1), (1 - share).log() + small.log_softmax(-1)])
    return parts.logsumexp(0)


def complete(seen: Tensor, base: Tensor) -> Tensor:
    """Log-probabilities of all tokens from those of the likeliest: what is left is shared as the small base shares it.

    With p the probability that the seen tokens leave over, an unseen token gets p times the base's probability among
    the unseen ones, but never more than the least likely seen token has, for then it would have been told; what is
    above goes to the other unseen tokens in the same proportions. Where all tokens are seen nothing is shared, and the
    result is `seen` itself.

    Args:
        seen: (..., V) the large model's log-probabilities of its likeliest tokens, -inf at all others.
        base: (..., V) the small base model's logits.
    """
    unseen = seen.isneginf()
    least = seen.masked_fill(unseen, torch.inf).amin(-1, keepdim=True)
    left = 1 - seen.logsumexp(-1, keepdim=True).exp()
    full = torch.zeros_like(unseen)
    for _ in range(MOST_SHARINGS):
        rest = (left - full.sum(-1, keepdim=True) * least.exp()).clamp(min=LEAST_LEFT).log()
        shared = rest + base.masked_fill(~unseen | full, -torch.inf).log_softmax(-1)
        above = (shared > least) & unseen & ~full
        full = full | above
        if not bool(above.any()):
            break
    return torch.where(unseen, torch.where(full, least, shared), seen)


def nucleus(scores: Tensor, top_p: float) -> Tensor:
    """`scores` with -inf outside the smallest set of tokens that holds `top_p` of the probability.

    DExperts takes the nucleus of the language model before the offset; sampling takes that of the joint model.
    """
    if top_p >= 1:
        return scores
    order = scores.argsort(dim=-1, descending=True, stable=True)
    sorted_p = scores.gather(-1, order).softmax(-1)
    # The token that crosses the line is inside: what counts is the mass before it.
    outside = (sorted_p.cumsum(-1) - sorted_p) >= top_p
    return scores.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -torch.inf)


@dataclass(frozen=True)
class Difference:
    """Proxy-tuning, or DExperts: `combine`, on the nucleus of the large model where that is asked for."""

    alpha: float = 1.0
    """Strength of the offset; 0 is the large model alone, raising it follows the small tuned model further."""
    nucleus: float = 1.0
    """Tokens outside this share of the large model's own probability are ruled out first; 1 rules out none."""

    @property
    def needs_base(self) -> bool:
        """Always."""
        return True

    def __call__(self, large: Tensor, tuned: Tensor, base: Tensor) -> Tensor:
        """See `combine`."""
        return combine(nucleus(large, self.nucleus), tuned, base, self.alpha)


@dataclass(frozen=True)
class Realign:
    """DeRa: `realign` between a reference (the large model) and its aligned version (the tuned model)."""

    weight: float = 1.0
    """lambda: 0 is the reference, 1 the aligned model, above 1 goes beyond it."""

    @property
    def needs_base(self) -> bool:
        """Never: the reference stands in for the base."""
        return False

    def __call__(self, large: Tensor, tuned: Tensor, base: Tensor) -> Tensor:
        """See `realign`."""
        return realign(large, tuned, self.weight)


@dataclass(frozen=True)
class Mix:
    """CombLM with a constant weight: `mix` of the large and the small tuned model's probabilities."""

    weight: float = 0.5
    """Share of the large model, 0 to 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise RecipeError(f"the share of the large model is {self.weight}; it must be from 0 to 1")

    @property
    def needs_base(self) -> bool:
        """Never."""
        return False

    def __call__(self, large: Tensor, tuned: Tensor, base: Tensor) -> Tensor:
        """See `mix`."""
        return mix(large, tuned, self.weight)


class EntropyMix(nn.Module):
    """CombLM with a learnt weight: a small net sees both models' entropies and first probabilities, per token.

    Ormazabal et al. 2023, section 2.2, `entropy`: the share of the large model is a function of a few numbers of the
    two distributions, fitted on about a hundred texts. `fit_mix` does that.
    """

    needs_base = False

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def share(self, large: Tensor, tuned: Tensor) -> Tensor:
        """Share of the large model at each position, 0 to 1: (...)."""
        return torch.sigmoid(self.net(torch.cat([_summary(large), _summary(tuned)], -1)).squeeze(-1))

    def forward(self, large: Tensor, tuned: Tensor, base: Tensor) -> Tensor:
        """See `mix`."""
        return mix(large, tuned, self.share(large, tuned))


def fit_constant(large: Tensor, tuned: Tensor, targets: Tensor, *, grid: int = 100) -> Mix:
    """The constant share of the large model that has the least loss on a validation set.

    Args:
        large: (N, V) logits of the large model at N positions.
        tuned: (N, V) those of the small tuned model.
        targets: (N,) the tokens that came.
        grid: number of steps between 0 and 1 that are tried, both ends too.
    """
    right = targets.unsqueeze(-1)
    p_large = large.log_softmax(-1).gather(-1, right).exp()
    p_tuned = tuned.log_softmax(-1).gather(-1, right).exp()
    shares = torch.linspace(0, 1, grid + 1, device=large.device)
    losses = -(shares * p_large + (1 - shares) * p_tuned).log().mean(0)
    return Mix(float(shares[losses.argmin()]))


def fit_mix(
    large: Sequence[Tensor], tuned: Sequence[Tensor], targets: Sequence[Tensor], *, epochs: int = 1, seed: int = 0
) -> EntropyMix:
    """Learn `EntropyMix` on a validation set: Adam at 2e-3, one document per step, as in CombLM's code.

    Args:
        large: per document, (N_i, V) logits of the large model.
        tuned: per document, (N_i, V) those of the small tuned model.
        targets: per document, (N_i,) the tokens that came.
        epochs: passes over the documents; more fit the validation set closer.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rule = EntropyMix().to(large[0].device)
    optimizer = torch.optim.Adam(rule.parameters(), lr=2e-3)
    with torch.enable_grad():
        for _ in range(epochs):
            for one_large, one_tuned, one_target in zip(large, tuned, targets, strict=True):
                scores = rule(one_large.detach(), one_tuned.detach(), one_tuned)
                nn.functional.nll_loss(scores, one_target).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    return rule.requires_grad_(False).eval()


def _summary(logits: Tensor) -> Tensor:
    """Entropy (nats, over 10) and the first probability of each position: (..., 2)."""
    log_p = logits.float().log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return torch.stack([entropy / 10, log_p.amax(-1).exp()], -1)
