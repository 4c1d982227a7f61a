"""The seed pools of a run and their coefficients, as named tensors in the state of server and clients.

Source: FedKSeed (Qin et al. 2024, arXiv:2312.06353). The server sums the clients' projected gradients exactly; the
coefficients that it shares with the clients are quantised with error feedback (`codec`). A run may use one pool after
the other: the coefficients of earlier pools stay fixed.

Differs: one client's gradients are limited to a multiple of the median client's largest magnitude of the round, so that
none moves the model further than its weight allows, whatever it sends.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kilofed.errors import PayloadError
from kilofed.zeroth import codec, seed_log
from kilofed.zeroth.directions.pool import SeedPool
from kilofed.zeroth.seed_log import Floats, Report, Request
from kilofed.zeroth.two_point import Point

SUMS, VERSIONS = "sums", "versions"
"""Names in the server's state: sums of the current pool, (1 or 3, K); number of updates of each pool, (num_pools,)."""
Held = tuple[int, int]
"""What a client holds: index of its latest pool and the version of that pool's coefficients."""
NOTHING: Held = (-1, -1)
"""What a client holds whose state is not known."""
MIN_COMPARED = 3
"""Clients that a round's median needs."""


@dataclass(frozen=True)
class SeedPools:
    """Hyperparameters of a run's pools, and the operations on a state that depend on them."""

    num_seeds: int
    """K."""
    steps: int
    """Steps per report."""
    lr: float
    sampling: seed_log.Sampling
    bits: int
    """Bits of a coefficient's change, 2 to 16; 32 sends all K as float32."""
    rounds_per_pool: int
    """Rounds after which a new pool begins; 0 for one pool."""
    max_gradient: float
    """Largest magnitude of a gradient in a report."""
    max_ratio: float = 10.0
    """Gradients above this many times the median client's largest magnitude of the round are limited to it; 0 limits
    none. Lower bounds what a hostile client can do more tightly, and cuts honest clients whose losses are steeper."""

    def pool(self, seed: int, index: int) -> SeedPool:
        """Pool number `index` of the run with that seed."""
        digest = hashlib.sha256(f"{seed}/{index}/fedkseed".encode()).digest()
        return SeedPool(self.num_seeds, int.from_bytes(digest[:8], "little"))

    def index(self, round: int) -> int:
        """Number of the pool of round `round` (from 1)."""
        return (round - 1) // self.rounds_per_pool if self.rounds_per_pool else 0

    def begin(self, state: dict[str, Tensor], round: int) -> None:
        """Prepare the server's state for round `round` (from 1): add a new pool if one begins."""
        index = self.index(round)
        versions = state.get(VERSIONS, torch.zeros(0, dtype=torch.int64))
        if len(versions) == index + 1:
            return
        state[VERSIONS] = torch.cat([versions, torch.zeros(1, dtype=torch.int64)])
        state[SUMS] = torch.zeros(3 if self.sampling != "uniform" else 1, self.num_seeds, dtype=torch.float64)

    def apply(
        self, seed: int, state: dict[str, Tensor], round: int, *, without: frozenset[int] = frozenset()
    ) -> dict[str, float]:
        """Add a round's record to the sums and update the shared coefficients.

        Args:
            without: clients whose gradients are left out; sampling probabilities still count them.

        Returns:
            Metrics of the round; `limited_gradients` is among them only where gradients were limited.

        Raises:
            PayloadError: the record is damaged.
        """
        record, index = state[log_name(round)], len(state[VERSIONS]) - 1
        if record.is_floating_point():
            sums, metrics = record.numpy().copy(), dict[str, float]()
        else:
            sums, metrics = self._sum(self.pool(seed, index), state, round, without)
        state[SUMS] = state[SUMS] + torch.from_numpy(sums[: len(state[SUMS])])
        self._update(state, index)
        values = self.coefficients(state, index)
        return {**metrics, "seeds_moved": int((values != 0).sum()), "largest_step": float(np.abs(values).max())}

    def point(self, seed: int, state: Mapping[str, Tensor], *, num_pools: int = 0) -> Point:
        """The weights of a server's state, or of a client's with its number of pools."""
        count = num_pools or len(state[VERSIONS])
        return Point(tuple(self.pool(seed, i).at(self.coefficients(state, i)) for i in range(count)))

    def coefficients(self, state: Mapping[str, Tensor], index: int) -> npt.NDArray[np.float32]:
        """(K,) coefficients of one pool."""
        body = state.get(state_name(index))
        if body is not None and self.bits == 32:
            return codec.decode_scalars(seed_log.to_bytes(body), count=self.num_seeds).astype(np.float32)
        return self._codec_state(state, index).values

    def report(self, body: bytes) -> Report:
        """Decode a client's report. Raises PayloadError: damaged or out of range."""
        return Report.unpack(body, num_steps=self.steps, max_gradient=self.max_gradient)

    def request(self, body: Tensor, round: int) -> Request:
        """Decode the server's request of a round. Raises PayloadError: damaged, or not one of this run and round."""
        request = Request.unpack(body, pool=self.index(round))
        if (request.levels == b"") != (self.sampling == "uniform"):
            raise PayloadError(
                f"{len(request.levels)} bytes of sampling probabilities in the request; method.sampling is {self.sampling}"
            )
        return request

    def weights(self, levels: bytes) -> seed_log.Integers | None:
        """Integer weights for SeedPool.sample from a request's levels. Raises PayloadError: damaged or of another K."""
        return seed_log.sampling_weights(levels, num_seeds=self.num_seeds)

    def limits(self, record: Tensor) -> dict[int, int]:
        """The number of gradients that are limited in a round's record, by client, where there are any.

        Raises:
            PayloadError: the record is damaged.
        """
        if record.is_floating_point():
            return {}
        return self._limit(self._reports(record), frozenset())[1]

    def probabilities(self, state: Mapping[str, Tensor]) -> Floats:
        """(K,) sampling probabilities of the current pool's seeds; not for uniform sampling."""
        return seed_log.probabilities(self._amplitudes(state))

    def levels(self, state: Mapping[str, Tensor]) -> bytes:
        """The encoded sampling probabilities for a request; empty for uniform sampling."""
        return b"" if self.sampling == "uniform" else seed_log.encode_levels(self._amplitudes(state))

    def updates(self, state: Mapping[str, Tensor], held: Held) -> tuple[tuple[int, bytes], ...]:
        """The codec messages that bring a client in sync, by pool: a delta if it is one version behind, else all K."""
        found = []
        for index, version in enumerate(state[VERSIONS].tolist()):
            behind = version - held[1] if index == held[0] else version
            if index < held[0] or behind == 0:
                continue
            delta = state.get(f"delta.{index:03d}")
            in_sync = index >= held[0] >= 0 and behind == 1
            body = delta if in_sync and delta is not None else state[state_name(index)]
            found.append((index, seed_log.to_bytes(body)))
        return tuple(found)

    def receive(self, state: dict[str, Tensor], updates: Iterable[tuple[int, bytes]]) -> None:
        """Apply `updates` to a client's state. Raises PayloadError: a message is damaged or does not fit the state."""
        for index, body in updates:
            if self.bits == 32:
                if body[:1] != bytes([codec.FLOATS]):
                    raise PayloadError("coefficients that are not float32 in the request; method.bits_down is 32")
                codec.decode_scalars(body, count=self.num_seeds)
            else:
                body = codec.encode_state(codec.receive(self._codec_state(state, index), body, count=self.num_seeds))
            state[state_name(index)] = seed_log.to_tensor(body)

    def _amplitudes(self, state: Mapping[str, Tensor]) -> Floats:
        _, magnitudes, counts = state[SUMS].numpy()
        return seed_log.normalized_amplitudes(magnitudes, counts, self.sampling)

    def _codec_state(self, state: Mapping[str, Tensor], index: int) -> codec.State:
        body = state.get(state_name(index))
        if body is None:
            return codec.State.zeros(self.num_seeds)
        return codec.receive(None, seed_log.to_bytes(body), count=self.num_seeds)

    def _reports(self, record: Tensor) -> dict[int, Report]:
        return {client: self.report(body) for client, body in seed_log.unpack_reports(record).items()}

    def _limit(
        self, reports: Mapping[int, Report], without: frozenset[int]
    ) -> tuple[dict[int, Report], dict[int, int]]:
        """The reports with gradients within the bound of the round, and how many each client had beyond it.

        The bound is a function of the reports alone, those `without` left aside, so that a replay finds it again.
        """
        largest = {client: float(np.abs(one.gradients).max(initial=0)) for client, one in reports.items()}
        counted = [one for client, one in largest.items() if one > 0 and client not in without]
        # Of two clients, neither can be told to be the odd one.
        if not self.max_ratio or len(counted) < MIN_COMPARED:
            return dict(reports), {}
        bound = self.max_ratio * float(np.median(counted))
        limited = {
            client: replace(one, gradients=one.gradients.clip(-bound, bound)) for client, one in reports.items()
        }
        counts = {client: int((np.abs(one.gradients) > bound).sum()) for client, one in reports.items()}
        return limited, {client: count for client, count in counts.items() if count}

    def _sum(
        self, pool: SeedPool, state: Mapping[str, Tensor], round: int, without: frozenset[int]
    ) -> tuple[Floats, dict[str, float]]:
        """(3, K): weighted mean of gradients, sums of magnitudes, number of steps; and metrics."""
        weights = self.weights(self.levels(state))
        reports, limited = self._limit(self._reports(state[log_name(round)]), without)
        total_weight = sum(report.weight for client, report in reports.items() if client not in without)
        sums = np.zeros((3, self.num_seeds))
        for client, report in reports.items():
            own = report.sums(pool.sample(round, client, self.steps, weights=weights), self.num_seeds)
            sums[1:] += own[1:]
            if client not in without:
                sums[0] += own[0] * (report.weight / total_weight)
        weight = sum(report.weight for report in reports.values())
        loss = math.fsum(report.loss * report.weight for report in reports.values()) / weight
        skipped = sum(len(report.skipped) for report in reports.values())
        metrics: dict[str, float] = {"train_loss": loss, "skipped_steps": skipped}
        return sums, metrics | ({"limited_gradients": sum(limited.values())} if limited else {})

    def _update(self, state: dict[str, Tensor], index: int) -> None:
        """Move the shared coefficients of the current pool to the exact sums; keep the delta for clients in sync."""
        exact = -self.lr * state[SUMS][0].numpy()
        for name in [name for name in state if name.startswith("delta.")]:
            del state[name]
        if self.bits == 32:
            body = codec.encode_scalars(exact, bits=32)
        else:
            after, delta = codec.advance(self._codec_state(state, index), exact, bits=self.bits)
            body = codec.encode_state(after)
            state[f"delta.{index:03d}"] = seed_log.to_tensor(delta)
        state[state_name(index)] = seed_log.to_tensor(body)
        state[VERSIONS] = state[VERSIONS] + (torch.arange(len(state[VERSIONS])) == index)


def held_by_server(state: Mapping[str, Tensor]) -> Held:
    """What a client holds that is in sync with this server's state."""
    return len(state[VERSIONS]) - 1, int(state[VERSIONS][-1])


def state_name(index: int) -> str:
    """Name of the coefficients of a pool in the state of server and clients."""
    return f"state.{index:03d}"


def log_name(round: int) -> str:
    """Name of a round's record in the server's state."""
    return f"log.{round:06d}"


def check_name(round: int) -> str:
    """Name of the digests of a round's record in the server's state."""
    return f"check.{round:06d}"


def digest_name(round: int) -> str:
    """Name of the digest of the weights with which a round begins, in the server's state."""
    return f"digest.{round:06d}"
