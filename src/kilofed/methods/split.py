"""Split-FedLLM: clients run the first blocks, the server the others; activations go up, their gradients come down.

Sources: Yan et al. 2025, arXiv:2501.04436 (Split-FedLLM); Lin et al. 2024, arXiv:2407.00952 (SplitLoRA); Thapa et al.
2022, arXiv:2004.12088 (SplitFed); Vepakomma et al. 2018, arXiv:1812.00564 (labels at the client: the U-shape).
Differs: padding is not sent; optimisers start afresh in each round, as in every method here; a client that is lost in
the middle of a batch takes its step of the server with it. Split is not private: docs/split.md.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from kilofed.config.recipe import ModelSpec, Recipe
from kilofed.data.examples import Example
from kilofed.errors import ClientError, NonFiniteLoss, PayloadError, RecipeError
from kilofed.federation.cohort import Cohort
from kilofed.federation.method import Method, on_client
from kilofed.federation.parties import Client, Server
from kilofed.federation.presentation import Chart, Presentation
from kilofed.federation.workload import Costs, Message, RunPreview, Work, shape
from kilofed.models import halves, loading, training
from kilofed.models.halves import Halves, Part
from kilofed.models.learner import Learner, restored
from kilofed.payload import Payload, Scalar
from kilofed.split import activation_codec, reconstruction, server_half
from kilofed.split.passes import PartName, PartOfModel
from kilofed.split.server_half import Sent, Sharing, Tail

TURN, STEP, STEPS, LAST = "turn", "step", "steps", "last"
HELD, GRADS, LEFT, LEFT_HEAD, TALLY, MARKS = "split", "grads.", "left", "left_head", "tally", "marks"

PROBED = 32
"""Most rows that the probe reads, and most that it learns from."""


@dataclass(frozen=True)
class Split(Method):
    """The model is cut between two blocks; no client holds the blocks above the cut."""

    sends: ClassVar[str] = "activations at the cut, labels unless they stay with the client, lower blocks"

    cut: Annotated[int, Ge(1)] = 1
    """Blocks that a client holds; more cost it memory and work, and hide its tokens better."""
    labels: Literal["server", "client"] = "server"
    """server: labels go up, one exchange per batch; client: the head and the loss stay with the client (the U-shape),
    two exchanges per batch and twice the bytes."""
    server_part: Sharing = "sequential"
    """sequential: one part, a step for each client's batch in random order (SplitFed v2, SplitLoRA); with labels=client
    clients are then asked one after the other. joint: one part, one forward and step for all batches. averaged: a copy
    for each client, averaged as the clients' parts are (SplitFed v1): what FedAvg does, bit for bit, in float32."""
    average_every: Annotated[int, Ge(0)] = 0
    """Steps after which the clients' parts are averaged; 0 averages once, at the end of a round."""
    weights: Literal["examples", "uniform"] = "examples"
    """examples: a client's part counts by the examples it trained on; uniform: all count alike."""
    activations: activation_codec.Width = "float32"
    """Numbers of hidden states on the wire; int8 has a scale per token and needs about a quarter of the bytes."""
    gradients: activation_codec.Width = "float32"
    """Numbers of their gradients on the wire."""

    @property
    def holds_head(self) -> bool:
        """Whether clients have the head."""
        return self.labels == "client"

    def client_model(self, recipe: Recipe, client: int) -> ModelSpec:
        return Part(**vars(recipe.model), num_blocks=self.cut, head=self.holds_head)

    def check(self, server: Server) -> None:
        Halves(server.model, self.cut)
        if server.train.accumulation > 1:
            raise RecipeError(
                f"train.accumulation is {server.train.accumulation}; split learning sends whole batches: "
                "set 1 and a smaller train.batch_size"
            )
        if not self.holds_head and halves.trains_tied_head(server.model):
            raise RecipeError(
                "the model's output head is its input embedding, and adapter.kind=full would train it on both sides: "
                "set method.labels=client, which keeps both with the client, or adapter.kind=lora"
            )

    def setup(self, server: Server) -> None:
        self.check(server)
        server.state.update(loading.read_trained(server.model))

    def round(self, server: Server, clients: Cohort) -> Mapping[str, Scalar]:
        return _Round(self, server, clients).run()

    def shares(self, server: Server) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The trained tensors of the clients' part and of the server's."""
        names = loading.trained_names(server.model)
        mine = {
            name
            for name, full in names.items()
            if halves.held_by_client(server.model, full, cut=self.cut, head=self.holds_head)
        }
        state = server.state
        return {n: state[n] for n in names if n in mine}, {n: state[n] for n in names if n not in mine}

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
            up, back = (_made_up(num, width, kind) for kind in (self.activations, self.gradients))
            batch_tensors = server_half.lengths(batch) | ({} if self.holds_head else server_half.labels(batch))
            ask = Payload(due, {STEP: 0, TURN: 0})
            messages.append(Message("forward", "call", ask, Payload(up | batch_tensors, {STEPS: 0})))
            if self.holds_head:
                messages.append(Message("head", "call", Payload(up, {TURN: 0}), Payload(back)))
            due = back
            if (every and (number + 1) % every == 0) or number + 1 == len(batches):
                reply = Payload(own, {"weight": 1.0, "train_loss": 0.0})
                messages.append(Message("part", "mean", Payload(due, {LAST: False, TURN: 0}), reply))
                due = dict(own)
        return messages

    def presentation(self) -> "Probe":
        return Probe(self)

    @on_client
    def forward(self, client: Client, ask: Payload) -> Payload:
        """Take in what came; reply with the hidden states of the next batch, and with its labels if they leave."""
        site = _Site.at(self, client, ask)
        site.take(ask)
        batch, rows = site.below(int(ask.scalars[STEP]))
        tensors, site.left = activation_codec.shrink(rows, self.activations, site.left)
        tensors |= (
            server_half.lengths(batch) if self.holds_head else server_half.lengths(batch) | server_half.labels(batch)
        )
        site.keep()
        return Payload(tensors, {STEPS: site.steps})

    @on_client
    def head(self, client: Client, ask: Payload) -> Payload:
        """The loss above the last block; reply with its gradient with respect to what is there."""
        site = _Site.at(self, client, ask)
        tensors, site.left_head = activation_codec.shrink(site.above(ask), self.gradients, site.left_head)
        site.keep()
        return Payload(tensors)

    @on_client
    def part(self, client: Client, ask: Payload) -> Payload:
        """Take in what came; reply with the client's part of the trained tensors."""
        site = _Site.at(self, client, ask)
        site.take(ask)
        end = site.learner.read()
        if not all(bool(value.isfinite().all()) for value in end.values()):
            raise NonFiniteLoss("the weights of its part are not finite: try a smaller train.lr or max_grad_norm")
        examples, steps, loss = site.tally.tolist()
        site.keep()
        if ask.scalars[LAST]:
            client.state = {}
            client.cache.pop(HELD)
        return Payload(
            end, {"weight": examples if self.weights == "examples" else 1.0, "train_loss": loss / max(steps, 1)}
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
class Probe(Presentation):
    """How many tokens the server reads off what it is sent, at each cut."""

    method: Split

    def charts(self, server: Server, rows: Sequence[Example]) -> list[Chart]:
        known = list(server.public[:PROBED]) or list(rows[::2])[:PROBED]
        secret = [row for row in rows if row not in known][:PROBED]
        if not known or not secret:
            return []
        model = self.method.deliver(server)
        return [reconstruction.chart(model, self.method.cut, known, secret, self.method.activations)]


def _made_up(num_rows: int, width: int, kind: activation_codec.Width) -> dict[str, Tensor]:
    """What `narrow.shrink` makes of hidden states (num_rows, width)."""
    return activation_codec.shrink(torch.zeros(num_rows, width), kind)[0]


class _Site:
    """A client's part between two messages; nothing is written into the model, which other clients may share."""

    def __init__(self, method: Split, client: Client, learner: Learner) -> None:
        self.learner = learner
        self.steps = training.num_steps(client.train, len(client.data))
        """Steps of a round."""
        self.left: Tensor | None = None
        self.left_head: Tensor | None = None
        self.tally = torch.zeros(3, dtype=torch.float64)
        """Examples and steps that were learnt from in this round, and the sum of the losses that the client knows."""
        self._halves, self._client, self._round = Halves(client.model, method.cut), client, client.round
        self._turn, self._number = 0, -1
        """Messages of this round that were answered; the step whose gradient is awaited, -1 for none."""
        self._open: tuple[training.Batch, Tensor] | None = None
        """Batch of that step, and its hidden states with their graph."""

    @classmethod
    def at(cls, method: Split, client: Client, ask: Payload) -> "_Site":
        """The site as the message before left it. Raises ClientError: it is lost."""
        turn, site = int(ask.scalars[TURN]), client.cache.get(HELD)
        if turn == 0:
            site = cls(method, client, Learner(client.model, ask.tensors, client.train))
        elif not isinstance(site, cls) or (site._round, site._turn) != (client.round, turn):
            if MARKS not in client.state or int(client.state[MARKS][0]) != turn:
                raise ClientError("its state of this round is lost, so it cannot go on with it")
            site = cls(method, client, restored(client.model, client.state, client.train))
            site._remember(client.state)
        site._turn = turn + 1
        client.cache[HELD] = site
        return site

    def take(self, ask: Payload) -> None:
        """Take in the gradient at the cut of the open step, and the mean of the clients' parts; whichever came."""
        if activation_codec.has_rows(ask.tensors):
            batch, hidden = self._opened()
            rows = activation_codec.grow(ask.tensors, int(batch.attention_mask.sum()), hidden.shape[2]).to(
                hidden.device
            )
            hidden.backward(activation_codec.unpack(rows, batch.attention_mask).to(hidden.dtype))  # type: ignore[no-untyped-call]
            first, total = (self._round - 1) * self.steps, self.steps * self._client.num_rounds
            self.learner.step(training.learning_rate(self._client.train, first + self._number, total))
            self.tally += torch.tensor([len(batch.input_ids), 1, 0])
            self._number, self._open = -1, None
        if any(name in ask.tensors for name in self.learner.tensors):
            self.learner.write(ask.tensors)

    def below(self, number: int) -> tuple[training.Batch, Tensor]:
        """Open step `number`: its batch, and the rows (N, D) at the cut."""
        self._number, self._open = number, None
        batch, hidden = self._opened()
        return batch, activation_codec.pack(hidden.detach(), batch.attention_mask)

    def above(self, ask: Payload) -> Tensor:
        """Rows (N, D): the gradient of the open step's loss with respect to what left the last block."""
        batch, hidden = self._opened()
        rows = activation_codec.grow(ask.tensors, int(batch.attention_mask.sum()), hidden.shape[2]).to(hidden.device)
        top = activation_codec.unpack(rows, batch.attention_mask).to(hidden.dtype).requires_grad_()

        def forward() -> Tensor:
            with self._halves.from_last(top):
                return training.loss(self._client.model, batch)

        with self._at_work("head"):
            loss = self.learner.run(forward)
        if not math.isfinite(value := float(loss.detach())):
            raise NonFiniteLoss(
                f"the loss is {value} at step {self._number + 1}: try a smaller train.lr or max_grad_norm"
            )
        loss.backward()  # type: ignore[no-untyped-call]
        self.tally[2] += value
        assert top.grad is not None
        return activation_codec.pack(top.grad, batch.attention_mask)

    def keep(self) -> None:
        """Write all that the next message needs into the client's state."""
        kept = {GRADS + name: p.grad for name, p in self.learner.tensors.items()} | {LEFT: self.left}
        kept |= {LEFT_HEAD: self.left_head, TALLY: self.tally, MARKS: torch.tensor([self._turn, self._number])}
        found = {name: value.detach().cpu().clone() for name, value in kept.items() if value is not None}
        self._client.state = {**self.learner.save(), **found}

    def _remember(self, state: Mapping[str, Tensor]) -> None:
        self._turn, self._number = map(int, state[MARKS])
        self.tally, self.left, self.left_head = state[TALLY].clone(), state.get(LEFT), state.get(LEFT_HEAD)
        for name, parameter in self.learner.tensors.items():
            if (grad := state.get(GRADS + name)) is not None:
                parameter.grad = grad.to(parameter.device)

    def _opened(self) -> tuple[training.Batch, Tensor]:
        """The open step's batch and its hidden states (B, T, D) at the cut."""
        if self._open is None:  # It is new, or no graph outlived the message before.
            client, first = self._client, (self._round - 1) * self.steps
            stretch = training.batches(
                client.data, client.train, first=first + self._number, count=1, order=client.order
            )
            batch = training.collate(next(stretch), next(client.model.parameters()).device)
            with self._at_work("part"):
                hidden = self.learner.run(lambda: self._halves.below(batch.input_ids, batch.attention_mask))
            self._open = batch, hidden
        return self._open

    @contextmanager
    def _at_work(self, what: str) -> Iterator[None]:
        """The model in training mode, with the random stream of the open step."""
        model, spec = self._client.model, self._client.train
        model.train()
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._client.rng(f"dropout {what} {self._number}").initial_seed())
                kind = next(model.parameters()).device.type
                with torch.autocast(kind, torch.bfloat16, enabled=spec.autocast == "bfloat16"):
                    yield
        finally:
            model.eval()


