"""FedKSeed and FedKSeed-Pro: full-parameter tuning by zeroth-order steps along a pool of K seeds.

Source: Qin et al. 2024, arXiv:2312.06353. A client walks along seeds of the pool and sends one slope per step; server
and clients rebuild the weights from w0 and K coefficients.
Differs: seeds are a function of (pool, round, client), so none are sent; directions are structured (docs/seed-pool.md);
slopes and coefficients are quantised, with error feedback on the way down; pools may roll.
"""

import copy
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from annotated_types import Ge, Gt, Interval, Predicate
from torch import Tensor, nn

from kilofed.config.bounds import Or, power_of_two
from kilofed.data.examples import Example
from kilofed.errors import ClientError, KilofedError, PayloadError, RecipeError, TooFewReplies, WrongWeights
from kilofed.federation.cohort import Cohort, log
from kilofed.federation.method import Method, on_client
from kilofed.federation.parties import Client, Server
from kilofed.federation.presentation import Chart, Presentation
from kilofed.federation.workload import Costs, Message, RunPreview, TwoPointSteps
from kilofed.models import loading, training
from kilofed.payload import Payload, Scalar
from kilofed.zeroth import codec, seed_log, two_point
from kilofed.zeroth.directions.pool import SeedPool
from kilofed.zeroth.directions.spec import MAX_NUM_SEEDS, MIN_NUM_SEEDS
from kilofed.zeroth.seed_log import Floats, Order, Report

BASE, SUMS, HELD, VERSIONS = "base", "sums", "held", "versions"
BODY = "b"
UNKNOWN = (-1, -1)


