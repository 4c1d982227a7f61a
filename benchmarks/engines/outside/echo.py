"""A method whose clients do nothing: what is left is the cost of asking them."""

from collections.abc import Mapping
from dataclasses import dataclass

from kilofed.federation.cohort import Cohort
from kilofed.federation.method import Method, on_client
from kilofed.federation.parties import Client, Server
from kilofed.models import loading
from kilofed.payload import Payload, Scalar


@dataclass(frozen=True)
class Echo(Method):
    """Clients send back the tensors that they were sent."""

    fresh: bool = False
    """Send copies of them, one by one, as training would leave them."""

    def setup(self, server: Server) -> None:
        server.state.update(loading.read_trained(server.model))

    def round(self, server: Server, clients: Cohort) -> Mapping[str, Scalar]:
        like = Payload(server.state, {"weight": 1, "train_loss": 0.5})
        reply = clients.mean("echo", Payload(server.state), like)
        server.state.update(reply.tensors)
        return dict(reply.scalars)

    @on_client
    def echo(self, client: Client, ask: Payload) -> Payload:
        """What came goes back."""
        tensors = {name: tensor.clone() for name, tensor in ask.tensors.items()} if self.fresh else ask.tensors
        return Payload(tensors, {"weight": 1, "train_loss": 0.5})
