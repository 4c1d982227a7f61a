"""FedMeZO: clients train LoRA factors by zeroth-order steps, the server averages (Ling et al. 2024, arXiv:2402.05926).

Differs from the paper's code: a client's directions of one round are orthogonal (docs/seed-pool.md), weights do not
drift, and the server computes personal learning rates for any number of clients. Rates that depend on single clients'
replies (round-wise, five-round, model-diff) need `call`; frozen and random ones use `mean`.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt
from torch import Tensor

from kilofed.config.recipe import TrainSpec
from kilofed.errors import RecipeError, TooFewReplies
from kilofed.federation import wire
from kilofed.federation.cohort import Cohort
from kilofed.federation.method import on_client
from kilofed.federation.parties import Client, Server
from kilofed.federation.sums import WeightedSum
from kilofed.federation.workload import Costs, Message, RunPreview, TwoPointSteps
from kilofed.methods.fedavg import FedAvg
from kilofed.models import loading, training
from kilofed.payload import Payload, Scalar
from kilofed.zeroth import two_point
from kilofed.zeroth.directions.pool import SeedPool

LOSSES, DIFFERENCES = wire.SERVER + "losses", wire.SERVER + "differences"
FIVE = 5


@dataclass(frozen=True)
class FedMeZO(FedAvg):
    """FedAvg whose local training needs no gradients."""

    steps: Annotated[int, Ge(1)] = 30
    """Two-point steps per round and client; more drift, fewer rounds. The paper found 50 unstable late in a run."""
    batch_size: Annotated[int, Ge(1)] = 1
    """Examples per step."""
    eps: Annotated[float, Gt(0)] = 1e-3
    """Perturbation of the two-point estimate; smaller is less biased until rounding error dominates."""
    lr: Annotated[float, Ge(0)] = 1e-5
    """Learning rate of every client, or the middle of their rates."""
    rates: Literal["frozen", "random", "round-wise", "five-round", "model-diff"] = "frozen"
    """frozen: lr for all clients; random: drawn every round; round-wise, five-round: by a client's mean loss over the
    last one or five rounds; model-diff: by the distance of its update from the mean. A higher value raises the rate."""
    lr_range: Annotated[float, Ge(0)] = 5e-6
    """Personal rates lie within lr plus or minus this."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rates != "frozen" and self.lr_range > self.lr:
            raise RecipeError(f"method.lr_range is {self.lr_range}; expected at most method.lr, {self.lr}")

    def round(self, server: Server, clients: Cohort) -> Mapping[str, Scalar]:
        message = self.message(server.state)
        if self.rates == "frozen":
            reply = clients.mean("fit", message.ask, message.reply)
        elif self.rates == "random":
            reply = clients.mean("fit", self._asks(server, clients.ids, message.ask), message.reply)
        else:
            asks = self._asks(server, clients.ids, message.ask)
            replies = clients.without_outliers(clients.call("fit", asks, message.reply, check=check_sum), asks)
            reply = average(replies, clients)
            record_history(server.state, replies, reply)
        server.state.update(self.server_step(server, wire.arrive(server.state, reply.tensors)))
        return dict(reply.scalars)

    def _asks(self, server: Server, ids: list[int], ask: Payload) -> dict[int, Payload]:
        rates = self.learning_rates(server, ids)
        return {client: Payload(ask.tensors, {"lr": rates[client]}) for client in ids}

    def max_weight(self, train: TrainSpec, num_rows: int) -> float:
        return self.steps * min(self.batch_size, num_rows) if self.client_weighting == "examples" else 1

    def learning_rates(self, server: Server, ids: list[int]) -> dict[int, float]:
        """Each client's learning rate in the current round, within lr plus or minus lr_range."""
        if self.rates == "random":
            draws = torch.rand(len(ids), generator=server.rng("rates"), dtype=torch.float64) * 2 - 1
            phis = dict(zip(ids, draws.tolist(), strict=True))
        else:
            phis = relative_deviations(self._rate_signals(server.state))
        return {client: self.lr + self.lr_range * phis.get(client, 0.0) for client in ids}

    def _rate_signals(self, state: Mapping[str, Tensor]) -> dict[int, float]:
        """The quantity that sets the rates, for the clients for which it is known."""
        if self.rates == "model-diff":
            return {int(client): value for client, value in state.get(DIFFERENCES, torch.zeros(0, 2)).tolist()}
        window = FIVE if self.rates == "five-round" else 1
        table = {int(row[0]): row[1:] for row in state.get(LOSSES, torch.zeros(0, 1 + FIVE)).tolist()}
        recent = {client: [loss for loss in row[-window:] if not math.isnan(loss)] for client, row in table.items()}
        return {client: sum(losses) / window for client, losses in recent.items() if len(losses) == window}

    @on_client
    def fit(self, client: Client, ask: Payload) -> Payload:
        """Take two-point steps from the tensors that were sent; reply with the trained tensors."""
        loading.write_trained(client.model, ask.tensors)
        num_seeds = max(1024, 1 << (self.steps - 1).bit_length())
        pool = SeedPool(num_seeds, pool_key(client))
        perturbed = two_point.PerturbedModel(client.model, loading.trained(client.model), num_seeds)
        perturbed.check_eps(pool, self.eps)
        spec = replace(client.train, batch_size=self.batch_size)
        first = (client.round - 1) * self.steps
        result = two_point.take_steps(
            perturbed,
            two_point.Point((pool.at(np.zeros(num_seeds, np.float32)),)),
            range(self.steps),
            training.batches(client.data, spec, first=first, count=self.steps, order=client.order),
            two_point.StepSettings(
                self.eps, float(ask.scalars.get("lr", self.lr)), objective=self.objective(client.model)
            ),
        )
        end = {name: tensor.to("cpu", torch.float32, copy=True) for name, tensor in perturbed.weights(result.end)}
        weight = self.steps * min(self.batch_size, len(client.data)) if self.client_weighting == "examples" else 1
        return Payload(wire.up(end, ask.tensors, self.wire), {"weight": weight, "train_loss": result.loss})

    def costs(self) -> Costs:
        return TwoPointSteps(self.steps, self.batch_size)

    def messages(self, preview: RunPreview) -> Mapping[int, Sequence[Message]]:
        messages = super().messages(preview)
        if self.rates == "frozen" or not messages:
            return messages
        (one,) = next(iter(messages.values()))
        verb = "mean" if self.rates == "random" else "call"
        return preview.alike(replace(one, verb=verb, ask=Payload(one.ask.tensors, {"lr": self.lr})))