@dataclass(frozen=True)
class FedKSeed(Method):
    """Clients walk along the pool's seeds; the server sums their slopes."""

    sends: ClassVar[str] = "slopes: a number per step"
    exact_bytes: ClassVar[bool] = False

    num_seeds: Annotated[int, Predicate(power_of_two), Interval(ge=MIN_NUM_SEEDS, le=MAX_NUM_SEEDS)] = 4096
    """K; more reach more of the space and cost more bytes down."""
    steps: Annotated[int, Interval(ge=1, le=65535)] = 200
    """Two-forward steps per round and client (the paper's tau); more drift, fewer rounds, more bytes up."""
    batch_size: Annotated[int, Ge(1)] = 1
    """Examples per step; more make slopes less noisy and steps slower."""
    eps: Annotated[float, Gt(0)] = 5e-4
    """Distance of the two forwards; smaller follows curvature better until rounding drowns it."""
    lr: Annotated[float, Ge(0)] = 3e-7
    """Learning rate, constant over the run; the paper's value for models of 1 to 13 billion parameters."""
    sampling: seed_log.Sampling = "uniform"
    """uniform: all seeds alike; pro: seeds with steep slopes more often, as in the paper; pro-unbiased: the same
    without the paper's discount on seeds that were rarely drawn."""
    weights: Literal["examples", "uniform"] = "examples"
    """examples: a client counts by the examples it holds; uniform: all count alike."""
    disclose: Literal["scalars", "sums"] = "scalars"
    """scalars: the server sees each client's slopes, fewest bytes; sums: it sees the mean of K sums only."""
    bits_up: Annotated[int, Interval(ge=2, le=16), Or(32)] = 6
    """Bits of a slope; 32 sends float32."""
    bits_down: Annotated[int, Interval(ge=2, le=16), Or(32)] = 5
    """Bits of a coefficient's change; 32 sends all K as float32."""
    epoch: Annotated[int, Ge(0)] = 0
    """Rounds after which the coefficients are folded into the start and a fresh pool is drawn; 0 keeps one pool. Raise
    K or roll pools when a run outgrows K directions; every fold costs a memory pass per step."""
    max_slope: Annotated[float, Gt(0)] = 1e6
    """Steeper slopes are skipped by clients and refused by the server."""
    check_every: Annotated[int, Ge(0)] = 1
    """Rounds between checks that all sites rebuilt the same weights, a memory pass and a hash each; 0 never checks."""

    def check(self, server: Server) -> None:
        spec = server.train
        if spec.schedule != "constant" or spec.warmup or spec.weight_decay:
            raise RecipeError(
                f"train.schedule is {spec.schedule}, warmup {spec.warmup}, weight_decay {spec.weight_decay}: sums of "
                "slopes stand for one constant learning rate without decay; set constant, 0 and 0"
            )

    def setup(self, server: Server) -> None:
        self.check(server)
        stream = self.stream(server.model)
        stream.check_eps(self.pool(server.seed, 0), self.eps)
        self.begin(server.state, 1)
        server.state[BASE] = seed_log.to_tensor(stream.digest(self.point(server.seed, server.state)))

    def round(self, server: Server, clients: Cohort) -> Mapping[str, Scalar]:
        state = server.state
        self.begin(state, server.round)
        asks = self._asks(server, clients.ids)
        held = (len(state[VERSIONS]) - 1, int(state[VERSIONS][-1]))
        record: dict[str, float]
        if self.disclose == "scalars":
            replies = self._accepted(clients.call("walk", asks), clients)
            state[log_name(server.round)] = seed_log.pack_log(replies)
            record = self.apply(server.seed, state, server.round)
        else:
            found = clients.mean("walk", next(iter(asks.values())))
            num = len(clients.ids) - len(clients.failures)
            state[log_name(server.round)] = self._unweighted(found, num)
            record = {**self.apply(server.seed, state, server.round), **_numbers(found)}
        self._note_held(state, clients, held)
        return dict(record)

    def begin(self, state: dict[str, Tensor], round: int) -> None:
        """Make the state ready for round number `round`: in the first of an epoch a fresh pool begins."""
        epoch = (round - 1) // self.epoch if self.epoch else 0
        versions = state.get(VERSIONS, torch.zeros(0, dtype=torch.int64))
        if len(versions) == epoch + 1:
            return
        state[VERSIONS] = torch.cat([versions, torch.zeros(1, dtype=torch.int64)])
        state[SUMS] = torch.zeros(3 if self.sampling != "uniform" else 1, self.num_seeds, dtype=torch.float64)

    def apply(
        self, seed: int, state: dict[str, Tensor], round: int, *, without: frozenset[int] = frozenset()
    ) -> dict[str, float]:
        """Add a round's record to the sums, and move the coefficients that all sites share.

        Args:
            without: clients whose slopes are left out; seeds are drawn as if they were not.

        Returns:
            Metrics of the round.

        Raises:
            PayloadError: the record is damaged.
        """
        record, epoch = state[log_name(round)], len(state[VERSIONS]) - 1
        if record.is_floating_point():
            sums, metrics = record.numpy().copy(), dict[str, float]()
        else:
            sums, metrics = self._summed(self.pool(seed, epoch), state, round, without)
        state[SUMS] = state[SUMS] + torch.from_numpy(sums[: len(state[SUMS])])
        self._advance(state, epoch)
        values = self.values(state, epoch)
        return {**metrics, "seeds_moved": int((values != 0).sum()), "largest_step": float(np.abs(values).max())}

    def _summed(
        self, pool: SeedPool, state: Mapping[str, Tensor], round: int, without: frozenset[int]
    ) -> tuple[Floats, dict[str, float]]:
        """(3, K): weighted mean of slopes, sums of sizes and of counts; and metrics."""
        chances = seed_log.integer_chances(self._levels(state))
        replies = seed_log.unpack_log(state[log_name(round)])
        reports = {who: self.report(body) for who, body in replies.items()}
        whole = sum(report.weight for who, report in reports.items() if who not in without)
        total = np.zeros((3, self.num_seeds))
        for who, report in reports.items():
            own = report.sums(pool.sample(round, who, self.steps, weights=chances), self.num_seeds)
            total[1:] += own[1:]
            if who not in without:
                total[0] += own[0] * (report.weight / whole)
        weight = sum(report.weight for report in reports.values())
        loss = math.fsum(report.loss * report.weight for report in reports.values()) / weight
        skipped = sum(len(report.skipped) for report in reports.values())
        return total, {"train_loss": loss, "skipped_steps": skipped}

    def _advance(self, state: dict[str, Tensor], epoch: int) -> None:
        exact = -self.lr * state[SUMS][0].numpy()
        for name in [name for name in state if name.startswith("delta.")]:
            del state[name]
        if self.bits_down == 32:
            body = codec.encode_scalars(exact, bits=32)
        else:
            before = self._held_state(state, epoch)
            after, delta = codec.advance(before, exact, bits=self.bits_down)
            body = codec.encode_state(after)
            state[f"delta.{epoch:03d}"] = seed_log.to_tensor(delta)
        state[state_name(epoch)] = seed_log.to_tensor(body)
        state[VERSIONS] = state[VERSIONS] + (torch.arange(len(state[VERSIONS])) == epoch)

    def _held_state(self, state: Mapping[str, Tensor], epoch: int) -> codec.State:
        body = state.get(state_name(epoch))
        return codec.State.zeros(self.num_seeds) if body is None else codec.receive(None, seed_log.to_bytes(body))

    def values(self, state: Mapping[str, Tensor], epoch: int) -> npt.NDArray[np.float32]:
        """(K,) coefficients of one epoch's pool."""
        body = state.get(state_name(epoch))
        if body is not None and (data := seed_log.to_bytes(body))[0] == codec.FLOATS:
            return codec.decode_scalars(data).astype(np.float32)
        return self._held_state(state, epoch).values

    def pool(self, seed: int, epoch: int) -> SeedPool:
        """The pool of one epoch of a run."""
        digest = hashlib.sha256(f"{seed}/{epoch}/fedkseed".encode()).digest()
        return SeedPool(self.num_seeds, int.from_bytes(digest[:8], "little"))

    def point(self, seed: int, state: Mapping[str, Tensor], *, epochs: int = 0) -> two_point.Point:
        """Where a run stands, given a server's state, or a client's with its number of epochs."""
        count = epochs or len(state[VERSIONS])
        return two_point.Point(tuple(self.pool(seed, e).at(self.values(state, e)) for e in range(count)))

    def stream(self, model: nn.Module) -> two_point.Stream:
        """`model`, which holds w0, for points of this method's pools."""
        return two_point.Stream(model, loading.trained(model), self.num_seeds)

    def report(self, body: bytes) -> Report:
        """What a client sent. Raises PayloadError: it cannot be believed."""
        return Report.unpack(body, num_steps=self.steps, max_slope=self.max_slope)

    def _levels(self, state: Mapping[str, Tensor]) -> bytes:
        if self.sampling == "uniform":
            return b""
        _, sizes, counts = state[SUMS].numpy()
        return seed_log.encode_levels(seed_log.interest(sizes, counts, self.sampling))

    def _asks(self, server: Server, ids: list[int]) -> dict[int, Payload]:
        state = server.state
        epoch, digest = len(state[VERSIONS]) - 1, seed_log.NO_DIGEST
        if self.check_every and (server.round - 1) % self.check_every == 0:
            digest = self.stream(server.model).digest(self.point(server.seed, state))
            state[f"digest.{server.round:06d}"] = seed_log.to_tensor(digest)
        order = Order(epoch, digest, levels=self._levels(state))
        table = {int(row[0]): (int(row[1]), int(row[2])) for row in state.get(HELD, torch.zeros(0, 3)).tolist()}
        holds = {client: table.get(client, (0, 0)) for client in ids}
        if self.disclose == "sums" and len(set(holds.values())) > 1:
            holds = dict.fromkeys(ids, UNKNOWN)  # A mean asks all clients alike.
        packed = {held: replace(order, messages=self._messages(state, held)).pack() for held in set(holds.values())}
        return {client: Payload({BODY: packed[held]}) for client, held in holds.items()}

    def _messages(self, state: Mapping[str, Tensor], held: tuple[int, int]) -> tuple[tuple[int, bytes], ...]:
        """What takes a client that holds (epoch, version) to the server's state."""
        found = []
        for epoch, version in enumerate(state[VERSIONS].tolist()):
            behind = version - held[1] if epoch == held[0] else version
            if epoch < held[0] or behind == 0:
                continue
            delta = state.get(f"delta.{epoch:03d}")
            in_step = epoch >= held[0] >= 0 and behind == 1 and delta is not None
            body = delta if in_step and delta is not None else state[state_name(epoch)]
            found.append((epoch, seed_log.to_bytes(body)))
        return tuple(found)

    def _accepted(self, replies: Mapping[int, Payload], clients: Cohort) -> dict[int, bytes]:
        """The replies that can be believed; the others count as failures."""
        found = {}
        for client, reply in replies.items():
            try:
                body = seed_log.to_bytes(reply.tensors.get(BODY, torch.zeros(0)))
                self.report(body)
            except PayloadError as error:
                clients.failures[client] = f"refused: {error}"
                log.warning("client %d is refused and left out of the round: %s", client, error)
            else:
                found[client] = body
        if not found:
            raise TooFewReplies(f"none of {len(clients.ids)} clients sent slopes that can be believed")
        return found

    def _unweighted(self, mean: Payload, num: int) -> Tensor:
        """(1 or 3, K): the weighted mean of slopes, and plain sums of what came divided by the weights."""
        if not mean.tensors:
            raise TooFewReplies("no client answered")
        slopes = mean.tensors["slopes"].double().reshape(1, -1)
        if not bool(slopes.isfinite().all()):
            raise PayloadError(
                "the mean of the clients' slopes is not finite, and under `sums` no client can be named"
            )
        if self.sampling == "uniform":
            return slopes
        share = float(mean.tensors["share"])
        tried = mean.tensors["tried"].double() * (num / share if share > 0 else 0.0)
        return torch.cat([slopes, tried])

    def _note_held(self, state: dict[str, Tensor], clients: Cohort, held: tuple[int, int]) -> None:
        table = {row[0]: tuple(row[1:]) for row in state.get(HELD, torch.zeros(0, 3, dtype=torch.int64)).tolist()}
        for client in clients.ids:
            # Whether a client that failed took in what it was sent, nobody knows.
            table[client] = UNKNOWN if client in clients.failures else held
        state[HELD] = torch.tensor([[client, *pair] for client, pair in sorted(table.items())], dtype=torch.int64)

    @on_client
    def walk(self, client: Client, ask: Payload) -> Payload:
        """Stand where the server stands, walk, and report the slopes."""
        order = Order.unpack(ask.tensors[BODY])
        self._receive(client, order)
        stream, point = self.stream(client.model), self.point(client.seed, client.state, epochs=order.epoch + 1)
        if order.digest != seed_log.NO_DIGEST and (found := stream.digest(point)) != order.digest:
            raise WrongWeights(
                f"the rebuilt weights hash to {found.hex()}, the server's to {order.digest.hex()}: base model, dtype, "
                "tied tensors or what is trained differ; give this site the server's model"
            )
        pool = point.pool
        seeds = pool.sample(client.round, client.id, self.steps, weights=seed_log.integer_chances(order.levels))
        spec, first = replace(client.train, batch_size=self.batch_size), (client.round - 1) * self.steps
        stretch = training.batches(client.data, spec, first=first, count=self.steps, order=client.order)
        done = two_point.walk(
            stream, point, seeds.tolist(), stretch, two_point.Steps(self.eps, self.lr, self.max_slope)
        )
        weight = len(client.data) if self.weights == "examples" else 1
        report = Report(weight, done.loss, done.skipped, done.slopes)
        if self.disclose == "scalars":
            return Payload({BODY: seed_log.to_tensor(report.pack(self.bits_up))})
        return self._own_sums(report, report.sums(seeds, self.num_seeds))

    def _own_sums(self, report: Report, sums: Floats) -> Payload:
        tensors = {"slopes": torch.from_numpy(sums[0]).float()}
        if self.sampling != "uniform":
            # A weighted mean of these, over the weighted mean of `share`, is a plain mean.
            tensors["tried"] = torch.from_numpy(sums[1:] / report.weight).float()
            tensors["share"] = torch.tensor([1 / report.weight])
        return Payload(tensors, {"weight": report.weight, "train_loss": report.loss})

    def _receive(self, client: Client, order: Order) -> None:
        """Bring the client's coefficients to the server's."""
        for epoch, body in order.messages:
            name = state_name(epoch)
            try:
                if body[:1] != bytes([codec.FLOATS]):
                    body = codec.encode_state(codec.receive(self._held_state(client.state, epoch), body))
                client.state[name] = seed_log.to_tensor(body)
            except KilofedError as error:
                raise ClientError(
                    f"what the server sent does not fit what this client holds ({error}): was its folder of states "
                    "changed? It is sent the whole state in its next round"
                ) from error

    def messages(self, preview: RunPreview) -> dict[int, Sequence[Message]]:
        """With made-up slopes: how short slopes pack depends a little on what they are."""
        state, held, made_up = self._made_up(preview)
        digest = bytes(len(seed_log.NO_DIGEST))
        order = Order(len(state[VERSIONS]) - 1, digest, self._messages(state, held), self._levels(state))
        ask = Payload({BODY: order.pack()})
        return {client: [self._message(preview, client, ask, made_up)] for client in preview.ids}

    def _message(self, preview: RunPreview, client: int, ask: Payload, slopes: Floats) -> Message:
        weight = len(preview.rows_of(client)) if self.weights == "examples" else 1
        report = Report(weight, 1.0, (), slopes)
        if self.disclose == "scalars":
            return Message("walk", "call", ask, Payload({BODY: seed_log.to_tensor(report.pack(self.bits_up))}))
        return Message("walk", "mean", ask, self._own_sums(report, np.zeros((3, self.num_seeds))))

    def _made_up(self, preview: RunPreview) -> tuple[dict[str, Tensor], tuple[int, int], Floats]:
        """The server's state before the round, what clients hold, and slopes, if slopes were normally distributed."""
        state: dict[str, Tensor]
        at, state, held = cast(
            tuple[int, dict[str, Tensor], tuple[int, int]], preview.cache.get(BODY, (0, {}, (0, 0)))
        )
        draws = np.random.default_rng(0)
        while at < preview.round:
            at += 1
            self.begin(state, at)
            if at == preview.round:
                break
            held = (len(state[VERSIONS]) - 1, int(state[VERSIONS][-1]))
            reports = {who: Report(1, 1.0, (), draws.normal(size=self.steps)) for who in preview.ids}
            state[log_name(at)] = seed_log.pack_log({who: one.pack(self.bits_up) for who, one in reports.items()})
            self.apply(preview.recipe.seed, state, at)
        preview.cache[BODY] = at - 1, state, held
        return state, held, draws.normal(size=self.steps)

    def costs(self) -> Costs:
        return TwoPointSteps(self.steps, self.batch_size)

    def presentation(self) -> "SeedCharts":
        return SeedCharts(self)

    def deliver(self, server: Server) -> nn.Module:
        # A copy: server.model holds w0, which clients of this process share.
        model = copy.deepcopy(server.model)
        return self.stream(model).settle(self.point(server.seed, server.state))


