"""Rules that steer a large model's next-token scores with small ones: proxy-tuning, DExperts, DeRa, CombLM.

Shapes: V vocabulary; every tensor of scores is (..., V), raw logits before temperature, and so is what a rule returns.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from kilofed.errors import RecipeError

HIDDEN = 32
"""Width of the net in `EntropyMix`."""
LEAST_LOGPROB = -1e4
"""Stands for minus infinity where it is multiplied by a probability of 0."""
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
    """log((1 - weight) softmax(large) + weight softmax(small)) (Ormazabal et al. 2023, arXiv:2305.16876, equation 1).

    Args:
        weight: share of the small model, 0 to 1 (the paper's 1 - lambda); a number or one per position, (...).
    """
    share = torch.as_tensor(weight, dtype=torch.float32, device=large.device).unsqueeze(-1)
    parts = torch.stack([(1 - share).log() + large.log_softmax(-1), share.log() + small.log_softmax(-1)])
    return parts.logsumexp(0)


def complete(seen: Tensor, base: Tensor) -> Tensor:
    """Log-probabilities of all tokens from those of the likeliest: what is left is shared as the small base shares it.

    With p the probability that the seen tokens leave over, an unseen token gets p times the base's probability among
    the unseen ones, but never more than the least likely seen token has, for then it would have been among them; what is
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


@dataclass(frozen=True)
class Difference:
    """Proxy-tuning, or DExperts: see `combine`."""

    alpha: float = 1.0
    """Strength of the offset; 0 is the large model alone, raising it follows the small tuned model further."""

    @property
    def needs_base(self) -> bool:
        """Always."""
        return True

    def __call__(self, large: Tensor, tuned: Tensor, base: Tensor) -> Tensor:
        """See `combine`."""
        return combine(large, tuned, base, self.alpha)


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
    """Share of the small tuned model, 0 to 1; 0 is the large model alone."""

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise RecipeError(f"the share of the small model is {self.weight}; it must be from 0 to 1")

    @property
    def needs_base(self) -> bool:
        """Never."""
        return False

    def __call__(self, large: Tensor, tuned: Tensor, base: Tensor) -> Tensor:
        """See `mix`."""
        return mix(large, tuned, self.weight)


class EntropyMix:
    """CombLM with a learnt weight: a small net sees both models' entropies and first probabilities, per token.

    Ormazabal et al. 2023, section 2.2, `entropy`: the weight is a function of a few numbers of the two distributions,
    fitted on about a hundred texts; `kilofed.proxy.fitting` does that.

    Args:
        tensors: what `tensors` gave; None draws new ones from `seed`.
    """

    needs_base = False

    def __init__(self, tensors: Mapping[str, Tensor] | None = None, *, seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Linear(4, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))
        if tensors is not None:
            self.net.load_state_dict(dict(tensors))
        self.net.requires_grad_(False)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The net's parameters by name."""
        return {name: tensor.clone() for name, tensor in self.net.state_dict().items()}

    def weight(self, features: Tensor) -> Tensor:
        """Share of the small tuned model at each position, 0 to 1: (...), from `mix_features` of (..., 4)."""
        return torch.sigmoid(self.net(features).squeeze(-1))

    def __call__(self, large: Tensor, tuned: Tensor, base: Tensor) -> Tensor:
        """See `mix`."""
        # The net is small and stays on the CPU, wherever the models are.
        return mix(large, tuned, self.weight(mix_features(large, tuned).cpu()))


def mix_features(large: Tensor, tuned: Tensor) -> Tensor:
    """Of the large and of the tuned model, entropy (nats, over 10) and the first probability: (..., 4)."""
    parts = []
    for logits in (large, tuned):
        log_p = logits.float().log_softmax(-1)
        parts += [-(log_p.exp() * log_p.clamp(min=LEAST_LOGPROB)).sum(-1) / 10, log_p.amax(-1).exp()]
    return torch.stack(parts, -1)
