"""Split-FedLLM: clients run the first blocks, the server the others; activations up, their gradients down.

Sources: Yan et al. 2025, arXiv:2501.04436 (Split-FedLLM); Lin et al. 2024, arXiv:2407.00952 (SplitLoRA); Thapa et al.
2022, arXiv:2004.12088 (SplitFed); Vepakomma et al. 2018, arXiv:1812.00564 (labels at the client: the U-shape).
Differs: padding is not sent; optimisers are reset every round, as in every method here; if a client is lost in the
middle of a step, the server undoes that step. Split learning is not private: docs/split.md.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from kilofed.config.fields import FormerName
from kilofed.config.recipe import ModelSpec, Recipe
from kilofed.data.examples import Example
from kilofed.errors import NonFiniteLoss, PayloadError, RecipeError
from kilofed.federation.cohort import Cohort
from kilofed.federation.method import Method, on_client
from kilofed.federation.parties import Client, Server
from kilofed.federation.presentation import Presentation
from kilofed.federation.workload import Costs, Message, RunPreview, Work, shape
from kilofed.models import halves, loading, training
from kilofed.models.halves import Halves, Part
from kilofed.payload import Payload, Scalar
from kilofed.records.results import Chart
from kilofed.split import activation_codec, reconstruction, server_half
from kilofed.split.client_half import CACHE, TURN, ClientHalf
from kilofed.split.passes import PartName, PartOfModel
from kilofed.split.server_half import BatchLimits, ClientBatch, ServerHalf, Sharing

STEP, STEPS, LAST = "step", "steps", "last"
MAX_STEPS, MAX_LENGTH = 2**20, 2**15
"""Of a client's round, and tokens of a row, where the server was not told."""

NUM_ATTACKED = 32
"""Maximum number of rows that the reconstruction attack is run on, and is fitted on."""


