"""FedKSeed and FedKSeed-Pro: full-parameter tuning by zeroth-order steps along a pool of K seeds.

Source: Qin et al. 2024, arXiv:2312.06353. A client takes two-point steps along seeds of the pool and sends one scalar
gradient per step; server and clients rebuild the weights from w0 and K coefficients.
Differs: seeds are a function of (pool, round, client), so none are sent; directions are structured (docs/seed-pool.md);
gradients and coefficients are quantised, with error feedback on the way down; a run may use several pools in turn.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from annotated_types import Ge, Gt, Interval, Predicate
from torch import Tensor, nn

from kilofed.config.bounds import Or, power_of_two
from kilofed.config.fields import FormerName
from kilofed.config.recipe import TrainSpec
from kilofed.data.examples import Example
from kilofed.errors import ClientError, KilofedError, PayloadError, RecipeError, WrongWeights
from kilofed.federation.cohort import Cohort
from kilofed.federation.expected import Expected, TensorLike
from kilofed.federation.method import Method, on_client
from kilofed.federation.parties import Client, Server
from kilofed.federation.presentation import Presentation
from kilofed.federation.workload import Costs, Message, RunPreview, TwoPointSteps
from kilofed.models import loading, training
from kilofed.payload import Payload, Scalar
from kilofed.records.results import Chart
from kilofed.zeroth import seed_log, two_point
from kilofed.zeroth.directions.spec import MAX_NUM_SEEDS, MIN_NUM_SEEDS
from kilofed.zeroth.pools import NOTHING, SUMS, SeedPools, check_name, digest_name, held_by_server, log_name
from kilofed.zeroth.seed_log import Floats, Report, Request

BASE, HELD, BODY = "base", "held", "b"


@dataclass(frozen=True)
class FedKSeed(Method):
    """Clients take two-point steps along the pool's seeds; the server sums their scalar gradients."""

    sends: ClassVar[str] = "scalar gradients, one per step"
    exact_bytes: ClassVar[bool] = False

    num_seeds: Annotated[int, Predicate(power_of_two), Interval(ge=MIN_NUM_SEEDS, le=MAX_NUM_SEEDS)] = 4096
    """K; more seeds span more directions and cost more bytes down."""
    steps: Annotated[int, Interval(ge=1, le=65535)] = 200
    """Two-point steps per round and client (the paper's tau); more drift, fewer rounds, more bytes up."""
    batch_size: Annotated[int, Ge(1)] = 1
    """Examples per step; more make gradients less noisy and steps slower."""
    eps: Annotated[float, Gt(0)] = 5e-4
    """Perturbation of the two-point estimate; smaller is less biased until rounding error dominates."""
    lr: Annotated[float, Ge(0)] = 3e-7
    """Learning rate, constant over the run; the paper's value for models of 1 to 13 billion parameters."""
    sampling: seed_log.Sampling = "uniform"
    """uniform: equal probabilities; pro: seeds with large gradients more often, as in the paper; pro-unbiased: the same
    without the paper's lower estimate for seeds that were rarely drawn."""
    client_weighting: Annotated[Literal["examples", "uniform"], FormerName("weights")] = "examples"
    """examples: clients are weighted by their number of examples; uniform: equally."""
    disclose: Literal["scalars", "sums"] = "scalars"
    """scalars: the server sees each client's gradients, fewest bytes; sums: it sees the mean of K sums only."""
    bits_up: Annotated[int, Interval(ge=2, le=16), Or(32)] = 6
    """Bits of a scalar gradient; 32 sends float32."""
    bits_down: Annotated[int, Interval(ge=2, le=16), Or(32)] = 5
    """Bits of a coefficient's change; 32 sends all K as float32."""
    rounds_per_pool: Annotated[int, Ge(0), FormerName("epoch")] = 0
    """Rounds after which the coefficients are fixed and a new pool is drawn; 0 keeps one pool. Raise K or use several
    pools when K directions limit learning; every earlier pool costs one more pass over the weights per forward."""
    max_scalar_gradient: Annotated[float, Gt(0), FormerName("max_slope")] = 1e6
    """Gradients of larger magnitude are skipped by clients and refused by the server."""
    max_gradient_ratio: Annotated[float, Ge(0)] = 10.0
    """The server limits gradients to this many times the median over clients of each one's largest; 0 limits none. With
    disclose=sums it sees no gradients, and an update whose norm is above outlier_ratio times the median is scaled down."""
    check_every: Annotated[int, Ge(0)] = 1
    """Rounds between checks that all sites rebuild the same weights, one pass and a hash each; 0 never checks."""

    def check(self, server: Server) -> None:
        spec = server.train
        if spec.schedule != "constant" or spec.warmup or spec.weight_decay:
            raise RecipeError(
                f"train.schedule is {spec.schedule}, warmup {spec.warmup}, weight_decay {spec.weight_decay}: sums of "
                "gradients stand for one constant learning rate without decay; set constant, 0 and 0"
            )

    def setup(self, server: Server) -> None:
        self.check(server)
        perturbed = self.perturbed(server.model)
        perturbed.check_eps(self.pools.pool(server.seed, 0), self.eps)
        self.pools.begin(server.state, 1)
        server.state[BASE] = seed_log.to_tensor(perturbed.digest(self.pools.point(server.seed, server.state)))

    def round(self, server: Server, clients: Cohort) -> Mapping[str, Scalar]:
        state = server.state
        self.pools.begin(state, server.round)
        asks, held = self._asks(server, clients.ids), held_by_server(state)
        metrics: dict[str, float]
        if self.disclose == "scalars":
            reports = self._reports(clients, asks)
            state[log_name(server.round)] = seed_log.pack_reports(reports)
            metrics = self.pools.apply(server.seed, state, server.round)
            for client, num in self.pools.limits(state[log_name(server.round)]).items():
                clients.note(client, f"{num} of its {self.steps} gradients are far above the cohort's and are limited")
        else:
            like = self._own_sums(Report(1, 0.0, (), np.zeros(0)), np.zeros((3, self.num_seeds)))
            mean = clients.mean("walk", next(iter(asks.values())), like, clip_outliers=True)
            num = len(clients.ids) - len(clients.failures)
            state[log_name(server.round)] = self._round_sums(mean, num)
            metrics = {**self.pools.apply(server.seed, state, server.round), **_numbers(mean)}
        state[check_name(server.round)] = seed_log.record_digests(server.round, state[log_name(server.round)])
        if self.check_every and server.round == server.num_rounds:
            digest = self.perturbed(server.model).digest(self.pools.point(server.seed, state))
            state[digest_name(server.round + 1)] = seed_log.to_tensor(digest)
        self._record_held(state, clients, held)
        return dict(metrics)

    @property
    def pools(self) -> SeedPools:
        """The run's pools and the operations on their coefficients."""
        return SeedPools(
            self.num_seeds,
            self.steps,
            self.lr,
            self.sampling,
            self.bits_down,
            self.rounds_per_pool,
            self.max_scalar_gradient,
            self.max_gradient_ratio,
        )

    def perturbed(self, model: nn.Module) -> two_point.PerturbedModel:
        """`model`, which holds w0, wrapped to run at points of this method's pools."""
        return two_point.PerturbedModel(model, loading.trained(model), self.num_seeds)

    def max_weight(self, train: TrainSpec, num_rows: int) -> float:
        return num_rows if self.client_weighting == "examples" else 1

    def _asks(self, server: Server, ids: list[int]) -> dict[int, Payload]:
        state, pools, digest = server.state, self.pools, seed_log.NO_DIGEST
        if self.check_every and (server.round - 1) % self.check_every == 0:
            digest = self.perturbed(server.model).digest(pools.point(server.seed, state))
            state[digest_name(server.round)] = seed_log.to_tensor(digest)
        request = Request(held_by_server(state)[0], digest, levels=pools.levels(state))
        table = {int(row[0]): (int(row[1]), int(row[2])) for row in state.get(HELD, torch.zeros(0, 3)).tolist()}
        holds = {client: table.get(client, (0, 0)) for client in ids}
        if self.disclose == "sums" and len(set(holds.values())) > 1:
            holds = dict.fromkeys(ids, NOTHING)  # `mean` sends the same payload to all clients.
        packed = {held: replace(request, updates=pools.updates(state, held)).pack() for held in set(holds.values())}
        return {client: Payload({BODY: packed[held]}) for client, held in holds.items()}

    def _reports(self, clients: Cohort, asks: Mapping[int, Payload]) -> dict[int, bytes]:
        """Each client's report as it is recorded: with the weight that the rules leave it."""
        found: dict[int, bytes] = {}

        def check(client: int, reply: Payload) -> None:
            body = seed_log.to_bytes(reply.tensors[BODY])
            claimed = self.pools.report(body).weight
            found[client] = seed_log.with_weight(body, max(int(clients.weight(client, claimed)), 1))

        longest = Report.max_bytes(self.steps)
        like = Expected({BODY: TensorLike(torch.uint8, (range(1, longest + 1),))})
        clients.call("walk", asks, like, check=check)
        return found

    def _round_sums(self, mean: Payload, num: int) -> Tensor:
        """(1 or 3, K): the weighted mean of gradients, and plain sums of magnitudes and counts."""
        gradients = mean.tensors["slopes"].double().reshape(1, -1)
        if not bool(gradients.isfinite().all()):
            raise PayloadError(
                "the mean of the clients' gradients is not finite; under `disclose = sums` the client is not known"
            )
        if self.sampling == "uniform":
            return gradients
        share = float(mean.tensors["share"])
        tried = mean.tensors["tried"].double() * (num / share if share > 0 else 0.0)
        return torch.cat([gradients, tried])

    def _record_held(self, state: dict[str, Tensor], clients: Cohort, held: tuple[int, int]) -> None:
        table = {row[0]: tuple(row[1:]) for row in state.get(HELD, torch.zeros(0, 3, dtype=torch.int64)).tolist()}
        for client in clients.ids:
            # A client that failed may or may not have applied the update.
            table[client] = NOTHING if client in clients.failures else held
        state[HELD] = torch.tensor([[client, *pair] for client, pair in sorted(table.items())], dtype=torch.int64)

    @on_client
    def walk(self, client: Client, ask: Payload) -> Payload:
        """Rebuild the server's weights, take two-point steps, and report the scalar gradients."""
        request = self.pools.request(ask.tensors[BODY], client.round)
        self._receive(client, request)
        perturbed = self.perturbed(client.model)
        point = self.pools.point(client.seed, client.state, num_pools=request.pool + 1)
        if request.digest != seed_log.NO_DIGEST and (digest := perturbed.digest(point)) != request.digest:
            raise WrongWeights(
                f"the rebuilt weights hash to {digest.hex()}, the server's to {request.digest.hex()}: base model, dtype, "
                "tied tensors or trained parameters differ; give this site the server's model"
            )
        pool = point.pool
        seeds = pool.sample(client.round, client.id, self.steps, weights=self.pools.weights(request.levels))
        spec, first = replace(client.train, batch_size=self.batch_size), (client.round - 1) * self.steps
        batches = training.batches(client.data, spec, first=first, count=self.steps, order=client.order)
        result = two_point.take_steps(
            perturbed,
            point,
            seeds.tolist(),
            batches,
            two_point.StepSettings(self.eps, self.lr, self.max_scalar_gradient),
        )
        weight = len(client.data) if self.client_weighting == "examples" else 1
        report = Report(weight, result.loss, result.skipped, result.gradients)
        if self.disclose == "scalars":
            return Payload({BODY: seed_log.to_tensor(report.pack(self.bits_up))})
        return self._own_sums(report, report.sums(seeds, self.num_seeds))

    def _own_sums(self, report: Report, sums: Floats) -> Payload:
        tensors = {"slopes": torch.from_numpy(sums[0]).float()}
        if self.sampling != "uniform":
            # The weighted mean of these over the weighted mean of `share` is the unweighted mean.
            tensors["tried"] = torch.from_numpy(sums[1:] / report.weight).float()
            tensors["share"] = torch.tensor([1 / report.weight])
        return Payload(tensors, {"weight": report.weight, "train_loss": report.loss})

    def _receive(self, client: Client, request: Request) -> None:
        """Bring the client's coefficients in sync with the server's."""
        try:
            self.pools.receive(client.state, request.updates)
        except KilofedError as error:
            raise ClientError(
                f"the server's update does not match this client's state ({error}); if its state folder was changed or "
                "restored, wait: the next round sends the whole state"
            ) from error

    def messages(self, preview: RunPreview) -> dict[int, Sequence[Message]]:
        """With simulated gradients: the length of the coded message depends slightly on their values."""
        state, held, gradients = self._simulate(preview)
        digest = bytes(len(seed_log.NO_DIGEST))
        request = Request(held_by_server(state)[0], digest, self.pools.updates(state, held), self.pools.levels(state))
        ask = Payload({BODY: request.pack()})
        return {client: [self._message(preview, client, ask, gradients)] for client in preview.ids}

    def _message(self, preview: RunPreview, client: int, ask: Payload, gradients: Floats) -> Message:
        weight = len(preview.rows_of(client)) if self.client_weighting == "examples" else 1
        report = Report(weight, 1.0, (), gradients)
        if self.disclose == "scalars":
            return Message("walk", "call", ask, Payload({BODY: seed_log.to_tensor(report.pack(self.bits_up))}))
        return Message("walk", "mean", ask, self._own_sums(report, np.zeros((3, self.num_seeds))))

    def _simulate(self, preview: RunPreview) -> tuple[dict[str, Tensor], tuple[int, int], Floats]:
        """The server's state before the round, what clients hold, and gradients, all for normally distributed gradients."""
        state: dict[str, Tensor]
        at, state, held = cast(
            tuple[int, dict[str, Tensor], tuple[int, int]], preview.cache.get(BODY, (0, {}, (0, 0)))
        )
        rng = np.random.default_rng(0)
        while at < preview.round:
            at += 1
            self.pools.begin(state, at)
            if at == preview.round:
                break
            held = held_by_server(state)
            reports = {client: Report(1, 1.0, (), rng.normal(size=self.steps)) for client in preview.ids}
            state[log_name(at)] = seed_log.pack_reports(
                {client: one.pack(self.bits_up) for client, one in reports.items()}
            )
            self.pools.apply(preview.recipe.seed, state, at)
        preview.cache[BODY] = at - 1, state, held
        return state, held, rng.normal(size=self.steps)

    def costs(self) -> Costs:
        return TwoPointSteps(self.steps, self.batch_size)

    def presentation(self) -> "SeedCharts":
        return SeedCharts(self)

    def deliver(self, server: Server) -> nn.Module:
        # A copy: server.model holds w0, which clients of this process share.
        model = copy.deepcopy(server.model)
        return self.perturbed(model).merge(self.pools.point(server.seed, server.state))


