"""Distillation losses: forward and reverse KL to a teacher's full or top-k distribution, and top-k scores as few bytes.

Shapes: N positions, V tokens of the vocabulary, K tokens kept of a position. Soft targets with temperature T and the
factor T^2: Hinton et al. 2015, arXiv:1503.02531, section 2.1. No gradient reaches the teacher.

With the top K tokens of a teacher, the probability of all other tokens is one more bucket, and is compared with the
student's probability of the same tokens. That is the KL of two coarser distributions: at most the full KL, 0 where both
are equal, and the full KL for K = V.
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

MIN_LOG_PROB = -60.0
"""Lower bound of log-probabilities; keeps a reverse KL finite where the teacher gives a token probability 0."""
NO_MASS = -128
"""The int8 code of a bucket with probability 0."""
STEPS = 254
"""Steps between the smallest and the largest int8 code in use, -127 to 127."""


@dataclass(frozen=True)
class TopK:
    """A teacher's top-k tokens at N positions."""

    ids_NK: Tensor
    """Token ids, distinct at each position; int64."""
    log_probs_NK: Tensor
    """Their log-probabilities over the whole vocabulary, float32."""
    rest_N: Tensor
    """Log-probability of all other tokens together; -inf where there are none."""
    vocab_size: int
    """V."""
    temperature: float = 1.0
    """Temperature of the log-probabilities."""

    @property
    def k(self) -> int:
        """K."""
        return int(self.ids_NK.shape[1])


def top_k(logits_NV: Tensor, k: int, temperature: float = 1.0) -> TopK:
    """The top `k` tokens of full logits; all tokens if `k` is above V. Detached."""
    log_probs_NV = _log_softmax(logits_NV.detach(), temperature)
    kept = log_probs_NV.topk(min(k, log_probs_NV.shape[1]), dim=1)
    rest_NV = log_probs_NV.scatter(1, kept.indices, -math.inf)
    return TopK(kept.indices, kept.values, rest_NV.logsumexp(1), log_probs_NV.shape[1], temperature)


def spread(teacher: TopK) -> Tensor:
    """Log-probabilities (N, V) that share the rest equally among the tokens outside the top k."""
    num_others = teacher.vocab_size - teacher.k
    each_N = teacher.rest_N - math.log(num_others) if num_others else teacher.rest_N
    return each_N[:, None].repeat(1, teacher.vocab_size).scatter(1, teacher.ids_NK, teacher.log_probs_NK)


def forward_kl(teacher: Tensor | TopK, student_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student) at each position, in nats; mode-covering.

    Args:
        teacher: logits (N, V), or their top k.
        student_NV: logits.
        temperature: T, divides both logits; the factor T^2 keeps the scale of the gradient. Above 0.

    Returns:
        (N,), at least 0.

    Raises:
        ModelError: the vocabularies, numbers of positions or temperatures differ.
    """
    log_p, log_q = _buckets(teacher, student_NV, temperature)
    return temperature**2 * (log_p.exp() * (log_p.clamp(min=MIN_LOG_PROB) - log_q.clamp(min=MIN_LOG_PROB))).sum(1)


def reverse_kl(teacher: Tensor | TopK, student_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(student || teacher) at each position, in nats; mode-seeking.

    Arguments, result and errors as in `forward_kl`. The teacher's probabilities are at least exp(MIN_LOG_PROB).
    """
    log_p, log_q = _buckets(teacher, student_NV, temperature)
    return temperature**2 * (log_q.exp() * (log_q.clamp(min=MIN_LOG_PROB) - log_p.clamp(min=MIN_LOG_PROB))).sum(1)


KL = {"forward": forward_kl, "reverse": reverse_kl}
"""Both by the name of their direction."""


def entropy(scores: Tensor | TopK) -> Tensor:
    """Entropy at each position in nats, (N,); the rest of a TopK counts as one token."""
    if isinstance(scores, TopK):
        log_p = torch.cat([scores.log_probs_NK, scores.rest_N[:, None]], 1)
    else:
        log_p = _log_softmax(scores, 1.0)
    return -(log_p.exp() * log_p.clamp(min=MIN_LOG_PROB)).sum(1)


def pack(teacher: TopK, packing: Packing) -> dict[str, Tensor]:
    """Encode the scores in few bytes: token ids in the smallest integer type, log-probabilities in `packing`.

    int8 codes are scaled per position between the smallest and the largest log-probability kept, so the error is at most
    half a step, (largest - smallest) / 508. float16 rounds to 11 significant bits.
    """
    ids = {"ids": teacher.ids_NK.to(id_dtype(teacher.vocab_size))}
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