@dataclass(frozen=True)
class Split(Method):
    """The model is cut between two blocks; clients hold no block above the cut."""

    sends: ClassVar[str] = "activations at the cut, labels unless they stay with the client, lower blocks"

    cut: Annotated[int, Ge(1)] = 1
    """Blocks at the client; more need more memory and compute there, and leak less about the tokens."""
    labels: Literal["server", "client"] = "server"
    """server: labels are sent, one exchange per batch; client: head and loss are at the client (U-shape), two exchanges
    per batch and twice the bytes."""
    server_part: Sharing = "sequential"
    """sequential: one copy, a step per client's batch in random order (SplitFed v2, SplitLoRA); with labels=client,
    clients take turns. joint: one copy, one forward and step over all batches. averaged: a copy per client, averaged
    like the clients' tensors (SplitFed v1); in float32 equal to FedAvg bit for bit."""
    average_every: Annotated[int, Ge(0)] = 0
    """Steps between averages of the clients' tensors; 0 averages once, at the end of a round."""
    client_weighting: Annotated[Literal["examples", "uniform"], FormerName("weights")] = "examples"
    """examples: clients are weighted by the number of examples they trained on; uniform: equally."""
    activations: activation_codec.WireDtype = "float32"
    """Type of hidden states on the wire; int8 has a scale per token and needs about a quarter of the bytes."""
    gradients: activation_codec.WireDtype = "float32"
    """Type of their gradients on the wire."""

    @property
    def holds_head(self) -> bool:
        """Whether the head is at the clients."""
        return self.labels == "client"

    def client_model(self, recipe: Recipe, client: int) -> ModelSpec:
        return Part(**vars(recipe.model), num_blocks=self.cut, head=self.holds_head)

    def check(self, server: Server) -> None:
        Halves(server.model, self.cut)
        if server.train.accumulation > 1:
            raise RecipeError(
                f"train.accumulation is {server.train.accumulation}; split learning sends whole batches; "
                "set 1 and a smaller train.batch_size"
            )
        if not self.holds_head and halves.trains_tied_head(server.model):
            raise RecipeError(
                "the model's output head is its input embedding, and adapter.kind=full would train it on both sides; "
                "set method.labels=client, which keeps both at the client, or adapter.kind=lora"
            )

    def setup(self, server: Server) -> None:
        self.check(server)
        server.state.update(loading.read_trained(server.model))

    def round(self, server: Server, clients: Cohort) -> Mapping[str, Scalar]:
        return _Round(self, server, clients).run()

    def shares(self, server: Server) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The trained tensors of the clients and those of the server."""
        names = loading.trained_names(server.model)
        client_names = {
            name
            for name, full in names.items()
            if halves.held_by_client(server.model, full, cut=self.cut, head=self.holds_head)
        }
        state = server.state
        return {n: state[n] for n in names if n in client_names}, {n: state[n] for n in names if n not in client_names}

    def deliver(self, server: Server) -> nn.Module:
        loading.write_trained(server.model, server.state)
        return server.model

    def costs(self) -> "SplitCosts":
        return SplitCosts(self)

    def messages(self, preview: RunPreview) -> Mapping[int, Sequence[Message]]:
        own, _ = self.shares(preview.server)
        return {client: self._messages(preview, client, own) for client in preview.ids}

    def _messages(self, preview: RunPreview, client: int, own: dict[str, Tensor]) -> list[Message]:
        """Those of one client, whose part of the trained tensors is `own`."""
        width = halves.width(preview.server.model)
        messages, due = [], dict(own)
        every = self.average_every
        batches = [training.collate(batch) for batch in preview.batches(client, preview.recipe.train)]
        for number, batch in enumerate(batches):
            num = int(batch.attention_mask.sum())
            up, back = (_zero_rows(num, width, dtype) for dtype in (self.activations, self.gradients))
            batch_tensors = server_half.lengths(batch) | ({} if self.holds_head else server_half.labels(batch))
            ask = Payload(due, {STEP: 0, TURN: 0})
            messages.append(Message("forward", "call", ask, Payload(up | batch_tensors, {STEPS: 0})))
            if self.holds_head:
                messages.append(Message("head", "call", Payload(up, {TURN: 0}), Payload(back)))
            due = back
            if (every and (number + 1) % every == 0) or number + 1 == len(batches):
                reply = _part_like(own)
                messages.append(Message("part", "mean", Payload(due, {LAST: False, TURN: 0}), reply))
                due = dict(own)
        return messages

    def limits(self, server: Server) -> BatchLimits:
        """What a client's batch may be."""
        longest, labels = server.max_length or MAX_LENGTH, not self.holds_head
        return BatchLimits.of(server.model, server.train, length=longest, dtype=self.activations, labels=labels)

    def presentation(self) -> "ReconstructionCharts":
        return ReconstructionCharts(self)

    @on_client
    def forward(self, client: Client, ask: Payload) -> Payload:
        """Apply what was sent; reply with the hidden states of the next batch, and its labels if the server has the head."""
        half = ClientHalf.resume(client, self.cut, ask)
        half.receive(ask, self.gradients)
        batch, rows = half.forward(int(ask.scalars[STEP]))
        tensors, half.residual = activation_codec.encode(rows, self.activations, half.residual)
        tensors |= (
            server_half.lengths(batch) if self.holds_head else server_half.lengths(batch) | server_half.labels(batch)
        )
        half.save()
        return Payload(tensors, {STEPS: half.steps})

    @on_client
    def head(self, client: Client, ask: Payload) -> Payload:
        """Compute the loss above the last block; reply with its gradient with respect to that block's output."""
        half = ClientHalf.resume(client, self.cut, ask)
        tensors, half.head_residual = activation_codec.encode(
            half.forward_head(ask, self.activations), self.gradients, half.head_residual
        )
        half.save()
        return Payload(tensors)

    @on_client
    def part(self, client: Client, ask: Payload) -> Payload:
        """Apply what was sent; reply with the client's trained tensors."""
        half = ClientHalf.resume(client, self.cut, ask)
        half.receive(ask, self.gradients)
        end = half.learner.read()
        if not all(bool(value.isfinite().all()) for value in end.values()):
            raise NonFiniteLoss("its trained tensors are not finite; lower train.lr or train.max_grad_norm")
        examples, steps, loss = half.totals.tolist()
        half.save()
        if ask.scalars[LAST]:
            client.state = {}
            client.cache.pop(CACHE)
        return Payload(
            end,
            {"weight": examples if self.client_weighting == "examples" else 1.0, "train_loss": loss / max(steps, 1)},
        )


@dataclass(frozen=True)
class SplitCosts(Costs):
    """Clients run the blocks below the cut, the server those above."""

    method: Split

    def client(self, preview: RunPreview, client: int) -> Work:
        parts: list[PartName] = ["below", "head"] if self.method.holds_head else ["below"]
        kinds = [PartOfModel(self.method.cut, part) for part in parts]
        return Work([one for kind in kinds for one in preview.local_training(client, kind=kind)], waits=True)

    def server(self, preview: RunPreview) -> Work:
        method = self.method
        kind = PartOfModel(method.cut, "between" if method.holds_head else "above")
        if method.server_part != "joint" or method.holds_head:
            return Work([one for client in preview.ids for one in preview.local_training(client, kind=kind)])
        steps = zip_longest(*(preview.batches(client, preview.recipe.train) for client in preview.ids), fillvalue=[])
        joint = [shape([row for batch in batches for row in batch]) for batches in steps]
        return Work([replace(one, learns=True, kind=kind) for one in joint])


