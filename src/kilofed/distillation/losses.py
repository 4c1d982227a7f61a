"""Distillation: forward and reverse KL from a teacher's scores, whole or the k best of them, packed for disk and wire.

Shapes: N positions, V words, K scores kept of a position. Soft targets with temperature and its factor T^2: Hinton et
al. 2015, arXiv:1503.02531, section 2.1. No gradient ever reaches a teacher.

Of a teacher of which only the K best are known, the mass of all other words is one more bucket: the student's mass on
the same words is compared with it, however either spreads it. That is the KL of two coarser distributions, so it is
never above the full KL, 0 where both are equal, and with K = V the full KL itself.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kilofed.errors import ModelError

Direction = Literal["forward", "reverse"]
Packing = Literal["float16", "int8"]

LEAST = -60.0
"""Log of the least probability; keeps a reverse KL finite where the teacher gives a word no mass."""
NO_MASS = -128
"""The int8 code of a bucket without mass."""
STEPS = 254
"""Steps between the least and the largest int8 code in use, -127 to 127."""


@dataclass(frozen=True)
class TopK:
    """A teacher's best words at N positions."""

    ids_NK: Tensor
    """Words, each once per position; int64."""
    log_probs_NK: Tensor
    """Their log-probabilities among all words, float32."""
    rest_N: Tensor
    """Log of the mass of all other words; -inf where there are none."""
    num_words: int
    """V."""
    temperature: float = 1.0
    """Temperature at which the log-probabilities were taken."""

    @property
    def k(self) -> int:
        """K."""
        return int(self.ids_NK.shape[1])


def top_k(logits_NV: Tensor, k: int, temperature: float = 1.0) -> TopK:
    """The `k` best words of full scores; `k` above V takes all. No gradient flows back."""
    log_probs_NV = _log_softmax(logits_NV.detach(), temperature)
    kept = log_probs_NV.topk(min(k, log_probs_NV.shape[1]), dim=1)
    rest_NV = log_probs_NV.scatter(1, kept.indices, -math.inf)
    return TopK(kept.indices, kept.values, rest_NV.logsumexp(1), log_probs_NV.shape[1], temperature)


def from_log_probs(ids_NK: Tensor, log_probs_NK: Tensor, num_words: int) -> TopK:
    """The scores that an API gives, log-probabilities at temperature 1; the rest is what they leave of 1.

    Rounded log-probabilities can sum to a little more than 1: then the rest has no mass.
    """
    log_probs_NK = log_probs_NK.detach().float()
    left_N = (1 - log_probs_NK.double().exp().sum(1)).clamp(min=0)
    return TopK(ids_NK.long(), log_probs_NK, left_N.log().float(), num_words)


def spread(teacher: TopK) -> Tensor:
    """Log-probabilities of all words, (N, V): each word that is not among the best gets an equal part of the rest."""
    num_others = teacher.num_words - teacher.k
    each_N = teacher.rest_N - math.log(num_others) if num_others else teacher.rest_N
    return each_N[:, None].repeat(1, teacher.num_words).scatter(1, teacher.ids_NK, teacher.log_probs_NK)


def forward_kl(teacher: Tensor | TopK, student_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student) at each position, in nats: the student covers all that the teacher might say.

    Args:
        teacher: logits (N, V), or the best of them.
        student_NV: logits.
        temperature: divides both; the factor T^2 keeps the size of the gradient. Above 0.

    Returns:
        (N,), at least 0.

    Raises:
        ModelError: other vocabularies, other numbers of positions, or scores taken at another temperature.
    """
    log_p, log_q = _buckets(teacher, student_NV, temperature)
    return temperature**2 * (log_p.exp() * (log_p.clamp(min=LEAST) - log_q.clamp(min=LEAST))).sum(1)


def reverse_kl(teacher: Tensor | TopK, student_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(student || teacher) at each position, in nats: the student says only what the teacher might say.

    Arguments, result and errors as in `forward_kl`. A teacher's probability counts as at least exp(LEAST).
    """
    log_p, log_q = _buckets(teacher, student_NV, temperature)
    return temperature**2 * (log_q.exp() * (log_q.clamp(min=LEAST) - log_p.clamp(min=LEAST))).sum(1)


KL = {"forward": forward_kl, "reverse": reverse_kl}
"""The two by the name of their direction."""


