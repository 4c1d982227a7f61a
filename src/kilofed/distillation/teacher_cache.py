"""What a teacher says of rows, kept in few bytes, and what a student minimises to say the same.

Shapes as in `kilofed.distillation.losses`. A row's lesson is the teacher's scores at the tokens that the row has to learn.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kilofed.data.examples import Example
from kilofed.distillation import losses
from kilofed.distillation.losses import Direction, Packing, TopK
from kilofed.models import training

ASKED = 16
"""Rows that a teacher is asked about in one forward."""
Key = tuple[int, ...]
"""A row's tokens."""


class Lessons:
    """Packed scores by row.

    Args:
        num_words: V of the teacher.
        temperature: at which its scores are taken.
        packing: how they are kept.
    """

    def __init__(self, num_words: int, *, temperature: float = 1.0, packing: Packing = "float16") -> None:
        self.num_words, self.temperature, self._packing = num_words, temperature, packing
        self._kept: dict[Key, Mapping[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def num_bytes(self) -> int:
        """Bytes that they take."""
        return sum(t.numel() * t.element_size() for packed in self._kept.values() for t in packed.values())

    def keep(self, row: Example, scores: TopK) -> None:
        """Put away what the teacher says of `row`, one position per learnt token."""
        self._kept[tuple(row.input_ids)] = losses.pack(scores, self._packing)

    def of(self, batch: training.TokenBatch) -> TopK:
        """What the teacher says of the learnt tokens of `batch`, row by row; raises KeyError for a row it never saw."""
        lengths = batch.attention_mask.sum(1).tolist()
        keys = [tuple(row[:length].tolist()) for row, length in zip(batch.input_ids, lengths, strict=True)]
        found = [losses.unpack(self._kept[key], self.num_words, self.temperature) for key in keys]
        device = batch.input_ids.device
        return TopK(
            torch.cat([one.ids_NK for one in found]).to(device),
            torch.cat([one.log_probs_NK for one in found]).to(device),
            torch.cat([one.rest_N for one in found]).to(device),
            self.num_words,
            self.temperature,
        )


@torch.no_grad()
def ask(
    teacher: nn.Module, rows: Sequence[Example], *, k: int, temperature: float = 1.0, batch_size: int = ASKED
) -> Lessons:
    """What `teacher` says of the learnt tokens of `rows`; no graph is made.

    Args:
        k: scores kept per token; 0 keeps all.
        batch_size: rows per forward.
    """
    device = next(teacher.parameters()).device
    every = list({tuple(row.input_ids): row for row in rows}.values())
    every.sort(key=lambda row: len(row.input_ids))
    lessons: Lessons | None = None
    for start in range(0, len(every), batch_size):
        part = every[start : start + batch_size]
        logits_NV, _ = training.token_logits(teacher, training.collate_tokens(part, device))
        lessons = lessons or Lessons(logits_NV.shape[1], temperature=temperature)
        scores = losses.top_k(logits_NV, k or logits_NV.shape[1], temperature)
        counts = [training.collate_tokens([row]).num_learnt for row in part]
        for row, *own in zip(part, *(torch.split(t.cpu(), counts) for t in _tensors(scores)), strict=True):
            lessons.keep(row, TopK(own[0], own[1], own[2], scores.num_words, temperature))
    return lessons or Lessons(0, temperature=temperature)


def objective(lessons: Lessons, *, direction: Direction, own_answers: float = 0.0) -> training.Loss:
    """What a student minimises: the mean KL to the lessons, mixed with the cross entropy of the rows' own answers.

    The student's logits are cut to the teacher's words: what lies beyond is padding of the embedding.

    Args:
        own_answers: weight of the cross entropy, 0 to 1; the KL has the rest.
    """

    def loss(student: nn.Module, batch: training.Batch) -> Tensor:
        assert isinstance(batch, training.TokenBatch)
        logits_NV, targets_N = training.token_logits(student, batch)
        logits_NV = logits_NV[:, : lessons.num_words]
        value = losses.KL[direction](lessons.of(batch), logits_NV, lessons.temperature).mean()
        if not own_answers:
            return value
        return (1 - own_answers) * value + own_answers * nn.functional.cross_entropy(logits_NV, targets_N)

    return loss


def _tensors(scores: TopK) -> tuple[Tensor, Tensor, Tensor]:
    return scores.ids_NK, scores.log_probs_NK, scores.rest_N