@dataclass(frozen=True)
class ReconstructionCharts(Presentation):
    """How many tokens the server can reconstruct from activations at each cut."""

    method: Split

    def charts(self, server: Server, rows: Sequence[Example]) -> list[Chart]:
        server_rows = list(server.public[:NUM_ATTACKED]) or list(rows[::2])[:NUM_ATTACKED]
        victim_rows = [row for row in rows if row not in server_rows][:NUM_ATTACKED]
        if not server_rows or not victim_rows:
            return []
        model = self.method.deliver(server)
        return [reconstruction.chart(model, self.method.cut, server_rows, victim_rows, self.method.activations)]


def _zero_rows(num_rows: int, width: int, dtype: activation_codec.WireDtype) -> dict[str, Tensor]:
    """Encoded hidden states (num_rows, width) of zeros."""
    return activation_codec.encode(torch.zeros(num_rows, width), dtype)[0]


def _part_like(own: Mapping[str, Tensor]) -> Payload:
    """A client's reply to `part`, whose trained tensors are like `own`."""
    return Payload(own, {"weight": 1.0, "train_loss": 0.0})


def _mean_norm(hidden: Tensor) -> float:
    """Mean L2 norm of hidden states (..., D) or their gradients; padding is 0 and does not count."""
    norms = hidden.double().norm(dim=-1)
    return float(norms.sum() / (norms > 0).sum().clamp(min=1))


