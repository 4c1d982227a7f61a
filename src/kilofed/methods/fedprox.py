"""FedProx: local training is pulled back to the round's start (Li et al. 2020, arXiv:1812.06127, equation 2)."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge
from torch import Tensor, nn

from kilofed.methods.fedavg import FedAvg
from kilofed.models import training


@dataclass(frozen=True)
class FedProx(FedAvg):
    """FedAvg with a proximal term in the local loss."""

    mu: Annotated[float, Ge(0)] = 0.01
    """Strength of the pull towards the round's start; 0 is FedAvg."""

    def objective(self, model: nn.Module) -> training.Loss:
        start = [p.detach().clone() for p in model.parameters() if p.requires_grad]

        def pulled(model: nn.Module, batch: training.Batch) -> Tensor:
            return training.loss(model, batch) + self.mu / 2 * training.distance_sq(model, start)

        return pulled