class _Round:
    """The server's side of one round."""

    def __init__(self, method: Split, server: Server, clients: Cohort) -> None:
        self._method, self._server, self._clients = method, server, clients
        own, others = method.shares(server)
        self._tail = Tail(server.model, method.cut, others, server.train, method.server_part, server.rng)
        self._width = halves.width(server.model)
        self._alive = list(clients.ids)
        self._turns = Counter[int]()
        self._due: dict[int, dict[str, Tensor]] = {client: dict(own) for client in self._alive}
        """What each client is sent with its next message."""
        self._left: dict[tuple[int, str], Tensor] = {}
        """What rounding left over, by client and action."""
        self._steps: dict[int, int] = {}
        self._examples, self._losses = Counter[int](), defaultdict[int, list[float]](list)

    def run(self) -> dict[str, Scalar]:
        """All steps of all clients; then both parts are in `server.state`."""
        number, every = 0, self._method.average_every
        while working := [c for c in self._alive if number < self._steps.get(c, number + 1)]:
            self._step(number, working)
            number += 1
            if every and number % every == 0 and number < max(self._steps.values()):
                mean = self._average(last=False)
                self._due = {client: dict(mean.tensors) for client in self._alive}
        mean = self._average(last=True)
        self._server.state.update({**mean.tensors, **self._tail.result(self._weights())})
        return {"train_loss": self._loss(mean)}

    def _step(self, number: int, working: list[int]) -> None:
        sent = self._arrived(self._call("forward", working, {STEP: number}))
        if not sent:
            return
        steps = max(self._steps.values())
        first, total = (self._server.round - 1) * steps, steps * self._server.num_rounds
        self._tail.begin(number, training.learning_rate(self._server.train, first + number, total))
        order = list(sent)
        if self._method.server_part == "sequential":
            places = torch.randperm(len(order), generator=self._server.rng(f"order {number}")).tolist()
            order = [order[place] for place in places]
        if not self._method.holds_head:
            self._learn({client: sent[client] for client in order})
        elif self._method.server_part == "sequential":
            for client in order:  # The server's part must have done its step before the next client meets it.
                self._through_heads({client: sent[client]})
        else:
            self._through_heads({client: sent[client] for client in order})

    def _through_heads(self, sent: dict[int, Sent]) -> None:
        for client, one in sent.items():
            rows = activation_codec.pack(self._tail.ascend(client, one), one.mask_BT)
            self._due[client] = self._shrunk(client, "head", rows, self._method.activations)
        found = {}
        for client, reply in self._call("head", sorted(sent), {}).items():
            given = self._rows(client, reply, int(sent[client].mask_BT.sum()))
            if given is not None:
                found[client] = replace(sent[client], top_BTD=activation_codec.unpack(given, sent[client].mask_BT))
        self._learn({client: found[client] for client in sent if client in found})

    def _learn(self, sent: Mapping[int, Sent]) -> None:
        for client, answer in self._tail.learn(sent).items():
            rows = activation_codec.pack(answer.gradient_BTD, sent[client].mask_BT)
            self._due[client] = self._shrunk(client, "forward", rows, self._method.gradients)
            self._examples[client] += len(sent[client].mask_BT)
            self._losses[client].append(answer.loss)

    def _average(self, *, last: bool) -> Payload:
        """The mean of the clients' parts; all parts of the server have theirs, too."""
        asks = {client: self._ask(client, {LAST: last}) for client in self._alive}
        mean = self._clients.mean("part", asks)
        self._settle(asks)
        self._tail.average(self._weights())
        return mean

    def _call(self, action: str, asked: list[int], scalars: dict[str, Scalar]) -> dict[int, Payload]:
        """Replies of those who are still there; the others are taken out, and their last step with them."""
        replies = self._clients.call(action, {client: self._ask(client, scalars) for client in asked})
        self._settle(asked, received=action != "head")
        return replies

    def _ask(self, client: int, scalars: Mapping[str, Scalar]) -> Payload:
        turn, self._turns[client] = self._turns[client], self._turns[client] + 1
        return Payload(self._due.pop(client, {}), {**scalars, TURN: turn})

    def _settle(self, asked: Iterable[int], *, received: bool = True) -> None:
        for client in asked:
            if client in self._clients.failures:
                self._lose(client)
            elif received:
                self._tail.received(client)

    def _lose(self, client: int) -> None:
        self._alive.remove(client)
        self._tail.drop(client)
        self._steps.pop(client, None)

    def _arrived(self, replies: Mapping[int, Payload]) -> dict[int, Sent]:
        """The batches that can be believed."""
        found = {}
        for client, reply in replies.items():
            try:
                found[client] = server_half.read(reply.tensors, self._width, labels=not self._method.holds_head)
                self._steps[client] = int(reply.scalars[STEPS])
            except (PayloadError, KeyError, ValueError) as error:
                self._refuse(client, str(error))
        return found

    def _rows(self, client: int, reply: Payload, num: int) -> Tensor | None:
        try:
            return server_half.finite(activation_codec.grow(reply.tensors, num, self._width))
        except PayloadError as error:
            self._refuse(client, str(error))
            return None

    def _refuse(self, client: int, why: str) -> None:
        self._clients.leave_out(client, why)
        self._lose(client)

    def _shrunk(self, client: int, action: str, rows: Tensor, width: activation_codec.Width) -> dict[str, Tensor]:
        tensors, self._left[client, action] = activation_codec.shrink(rows, width, self._left.get((client, action)))
        return tensors

    def _weights(self) -> dict[int, float]:
        by_examples = self._method.weights == "examples"
        return {client: float(self._examples[client]) if by_examples else 1.0 for client in self._alive}

    def _loss(self, mean: Payload) -> float:
        """Weighted mean of the clients' mean losses."""
        if self._method.holds_head:
            return float(mean.scalars["train_loss"])
        weights = self._weights()
        total = sum(weight * sum(self._losses[c]) / len(self._losses[c]) for c, weight in weights.items())
        return total / sum(weights.values())
