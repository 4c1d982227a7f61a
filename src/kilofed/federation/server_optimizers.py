"""Server optimisers: the mean update of a round taken as a gradient (Reddi et al. 2021, arXiv:2003.00295, algorithm 2)."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kilofed.federation.wire import SERVER, shared

Second = Callable[[Tensor, Tensor], Tensor]
"""(second moment, squared update) to the new second moment."""


def momentum(state: Mapping[str, Tensor], mean: Mapping[str, Tensor], *, lr: float, beta: float) -> dict[str, Tensor]:
    """FedAvgM (Hsu et al. 2019, arXiv:1909.06335): v = beta v + update, x += lr v; new tensors and moments by name."""
    out: dict[str, Tensor] = {}
    for name, x in shared(state).items():
        key = f"{SERVER}momentum.{name}"
        v = beta * state.get(key, torch.zeros_like(x)) + (mean[name] - x)
        # With lr 1 and no past this is the mean itself; adding the difference would round.
        out[name] = mean[name] if lr == 1 and beta == 0 else x + lr * v
        out[key] = v
    return out


def adaptive(
    state: Mapping[str, Tensor], mean: Mapping[str, Tensor], *, lr: float, beta: float, tau: float, second: Second
) -> dict[str, Tensor]:
    """FedAdam and FedYogi: x += lr m / (sqrt(v) + tau), without bias correction; v starts at tau squared."""
    out: dict[str, Tensor] = {}
    for name, x in shared(state).items():
        first_key, second_key = f"{SERVER}first.{name}", f"{SERVER}second.{name}"
        update = mean[name] - x
        m = beta * state.get(first_key, torch.zeros_like(x)) + (1 - beta) * update
        v = second(state.get(second_key, torch.full_like(x, tau**2)), update.square())
        out |= {name: x + lr * m / (v.sqrt() + tau), first_key: m, second_key: v}
    return out
