"""Speculative decoding of a proxy: the small tuned model runs ahead, the others check several tokens in one forward.

Leviathan et al. 2023 (arXiv:2211.17192), algorithm 1, with the joint scores as the target. The drafted tokens' logits
of the tuned model are part of those scores, so they are kept and not computed twice.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kilofed.generation.decoding import Sampling, Token, as_token, probabilities
from kilofed.proxy.logit_sources import ForwardInputs, LogitSource


class JointModel(Protocol):
    """What speculation needs of a large model that small ones steer."""

    @property
    def large_source(self) -> LogitSource:
        """The large model."""

    @property
    def context(self) -> int:
        """Longest sequence in tokens."""

    @property
    def end_ids(self) -> Collection[int]:
        """Tokens that end an answer."""

    @property
    def width(self) -> int:
        """Width of the logits."""

    @property
    def cost_ratio(self) -> float:
        """Cost of a forward of the small tuned model, in forwards of the large one."""

    def separate(self) -> tuple[LogitSource, LogitSource | None]:
        """The small tuned model and its base, each with a cache of its own."""

    def joint_logits(self, large: Tensor, tuned: Tensor, base: Tensor | None = None) -> Tensor:
        """The logits of the whole, from those of its parts, each (..., width)."""


@dataclass(frozen=True)
class Drafting:
    """How far the small tuned model runs ahead."""

    longest: int = 8
    """Most tokens drafted at once; 0 drafts none. Each drafted token costs one step of the small tuned model."""
    shortest: int = 1
    """Fewest tokens drafted; equal to `longest` for a fixed length. Between them, the length follows the share of
    drafts that were accepted so far and the models' sizes, never the clock: equal seeds give equal tokens."""
    slope: float = 0.3
    """What one more position adds to the cost of a forward, in forwards of one position; raising it drafts less.
    0.3 is about what a CPU takes in float32; a GPU takes less."""


class CachedSource:
    """One logit source on one growing text: only new tokens are computed, and rejected ones are cropped from its cache."""

    def __init__(self, source: LogitSource) -> None:
        self.source = source
        self._cache = source.new_cache()
        self._seen = 0

    def logits(self, ids: Sequence[int], keep: int) -> Tensor:
        """Logits after each of the last `keep` of `ids`, (keep, width); ids that are in the cache are not read again."""
        new = torch.tensor([list(ids[self._seen :])])
        positions = torch.arange(self._seen, len(ids))[None]
        (logits,) = self.source.logits(ForwardInputs(new, position_ids=positions, keep=keep), self._cache)
        self._seen = len(ids)
        return logits[0]

    def crop(self, length: int) -> None:
        """Keep the first `length` ids; fewer may have been seen."""
        if length < self._seen:
            self._cache.crop(length - self._seen)
            self._seen = length


