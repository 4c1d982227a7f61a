"""FedAvgM: momentum on the server (Hsu et al. 2019, arXiv:1909.06335)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Interval
from torch import Tensor

from kilofed.federation import server_optimizers
from kilofed.federation.parties import Server
from kilofed.methods.fedavg import FedAvg


@dataclass(frozen=True)
class FedAvgM(FedAvg):
    """FedAvg whose mean update enters a momentum."""

    server_lr: Annotated[float, Ge(0)] = 1.0
    """Step along the momentum."""
    momentum: Annotated[float, Interval(ge=0, lt=1)] = 0.9
    """Share of the past that is kept; 0 with server_lr 1 is FedAvg."""

    def server_step(self, server: Server, mean: dict[str, Tensor]) -> Mapping[str, Tensor]:
        return server_optimizers.momentum(server.state, mean, lr=self.server_lr, beta=self.momentum)