@dataclass(frozen=True)
class SeedCharts(Presentation):
    """How far the pool's directions were walked, and how likely its seeds are."""

    method: FedKSeed

    def charts(self, server: Server, rows: Sequence[Example]) -> list[Chart]:
        num = self.method.num_seeds
        walked = np.sort(np.abs(self.method.values(server.state, len(server.state[VERSIONS]) - 1)))[::-1]
        found = [
            Chart(
                "How far each direction was walked",
                f"{int((walked > 0).sum())} of {num} directions of the pool were walked; the farthest first.",
                "directions, the farthest walked first",
                "size of the coefficient",
                {"coefficients": ranked(walked)},
            )
        ]
        if self.method.sampling == "uniform":
            return found
        _, sizes, counts = server.state[SUMS].numpy()
        chances = (
            self.method.num_seeds
            * np.sort(seed_log.probabilities(seed_log.interest(sizes, counts, self.method.sampling)))[::-1]
        )
        words = (
            f"{int((counts > 0).sum())} seeds were tried. The likeliest is {chances[0] / chances[-1]:.2f} times as "
            "likely as the least likely one; 2.72 is the most that the rule allows."
        )
        lines = {self.method.sampling: ranked(chances), "uniform": [(1.0, 1.0), (float(num), 1.0)]}
        return [*found, Chart("Chances of the seeds", words, "seeds, the likeliest first", "chance times K", lines)]


def ranked(values: npt.NDArray[np.floating]) -> list[tuple[float, float]]:
    """(rank from 1, value) for at most 200 values, evenly spaced, the first and the last among them."""
    chosen = np.unique(np.linspace(0, len(values) - 1, 200).round().astype(int))
    return [(float(i + 1), float(values[i])) for i in chosen]


def state_name(epoch: int) -> str:
    """Where the coefficients of an epoch's pool are kept, by server and clients."""
    return f"state.{epoch:03d}"


def log_name(round: int) -> str:
    """Where the record of a round is kept in the server's state."""
    return f"log.{round:06d}"


def _numbers(reply: Payload) -> dict[str, float]:
    return {name: float(value) for name, value in reply.scalars.items()}