@dataclass(frozen=True)
class SeedCharts(Presentation):
    """Charts of the pool's coefficients and of the sampling probabilities of its seeds."""

    method: FedKSeed

    def charts(self, server: Server, rows: Sequence[Example]) -> list[Chart]:
        num = self.method.num_seeds
        coefficients = self.method.pools.coefficients(server.state, held_by_server(server.state)[0])
        magnitudes = np.sort(np.abs(coefficients))[::-1]
        charts = [
            Chart(
                "Coefficients of the directions",
                f"{int((magnitudes > 0).sum())} of {num} directions of the pool have one; the largest first.",
                "directions, largest coefficient first",
                "magnitude of the coefficient",
                {"coefficients": ranked(magnitudes)},
            )
        ]
        if self.method.sampling == "uniform":
            return charts
        probabilities = num * np.sort(self.method.pools.probabilities(server.state))[::-1]
        text = (
            f"{int((server.state[SUMS][2] > 0).sum())} seeds were drawn. The largest probability is "
            f"{probabilities[0] / probabilities[-1]:.2f} times the smallest; the rule allows at most 2.72."
        )
        lines = {self.method.sampling: ranked(probabilities), "uniform": ((1.0, 1.0), (float(num), 1.0))}
        return [
            *charts,
            Chart(
                "Sampling probabilities of the seeds",
                text,
                "seeds, most probable first",
                "probability times K",
                lines,
            ),
        ]


def ranked(values: npt.NDArray[np.floating]) -> tuple[tuple[float, float], ...]:
    """(rank from 1, value) for at most 200 values, evenly spaced, the first and the last among them."""
    chosen = np.unique(np.linspace(0, len(values) - 1, 200).round().astype(int))
    return tuple((float(i + 1), float(values[i])) for i in chosen)


def _numbers(reply: Payload) -> dict[str, float]:
    return {name: float(value) for name, value in reply.scalars.items()}
