"""A teacher's scores of rows, cached in few bytes, and the distillation loss of a student that uses them.

Shapes as in `kilofed.distillation.losses`. Scores are kept at the target tokens of each row.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kilofed.data.examples import Example
from kilofed.distillation import losses
from kilofed.distillation.losses import Direction, Packing, TopK
from kilofed.models import training

BATCH_SIZE = 16
"""Rows per forward of the teacher."""
Key = tuple[int, ...]
"""A row's token ids."""


class TeacherCache:
    """A teacher's packed scores by row.

    Args:
        vocab_size: V of the teacher.
        temperature: of the scores.
        packing: format of the log-probabilities.
    """

    def __init__(self, vocab_size: int, *, temperature: float = 1.0, packing: Packing = "float16") -> None:
        self.vocab_size, self.temperature, self._packing = vocab_size, temperature, packing
        self._kept: dict[Key, Mapping[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def num_bytes(self) -> int:
        """Bytes of all scores."""
        return sum(t.numel() * t.element_size() for packed in self._kept.values() for t in packed.values())

    def add(self, row: Example, scores: TopK) -> None:
        """Cache the scores of `row`, one position per target token."""
        self._kept[tuple(row.input_ids)] = losses.pack(scores, self._packing)

    def scores(self, batch: training.TokenBatch) -> TopK:
        """The teacher's scores at the target tokens of `batch`, row by row. Raises KeyError: a row is not cached."""
        lengths = batch.attention_mask.sum(1).tolist()
        keys = [tuple(row[:length].tolist()) for row, length in zip(batch.input_ids, lengths, strict=True)]
        unpacked = [losses.unpack(self._kept[key], self.vocab_size, self.temperature) for key in keys]
        device = batch.input_ids.device
        return TopK(
            torch.cat([one.ids_NK for one in unpacked]).to(device),
            torch.cat([one.log_probs_NK for one in unpacked]).to(device),
            torch.cat([one.rest_N for one in unpacked]).to(device),
            self.vocab_size,
            self.temperature,
        )


@torch.no_grad()
def score(
    teacher: nn.Module, rows: Sequence[Example], *, k: int, temperature: float = 1.0, batch_size: int = BATCH_SIZE
) -> TeacherCache:
    """Score the target tokens of `rows` with `teacher`, without gradients.

    Args:
        k: tokens kept per position; 0 keeps all.
        batch_size: rows per forward.
    """
    device = next(teacher.parameters()).device
    unique = list({tuple(row.input_ids): row for row in rows}.values())
    unique.sort(key=lambda row: len(row.input_ids))
    cache: TeacherCache | None = None
    for start in range(0, len(unique), batch_size):
        batch_rows = unique[start : start + batch_size]
        logits_NV, _ = training.token_logits(teacher, training.collate_tokens(batch_rows, device))
        cache = cache or TeacherCache(logits_NV.shape[1], temperature=temperature)
        scores = losses.top_k(logits_NV, k or logits_NV.shape[1], temperature)
        counts = [training.collate_tokens([row]).num_targets for row in batch_rows]
        for row, *own in zip(batch_rows, *(torch.split(t.cpu(), counts) for t in _tensors(scores)), strict=True):
            cache.add(row, TopK(own[0], own[1], own[2], scores.vocab_size, temperature))
    return cache or TeacherCache(0, temperature=temperature)


def objective(cache: TeacherCache, *, direction: Direction, own_answers: float = 0.0) -> training.Loss:
    """A student's loss: mean KL to the teacher's scores, mixed with the cross entropy of the rows' targets.

    The student's logits are truncated to the teacher's vocabulary: the others are padding of the embedding.

    Args:
        own_answers: weight of the cross entropy, 0 to 1; the KL has weight 1 - own_answers.
    """

    def loss(student: nn.Module, batch: training.Batch) -> Tensor:
        assert isinstance(batch, training.TokenBatch)
        logits_NV, targets_N = training.token_logits(student, batch)
        logits_NV = logits_NV[:, : cache.vocab_size]
        value = losses.KL[direction](cache.scores(batch), logits_NV, cache.temperature).mean()
        if not own_answers:
            return value
        return (1 - own_answers) * value + own_answers * nn.functional.cross_entropy(logits_NV, targets_N)

    return loss


def _tensors(scores: TopK) -> tuple[Tensor, Tensor, Tensor]:
    return scores.ids_NK, scores.log_probs_NK, scores.rest_N