class Speculation:
    """One answer of a proxy, drafted by its small tuned model; the distribution is that of the plain loop.

    Attributes:
        num_drafted: tokens that were drafted and checked.
        num_accepted: those of them that stood.
        num_cycles: forwards of the large model.
    """

    def __init__(self, proxy: JointModel, sampling: Sampling, drafting: Drafting) -> None:
        self._proxy, self._sampling, self._drafting = proxy, sampling, drafting
        tuned, base = proxy.separate()
        self._large, self._tuned = CachedSource(proxy.large_source), CachedSource(tuned)
        self._base = CachedSource(base) if base is not None else None
        self._cost = proxy.cost_ratio
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self.num_drafted = self.num_accepted = self.num_cycles = 0

    def tokens(self, prompt_ids: Sequence[int]) -> Iterator[Token]:
        """See TokenGenerator.generate_tokens."""
        ids = list(prompt_ids)
        room = min(self._sampling.max_new_tokens, self._proxy.context - len(ids))
        while room > 0:
            for token in self._cycle(ids, min(self._draft_length(), room - 1)):
                ids.append(token.id)
                room -= 1
                yield token
                if token.id in self._proxy.end_ids:
                    return

    @torch.inference_mode()
    def _cycle(self, ids: list[int], num_drafts: int) -> list[Token]:
        """The next tokens, at least one: the drafted ones that stand, and one of the joint model's own."""
        drafted, tuned_GV = self._draft(ids, num_drafts)
        whole = ids + drafted
        large = self._large.logits(whole, len(drafted) + 1)
        base = self._base.logits(whole, len(drafted) + 1) if self._base else None
        self.num_cycles += 1
        if not drafted:
            tuned_GV = self._tuned.logits(whole, 1)
        targets_GV = self._proxy.joint_logits(
            large[: len(tuned_GV)], tuned_GV, base[: len(tuned_GV)] if base is not None else None
        )
        tokens = self._verify(drafted, targets_GV, tuned_GV)
        all_stand = bool(drafted) and [token.id for token in tokens] == drafted
        if all_stand and drafted[-1] not in self._proxy.end_ids:
            # All stand. The tuned model has not read the last of them yet; its next draft needs that step anyway.
            last = self._proxy.joint_logits(
                large[-1:], self._tuned.logits(whole, 1), base[-1:] if base is not None else None
            )
            tokens.append(self._token(last[0], self._sample(last[0])))
        for source in (self._large, self._tuned, self._base):
            if source is not None:
                source.crop(len(ids) + len(tokens) - 1)
        return tokens

    def _draft(self, ids: list[int], num_drafts: int) -> tuple[list[int], Tensor]:
        """Tokens that the tuned model would say, and its logits before each of them, (G, width)."""
        drafted: list[int] = []
        logits: list[Tensor] = []
        while len(drafted) < num_drafts:
            logits.append(self._tuned.logits(ids + drafted, 1)[..., : self._proxy.width])
            drafted.append(self._sample(logits[-1][0]))
            if drafted[-1] in self._proxy.end_ids:
                break
        return drafted, torch.cat(logits) if logits else torch.empty(0)

    def _verify(self, drafted: list[int], targets_GV: Tensor, tuned_GV: Tensor) -> list[Token]:
        """The drafted tokens up to the first that falls, and what is drawn in its place."""
        if not drafted:
            return [self._token(targets_GV[0], self._sample(targets_GV[0]))]
        tokens = []
        for target_V, tuned_V, draft in zip(targets_GV, tuned_GV, drafted, strict=True):
            chosen = self._accept(target_V, tuned_V, draft)
            tokens.append(self._token(target_V, chosen))
            self.num_drafted += 1
            if chosen != draft:
                break
            self.num_accepted += 1
        return tokens

    def _accept(self, target_V: Tensor, tuned_V: Tensor, draft: int) -> int:
        if self._sampling.temperature == 0:
            return int(target_V.argmax())
        p_V, q_V = probabilities(target_V.cpu(), self._sampling), probabilities(tuned_V.cpu(), self._sampling)
        return accept_or_resample(p_V, q_V, draft, self._generator)

    def _sample(self, logits_V: Tensor) -> int:
        if self._sampling.temperature == 0:
            return int(logits_V.argmax())
        return int(torch.multinomial(probabilities(logits_V.cpu(), self._sampling), 1, generator=self._generator))

    def _token(self, logits_V: Tensor, chosen: int) -> Token:
        return as_token(logits_V.cpu(), chosen, self._sampling.num_logprobs)

    def _draft_length(self) -> int:
        """The draft length with the most tokens per cost, were every draft accepted as often as so far."""
        # Two drafts of which one stood are known before the first.
        accepted = (self.num_accepted + 1) / (self.num_drafted + 2)
        lengths = range(self._drafting.shortest, self._drafting.longest + 1)
        return max(lengths, key=lambda length: tokens_per_cost(accepted, length, self._cost, self._drafting.slope))


def accept_or_resample(p_V: Tensor, q_V: Tensor, draft: int, generator: torch.Generator) -> int:
    """`draft`, drawn from q, or another token instead, such that the result is distributed as p.

    It stands with probability min(1, p/q); else one is drawn from what p has more of than q, max(0, p - q) normalised.

    Args:
        p_V: (V,) the target's distribution.
        q_V: (V,) the draft's distribution.
        draft: a token with q above 0.
        generator: on the CPU.
    """
    if float(torch.rand((), generator=generator)) * float(q_V[draft]) < float(p_V[draft]):
        return draft
    more_V = (p_V - q_V).clamp(min=0)
    if not bool(more_V.any()):
        return draft  # The two differ by rounding alone.
    return int(torch.multinomial(more_V, 1, generator=generator))


def tokens_per_cost(accepted: float, length: int, cost: float, slope: float) -> float:
    """Expected tokens per cycle over its cost in single-position forwards of the large model.

    Args:
        accepted: probability that a drafted token stands, 0 to 1 (below 1).
        length: tokens drafted.
        cost: small model's forward over the large model's, of one position.
        slope: see Drafting.
    """
    tokens = (1 - accepted ** (length + 1)) / (1 - accepted)
    return tokens / ((1 + cost) * (1 + slope * length) + cost * (length + accepted**length))
