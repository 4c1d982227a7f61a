"""FedAvg over any set of trained tensors: LoRA factors (FedIT, FedLLM) or every parameter.

McMahan et al. 2017, arXiv:1602.05629, algorithm 1; with LoRA factors Zhang et al. 2023, arXiv:2305.05644.
Differs from the papers: a run's schedule and epochs go on from round to round; the optimiser starts afresh.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from torch import Tensor, nn

from kilofed.config.fields import FormerName
from kilofed.federation import wire
from kilofed.federation.cohort import Cohort
from kilofed.federation.method import Method, on_client
from kilofed.federation.parties import Client, Server
from kilofed.federation.workload import Costs, LocalTraining, Message, RunPreview
from kilofed.models import loading, training
from kilofed.payload import Payload, Scalar


@dataclass(frozen=True)
class FedAvg(Method):
    """Clients train what they are sent; the server takes the weighted mean."""

    client_weighting: Annotated[Literal["examples", "uniform"], FormerName("weights")] = "examples"
    """examples: a client counts by the examples it trained on; uniform: all count alike."""
    wire: Literal["float32", "bfloat16"] = "float32"
    """Dtype on the wire; bfloat16 halves the bytes."""

    def setup(self, server: Server) -> None:
        server.state.update(loading.read_trained(server.model))

    def round(self, server: Server, clients: Cohort) -> Mapping[str, Scalar]:
        message = self.message(server.state)
        reply = clients.mean("fit", message.ask, message.reply)
        server.state.update(self.server_step(server, wire.arrive(server.state, reply.tensors)))
        return dict(reply.scalars)

    def message(self, state: Mapping[str, Tensor]) -> Message:
        """What every client is sent, and what its reply is like."""
        ask = Payload(wire.down(state, self.wire))
        end = wire.up(wire.shared(state), ask.tensors, self.wire)
        return Message("fit", "mean", ask, Payload(end, {"weight": 1, "train_loss": 0.0}))

    def server_step(self, server: Server, mean: dict[str, Tensor]) -> Mapping[str, Tensor]:
        """What enters `server.state`, given the mean of the clients' trained tensors."""
        return mean

    @on_client
    def fit(self, client: Client, ask: Payload) -> Payload:
        """Train from what was sent; reply with the trained tensors."""
        loading.write_trained(client.model, ask.tensors)
        done = client.fit_round(self.objective(client.model))
        weight = done.num_examples if self.client_weighting == "examples" else 1
        end = wire.up(loading.read_trained(client.model), ask.tensors, self.wire)
        return Payload(end, {"weight": weight, "train_loss": done.loss})

    def objective(self, model: nn.Module) -> training.Loss:
        """What local training minimises; `model` holds the round's start."""
        return training.loss

    def deliver(self, server: Server) -> nn.Module:
        loading.write_trained(server.model, wire.shared(server.state))
        return server.model

    def costs(self) -> Costs:
        return LocalTraining()

    def messages(self, preview: RunPreview) -> Mapping[int, Sequence[Message]]:
        return preview.alike(self.message(preview.server.state))
