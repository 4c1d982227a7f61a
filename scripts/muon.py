"""Muon: momentum whose matrix steps are made nearly orthogonal (Keller Jordan et al. 2024).

Differs from the usual code: fp32 throughout, since bf16 products are slow on processors without bf16 units.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised steps, for the matrices between embedding and head."""

    def __init__(self, matrices: Iterable[Tensor], *, lr: float, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take one step; matrices of one shape are orthogonalised together."""
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for matrix in group["params"]:
                buffer = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
                buffer.lerp_(matrix.grad, 1 - group["momentum"])
                shapes[tuple(matrix.shape)].append((matrix, matrix.grad.lerp(buffer, group["momentum"])))
            for (rows, columns), pairs in shapes.items():
                steps = orthogonalise(torch.stack([direction for _, direction in pairs]))
                for (matrix, _), step in zip(pairs, steps, strict=True):
                    matrix.add_(step, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def orthogonalise(x_NRC: Tensor, num_steps: int = 5) -> Tensor:
    """Push the singular values of each matrix towards 1 (Newton-Schulz)."""
    tall = x_NRC.shape[1] > x_NRC.shape[2]
    x = x_NRC.mT if tall else x_NRC
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(num_steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x
