"""Passes through one part of a cut model, for cost forecasts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from kilofed.federation.workload import Pass, PassKind, logits
from kilofed.models.halves import Halves, width

PartName = Literal["below", "above", "between", "head"]
"""Below the cut; above it; above it without the head; only the head."""


@dataclass(frozen=True)
class PartOfModel(PassKind):
    """A batch through one part of a model that is cut between two blocks."""

    cut: int
    """Blocks below the cut."""
    part: PartName

    def prepare(self, model: nn.Module, one: Pass) -> Callable[[], Tensor]:
        halves = Halves(model, self.cut)
        if self.part == "head":  # The type of a block's output is known once one has run.
            self._run(halves, Pass(1, 1, min(one.kept, 1)))
        return lambda: self._run(halves, one)

    def _run(self, halves: Halves, one: Pass) -> Tensor:
        model = halves.model
        ids = torch.zeros(one.rows, one.width, dtype=torch.long)
        mask = torch.ones_like(ids)
        if self.part == "below":
            return halves.below(ids, mask)
        dtype = next(model.parameters()).dtype
        hidden = torch.zeros(one.rows, one.width, width(model), dtype=dtype).requires_grad_(one.learns)
        if self.part == "between":
            return halves.between(hidden, mask)
        with halves.from_last(hidden) if self.part == "head" else halves.from_cut(hidden):
            return logits(model, ids, mask, one.kept)

    def loss(self, out: Tensor, one: Pass) -> Tensor:
        """The gradient of hidden states comes from the other side; the sum's gradient stands in for it."""
        return out.sum() if self.part in ("below", "between") else super().loss(out, one)
