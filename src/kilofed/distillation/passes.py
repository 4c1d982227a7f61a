"""Passes that score positions or distil from scores, for cost forecasts."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kilofed.distillation import ensemble, losses
from kilofed.federation.workload import Pass, PassKind


@dataclass(frozen=True)
class Distilled(PassKind):
    """A batch that is scored, or trained on a teacher's scores."""

    num_tokens: int
    """Top-k of the scores; 0 for targets without a teacher."""

    def loss(self, out: Tensor, one: Pass) -> Tensor:
        if not self.num_tokens:
            return super().loss(out, one)
        flat = out.reshape(-1, out.shape[-1]).float().clone()
        num, k = len(flat), min(self.num_tokens, flat.shape[1])
        tokens = torch.zeros(num, k, dtype=torch.long)
        if not one.learns:
            return ensemble.to_buckets((flat / 2.0).log_softmax(1), tokens)
        teacher = losses.TopK(tokens, torch.zeros(num, k), torch.zeros(num), flat.shape[1], 2.0)
        return losses.forward_kl(teacher, flat, 2.0).mean()