def entropy(scores: Tensor | TopK) -> Tensor:
    """Entropy at each position in nats, (N,); the rest of a TopK counts as one word."""
    if isinstance(scores, TopK):
        log_p = torch.cat([scores.log_probs_NK, scores.rest_N[:, None]], 1)
    else:
        log_p = _log_softmax(scores, 1.0)
    return -(log_p.exp() * log_p.clamp(min=LEAST)).sum(1)


def pack(teacher: TopK, packing: Packing) -> dict[str, Tensor]:
    """The scores as few bytes: word numbers in the narrowest integers, log-probabilities in `packing`.

    int8 codes are scaled per position between the least and the largest log-probability kept, so the error is at most
    half a step, (largest - least) / 508. float16 rounds each value to 11 binary digits.
    """
    narrow = torch.int16 if teacher.num_words <= 2**15 else torch.int32
    ids = {"ids": teacher.ids_NK.to(narrow)}
    values = torch.cat([teacher.log_probs_NK, teacher.rest_N[:, None]], 1)
    if packing == "float16":
        return {**ids, "values": values.clamp(min=-65504.0).where(values.isfinite(), values).half()}
    massless = values == -math.inf
    low = values.masked_fill(massless, math.inf).amin(1, keepdim=True)
    high = values.amax(1, keepdim=True)
    step = ((high - low) / STEPS).clamp(min=1e-12)
    codes = ((values.masked_fill(massless, 0) - low) / step - STEPS / 2).round().clamp(-127, 127)
    codes = codes.masked_fill(massless, NO_MASS).to(torch.int8)
    return {**ids, "values": codes, "scales": torch.cat([low, high], 1)}


def unpack(packed: Mapping[str, Tensor], num_words: int, temperature: float = 1.0) -> TopK:
    """The scores that `pack` wrote, made to sum to 1 again: rounding had moved them a little.

    Raises:
        ModelError: not what `pack` writes.
    """
    try:
        ids, values = packed["ids"].long(), packed["values"]
        if values.dtype is torch.int8:
            scales = packed["scales"].float()
            low, high = scales[:, :1], scales[:, 1:]
            step = ((high - low) / STEPS).clamp(min=1e-12)
            numbers = (values.float() + STEPS / 2) * step + low
            numbers = numbers.masked_fill(values == NO_MASS, -math.inf)
        else:
            numbers = values.float()
        if numbers.shape != (len(ids), ids.shape[1] + 1) or (ids.numel() and not _within(ids, num_words)):
            raise ValueError(f"shapes {tuple(ids.shape)} and {tuple(values.shape)}, or a word not below {num_words}")
    except (KeyError, ValueError, RuntimeError, IndexError) as error:
        raise ModelError(f"these are not packed scores ({error}); expected what `distill.pack` writes") from error
    log_probs = numbers.log_softmax(1)
    return TopK(ids, log_probs[:, :-1], log_probs[:, -1], num_words, temperature)


def _within(ids: Tensor, num_words: int) -> bool:
    return bool(ids.min() >= 0) and bool(ids.max() < num_words)


def _buckets(teacher: Tensor | TopK, student_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of teacher and student over the same buckets: all words, or the best and the rest."""
    log_q = _log_softmax(student_NV, temperature)
    if isinstance(teacher, Tensor):
        if teacher.shape != student_NV.shape:
            raise ModelError(
                f"the teacher scores {tuple(teacher.shape)} (positions, words), the student {tuple(student_NV.shape)}: "
                "both need one tokeniser and the same positions"
            )
        return _log_softmax(teacher.detach(), temperature), log_q
    if (len(teacher.ids_NK), teacher.num_words) != tuple(student_NV.shape):
        raise ModelError(
            f"the teacher scores {(len(teacher.ids_NK), teacher.num_words)} (positions, words), the student "
            f"{tuple(student_NV.shape)}: both need one tokeniser and the same positions"
        )
    if teacher.temperature != temperature:
        raise ModelError(
            f"the teacher's scores were taken at temperature {teacher.temperature:g}, the loss is at {temperature:g}: "
            "take them again, or use that one"
        )
    best_NK, kept_NK = teacher.log_probs_NK.detach(), log_q.gather(1, teacher.ids_NK)
    if teacher.k == teacher.num_words:
        return best_NK, kept_NK
    others_N = log_q.scatter(1, teacher.ids_NK, -math.inf).logsumexp(1)
    return torch.cat([best_NK, teacher.rest_N.detach()[:, None]], 1), torch.cat([kept_NK, others_N[:, None]], 1)


def _log_softmax(logits_NV: Tensor, temperature: float) -> Tensor:
    return (logits_NV.float() / temperature).log_softmax(1)