class _Round:
    """One round as the server runs it."""

    def __init__(self, method: Split, server: Server, clients: Cohort) -> None:
        self._method, self._server, self._clients = method, server, clients
        own, others = method.shares(server)
        self._half = ServerHalf(server.model, method.cut, others, server.train, method.server_part, server.rng)
        self._own, self._limits = own, method.limits(server)
        self._batch_like = self._limits.expected({STEPS: int})
        self._alive = list(clients.ids)
        self._turns = Counter[int]()
        self._outbox: dict[int, dict[str, Tensor]] = {client: dict(own) for client in self._alive}
        """Tensors of each client's next request."""
        self._residuals: dict[tuple[int, str], Tensor] = {}
        """Rounding errors for error feedback, by client and action."""
        self._steps: dict[int, int] = {}
        self._examples, self._losses = Counter[int](), defaultdict[int, list[float]](list)

    def run(self) -> dict[str, Scalar]:
        """Run all steps of all clients and write the trained tensors of both halves to `server.state`."""
        number, every = 0, self._method.average_every
        while working := [c for c in self._alive if number < self._steps.get(c, number + 1)]:
            self._step(number, working)
            number += 1
            if every and number % every == 0 and number < max(self._steps.values()):
                mean = self._average(last=False)
                self._outbox = {client: dict(mean.tensors) for client in self._alive}
        mean = self._average(last=True)
        self._server.state.update({**mean.tensors, **self._half.result(self._weights())})
        return {"train_loss": self._loss(mean)}

    def _step(self, number: int, working: list[int]) -> None:
        sent = self._call_forward(number, working)
        if not sent:
            return
        steps = max(self._steps.values())
        first, total = (self._server.round - 1) * steps, steps * self._server.num_rounds
        self._half.begin_step(number, training.learning_rate(self._server.train, first + number, total))
        order = list(sent)
        if self._method.server_part == "sequential":
            places = torch.randperm(len(order), generator=self._server.rng(f"order {number}")).tolist()
            order = [order[place] for place in places]
        if not self._method.holds_head:
            self._train({client: sent[client] for client in order})
        elif self._method.server_part == "sequential":
            for client in order:  # The next client's forward needs the server's tensors after this step.
                self._step_through_heads({client: sent[client]})
        else:
            self._step_through_heads({client: sent[client] for client in order})

    def _step_through_heads(self, sent: dict[int, ClientBatch]) -> None:
        for client, one in sent.items():
            rows = activation_codec.unpad(self._half.forward_to_head(client, one), one.mask_BT)
            self._outbox[client] = self._encode(client, "head", rows, self._method.activations)
        with_gradients = {}
        for client, rows in self._call_head(sent).items():
            gradient_BTD = activation_codec.pad(rows, sent[client].mask_BT)
            with_gradients[client] = replace(sent[client], top_BTD=gradient_BTD)
        self._train({client: with_gradients[client] for client in sent if client in with_gradients})

    def _train(self, sent: Mapping[int, ClientBatch]) -> None:
        for client, result in self._half.train(sent).items():
            rows = activation_codec.unpad(result.gradient_BTD, sent[client].mask_BT)
            self._outbox[client] = self._encode(client, "forward", rows, self._method.gradients)
            self._examples[client] += len(sent[client].mask_BT)
            self._losses[client].append(result.loss)

    def _average(self, *, last: bool) -> Payload:
        """Average the clients' tensors, and the server's copies."""
        asks = {client: self._ask(client, {LAST: last}) for client in self._alive}
        mean = self._clients.mean("part", asks, _part_like(self._own))
        self._update_alive(asks)
        self._half.average(self._weights())
        return mean

    def _call_forward(self, number: int, asked: list[int]) -> dict[int, ClientBatch]:
        """The batches of step `number`; clients that failed are dropped, and the server's steps on theirs undone."""
        found: dict[int, ClientBatch] = {}

        def check(client: int, reply: Payload) -> None:
            found[client] = server_half.decode_batch(reply.tensors, self._limits)
            self._steps[client] = self._checked_steps(client, int(reply.scalars[STEPS]))

        asks = {client: self._ask(client, {STEP: number}) for client in asked}
        self._clients.call("forward", asks, self._batch_like, check=check)
        passed = self._clients.limited({client: _mean_norm(batch.hidden_BTD) for client, batch in found.items()})
        self._update_alive(asked)
        return {
            client: replace(found[client], hidden_BTD=found[client].hidden_BTD * factor)
            for client, factor in passed.items()
            if client in self._alive
        }

    def _call_head(self, sent: Mapping[int, ClientBatch]) -> dict[int, Tensor]:
        """Gradients (N, D) with respect to the output of the last block; clients that failed are dropped."""
        found: dict[int, Tensor] = {}

        def check(client: int, reply: Payload) -> None:
            num = int(sent[client].mask_BT.sum())
            rows = activation_codec.decode(reply.tensors, num, self._limits.width, self._method.gradients)
            found[client] = server_half.check_finite(rows)

        asks = {client: self._ask(client, {}) for client in sorted(sent)}
        like = activation_codec.expected(
            self._limits.num_rows * self._limits.length, self._limits.width, self._method.gradients
        )
        self._clients.call("head", asks, like, check=check)
        passed = self._clients.limited({client: _mean_norm(rows) for client, rows in found.items()})
        self._update_alive(asks, received=False)
        return {client: found[client] * factor for client, factor in passed.items() if client in self._alive}

    def _checked_steps(self, client: int, steps: int) -> int:
        """Raise PayloadError unless a client of its rows takes `steps` steps in a round."""
        spec, told = self._server.train, self._server.num_rows
        most = training.num_steps(spec, told(client)) if told else MAX_STEPS if spec.epochs else spec.steps
        if not 1 <= steps <= most or steps != self._steps.get(client, steps):
            raise PayloadError(
                f"it says that its round has {steps} steps; expected 1 to {most}, the same in all replies"
            )
        return steps

    def _ask(self, client: int, scalars: Mapping[str, Scalar]) -> Payload:
        turn, self._turns[client] = self._turns[client], self._turns[client] + 1
        return Payload(self._outbox.pop(client, {}), {**scalars, TURN: turn})

    def _update_alive(self, asked: Iterable[int], *, received: bool = True) -> None:
        for client in asked:
            if client in self._clients.failures:
                self._drop(client)
            elif received:
                self._half.acknowledge(client)

    def _drop(self, client: int) -> None:
        self._alive.remove(client)
        self._half.drop(client)
        self._steps.pop(client, None)

    def _encode(self, client: int, action: str, rows: Tensor, dtype: activation_codec.WireDtype) -> dict[str, Tensor]:
        tensors, self._residuals[client, action] = activation_codec.encode(
            rows, dtype, self._residuals.get((client, action))
        )
        return tensors

    def _weights(self) -> dict[int, float]:
        by_examples = self._method.client_weighting == "examples"
        return {client: float(self._examples[client]) if by_examples else 1.0 for client in self._alive}

    def _loss(self, mean: Payload) -> float:
        """Weighted mean of the clients' mean losses."""
        if self._method.holds_head:
            return float(mean.scalars["train_loss"])
        weights = self._weights()
        total = sum(weight * sum(self._losses[c]) / len(self._losses[c]) for c, weight in weights.items())
        return total / sum(weights.values())