def unpack(packed: Mapping[str, Tensor], vocab_size: int, temperature: float = 1.0) -> TopK:
    """Decode the scores of `pack` and renormalize them to sum to 1, which rounding had changed slightly.

    Raises:
        ModelError: `packed` is not a result of `pack`.
    """
    names = {"ids", "values", "scales"} if _dtype_of(packed, "values") == torch.int8 else {"ids", "values"}
    if packed.keys() != names:
        raise ModelError(f"packed teacher scores are {sorted(packed)[:8]}; expected {sorted(names)} of `losses.pack`")
    ids_NK, values, num = packed["ids"], packed["values"], len(packed["values"])
    _check_ids(ids_NK, vocab_size)
    wrong = ids_NK.shape[0] != num or values.shape != (num, ids_NK.shape[1] + 1)
    if wrong or values.dtype not in (torch.int8, torch.float16):
        raise ModelError(
            f"packed teacher scores are invalid: ids {tuple(ids_NK.shape)} and values {values.dtype} "
            f"{tuple(values.shape)}; expected a result of `losses.pack`"
        )
    numbers = _scaled(values, packed["scales"]) if values.dtype == torch.int8 else values.float()
    # The largest of a row with a NaN is NaN, that of a row without any probability -inf.
    if not bool(numbers.amax(1).isfinite().all()):
        raise ModelError(
            "packed teacher scores are invalid: NaN, infinite or all 0; expected a result of `losses.pack`"
        )
    log_probs = numbers.log_softmax(1)
    return TopK(ids_NK.long(), log_probs[:, :-1], log_probs[:, -1], vocab_size, temperature)


def check_tokens(ids_NK: Tensor, vocab_size: int) -> None:
    """Raise ValueError unless ids are of the type that V needs, below V, and distinct at each position."""
    expected = id_dtype(vocab_size)
    if ids_NK.dtype != expected or ids_NK.dim() != 2:
        raise ValueError(
            f"token ids are {ids_NK.dtype} {tuple(ids_NK.shape)}; expected {expected} (positions, tokens)"
        )
    if ids_NK.numel() and not (int(ids_NK.min()) >= 0 and int(ids_NK.max()) < vocab_size):
        raise ValueError(
            f"token ids from {int(ids_NK.min())} to {int(ids_NK.max())}; expected ids from 0, and below {vocab_size}"
        )
    ordered = ids_NK.sort(1).values
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        raise ValueError("a token id comes twice at a position; expected distinct ones")


def id_dtype(vocab_size: int) -> torch.dtype:
    """The smaller integer type for token ids below `vocab_size`."""
    return torch.int16 if vocab_size <= 2**15 else torch.int32


def _check_ids(ids_NK: Tensor, vocab_size: int) -> None:
    try:
        check_tokens(ids_NK, vocab_size)
    except ValueError as error:
        raise ModelError(f"packed teacher scores are invalid ({error}); expected a result of `losses.pack`") from error


def _dtype_of(packed: Mapping[str, Tensor], name: str) -> torch.dtype | None:
    return packed[name].dtype if name in packed else None


def _scaled(codes: Tensor, scales: Tensor) -> Tensor:
    """(N, K + 1) float32 from int8 codes and (N, 2) scales. Raises ModelError: scales that `pack` does not write."""
    if scales.dtype != torch.float32 or scales.shape != (len(codes), 2) or not bool(scales.isfinite().all()):
        raise ModelError(
            f"packed teacher scores are invalid: scales {scales.dtype} {tuple(scales.shape)}; expected finite float32 "
            f"{(len(codes), 2)}"
        )
    low, high = scales[:, :1], scales[:, 1:]
    if bool((low > high).any()):
        raise ModelError("packed teacher scores are invalid: a smallest score above the largest; expected the reverse")
    step = ((high - low) / STEPS).clamp(min=1e-12)
    numbers = (codes.float() + STEPS / 2) * step + low
    return numbers.masked_fill(codes == NO_MASS, -math.inf)


def _buckets(teacher: Tensor | TopK, student_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of teacher and student over the same buckets: all tokens, or the top k and the rest."""
    log_q = _log_softmax(student_NV, temperature)
    if isinstance(teacher, Tensor):
        if teacher.shape != student_NV.shape:
            raise ModelError(
                f"the teacher's logits are {tuple(teacher.shape)} (positions, tokens), the student's "
                f"{tuple(student_NV.shape)}; "
                "use one tokeniser and the same rows for both"
            )
        return _log_softmax(teacher.detach(), temperature), log_q
    if (len(teacher.ids_NK), teacher.vocab_size) != tuple(student_NV.shape):
        raise ModelError(
            f"the teacher's scores are {(len(teacher.ids_NK), teacher.vocab_size)} (positions, tokens), the student's "
            f"{tuple(student_NV.shape)}; use one tokeniser and the same rows for both"
        )
    if teacher.temperature != temperature:
        raise ModelError(
            f"the teacher's scores are at temperature {teacher.temperature:g}, the loss is at {temperature:g}; "
            "use one temperature for both"
        )
    best_NK, kept_NK = teacher.log_probs_NK.detach(), log_q.gather(1, teacher.ids_NK)
    if teacher.k == teacher.vocab_size:
        return best_NK, kept_NK
    others_N = log_q.scatter(1, teacher.ids_NK, -math.inf).logsumexp(1)
    return torch.cat([best_NK, teacher.rest_N.detach()[:, None]], 1), torch.cat([kept_NK, others_N[:, None]], 1)


def _log_softmax(logits_NV: Tensor, temperature: float) -> Tensor:
    return (logits_NV.float() / temperature).log_softmax(1)
