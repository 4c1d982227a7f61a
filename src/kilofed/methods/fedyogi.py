"""FedYogi: Yogi on the server (Reddi et al. 2021, arXiv:2003.00295, algorithm 2)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Interval
from torch import Tensor

from kilofed.federation import server_optimizers
from kilofed.federation.parties import Server
from kilofed.methods.fedavg import FedAvg


@dataclass(frozen=True)
class FedYogi(FedAvg):
    """FedAvg with adaptive server steps; the second moment is additive, so that it falls slowly."""

    server_lr: Annotated[float, Ge(0)] = 0.01
    """Step size in units of the update's own scale."""
    beta1: Annotated[float, Interval(ge=0, lt=1)] = 0.9
    """Share of the past in the first moment."""
    beta2: Annotated[float, Interval(ge=0, lt=1)] = 0.99
    """Share of the past in the second moment."""
    tau: Annotated[float, Gt(0)] = 1e-3
    """Degree of adaptivity; larger is closer to FedAvgM."""

    def server_step(self, server: Server, mean: dict[str, Tensor]) -> Mapping[str, Tensor]:
        def second(v: Tensor, square: Tensor) -> Tensor:
            return v - (1 - self.beta2) * square * (v - square).sign()

        return server_optimizers.adaptive(
            server.state, mean, lr=self.server_lr, beta=self.beta1, tau=self.tau, second=second
        )
