"""Scoring and learning of a teacher's scores, as passes whose cost can be foreseen."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kilofed.distillation import ensemble, losses
from kilofed.federation.workload import Pass, PassKind


@dataclass(frozen=True)
class Distilled(PassKind):
    """A batch whose positions a teacher scores, or that are scored for one."""

    num_tokens: int
    """Tokens of each position that have a score of their own, at most the vocabulary."""

    def loss(self, out: Tensor, one: Pass) -> Tensor:
        if not self.num_tokens:
            return super().loss(out, one)
        flat = out.reshape(-1, out.shape[-1]).float().clone()
        num, k = len(flat), min(self.num_tokens, flat.shape[1])
        tokens = torch.zeros(num, k, dtype=torch.long)
        if not one.learns:
            return ensemble.kept((flat / 2.0).log_softmax(1), tokens)
        teacher = losses.TopK(tokens, torch.zeros(num, k), torch.zeros(num), flat.shape[1], 2.0)
        return losses.forward_kl(teacher, flat, 2.0).mean()