def relative_deviations(values: Mapping[int, float]) -> dict[int, float]:
    """Phi of each client: deviation from the mean over the largest deviation; all 0 if the clients are equal.

    The phis sum to 0 (Proposition 3.7 of the paper).
    """
    if not values:
        return {}
    mean = math.fsum(values.values()) / len(values)
    deviations = {client: value - mean for client, value in values.items()}
    largest = max(map(abs, deviations.values()))
    # Deviations of equal numbers are rounding error and must not be scaled up to 1.
    if largest <= 1e-12 * max(map(abs, values.values())):
        return dict.fromkeys(values, 0.0)
    return {client: value / largest for client, value in deviations.items()}


def check_sum(client: int, reply: Payload) -> None:
    """Raise PayloadError unless the reply can enter a sum."""
    WeightedSum.check(reply)


def average(replies: Mapping[int, Payload], clients: Cohort) -> Payload:
    """The weighted mean of the replies, as `Cohort.mean` would give it. Raises TooFewReplies: all weights are 0."""
    total = WeightedSum()
    for client, reply in sorted(replies.items()):
        loss = {"train_loss": reply.scalars["train_loss"]}
        total.add(Payload(reply.tensors, loss), clients.weight(client, reply.scalars["weight"]))
    if not total.weight:
        raise TooFewReplies(f"all {total.num} replies have weight 0")
    return total.mean()


def record_history(state: dict[str, Tensor], replies: Mapping[int, Payload], mean: Payload) -> None:
    """Write to the server's state each client's last five losses and its update's distance from the mean."""
    losses = {int(row[0]): row[1:] for row in state.get(LOSSES, torch.zeros(0, 1 + FIVE)).double().tolist()}
    differences = {int(client): value for client, value in state.get(DIFFERENCES, torch.zeros(0, 2)).tolist()}
    for client, reply in replies.items():
        losses[client] = [*losses.get(client, [math.nan] * FIVE)[1:], float(reply.scalars["train_loss"])]
        # Client and mean start from the same tensors, so the difference of their results is that of their updates.
        differences[client] = math.fsum(
            float((tensor.double() - mean.tensors[name].double()).norm()) for name, tensor in reply.tensors.items()
        )
    rows = [[client, *losses[client]] for client in sorted(losses)]
    state[LOSSES] = torch.tensor(rows, dtype=torch.float64)
    state[DIFFERENCES] = torch.tensor(sorted(differences.items()), dtype=torch.float64)


def pool_key(client: Client) -> int:
    """Key of the pool of this client in this round."""
    text = f"{client.seed}/{client.round}/{client.id}/fedmezo"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
