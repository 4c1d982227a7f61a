"""Message formats of a seed-pool run: requests down, reports up, and each seed's sampling probability.

Source of the probabilities: FedKSeed-Pro (Qin et al. 2024, arXiv:2312.06353), `calculate_probabilities` in its code.
"""

import hashlib
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kilofed.errors import KilofedError, PayloadError
from kilofed.zeroth import codec

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Sampling = Literal["uniform", "pro", "pro-unbiased"]

MAX_LEVEL = 15
"""Amplitudes are sent as integers from 0 to this."""
MAX_AMPLITUDE = 1000.0
"""Gradients are clipped to this magnitude for the sampling probabilities; the update is not clipped."""
NO_DIGEST = bytes(8)

_REQUEST = struct.Struct("<H8sB")
_UPDATE = struct.Struct("<HI")
_REPORT = struct.Struct("<IfH")
_ENTRY = struct.Struct("<II")


@dataclass(frozen=True)
class Request:
    """What a client needs to rebuild the server's weights and draw its directions."""

    pool: int
    """Index of the current pool, from 0."""
    digest: bytes = NO_DIGEST
    """8-byte hash that the rebuilt weights must have; NO_DIGEST skips the check."""
    updates: tuple[tuple[int, bytes], ...] = ()
    """(pool index, codec message) that bring the client's coefficients in sync with the server's."""
    levels: bytes = b""
    """Normalized amplitudes of the seeds from `encode_levels`; empty for uniform sampling."""

    def pack(self) -> Tensor:
        """(n,) uint8. Raises KilofedError: more than 255 updates."""
        if len(self.updates) > 255:
            raise KilofedError(
                f"a client that holds nothing needs {len(self.updates)} pools; a request holds at most 255: "
                "raise method.rounds_per_pool"
            )
        parts = [_REQUEST.pack(self.pool, self.digest, len(self.updates))]
        parts += [_UPDATE.pack(pool, len(body)) + body for pool, body in self.updates]
        return to_tensor(b"".join([*parts, self.levels]))

    @staticmethod
    def unpack(tensor: Tensor, *, pool: int) -> "Request":
        """Decode a request of a round that uses pool number `pool`.

        Raises:
            PayloadError: truncated, for another pool, or with updates of pools that are not there yet.
        """
        data = to_bytes(tensor)
        try:
            sent, digest, count = _REQUEST.unpack_from(data)
        except struct.error as error:
            raise PayloadError(f"the request of {len(data)} bytes is truncated") from error
        if sent != pool or count > pool + 1:
            raise PayloadError(
                f"a request for pool {sent} with {count} updates; expected pool {pool} and at most {pool + 1}"
            )
        at, updates = _REQUEST.size, list[tuple[int, bytes]]()
        for _ in range(count):
            number, body = _entry(data, at, _UPDATE, "request")
            if number > pool or (updates and number <= updates[-1][0]):
                raise PayloadError(f"an update of pool {number} in the request; expected pools up to {pool} in order")
            updates.append((number, body))
            at += _UPDATE.size + len(body)
        return Request(pool, digest, tuple(updates), data[at:])


@dataclass(frozen=True)
class Report:
    """What one client sends after its local steps of one round."""

    weight: int
    """Examples it holds, or 1."""
    loss: float
    """Mean training loss, nats per token."""
    skipped: tuple[int, ...]
    """Numbers of the steps that were skipped."""
    gradients: Floats
    """(num_steps,) projected gradients, 0 where skipped."""

    def pack(self, bits: int) -> bytes:
        """Encode the report; `bits` as in `codec.encode_scalars`. Raises KilofedError: a number that does not fit."""
        try:
            skipped = struct.pack(f"<{len(self.skipped)}H", *self.skipped)
            head = _REPORT.pack(self.weight, self.loss, len(self.skipped))
        except (struct.error, OverflowError) as error:
            raise KilofedError(
                f"a report of weight {self.weight}, loss {self.loss} and {len(self.skipped)} skipped steps cannot be "
                f"sent ({error}); expected a weight below 2**32, a loss in float32 and steps below 2**16"
            ) from error
        return head + skipped + codec.encode_scalars(self.gradients, bits=bits)

    @staticmethod
    def unpack(data: bytes, *, num_steps: int, max_gradient: float) -> "Report":
        """Decode a report.

        Raises:
            PayloadError: damaged, of another number of steps, or with a number out of range.
        """
        try:
            weight, loss, count = _REPORT.unpack_from(data)
            if count > num_steps:
                raise PayloadError(f"{count} skipped steps in the report; expected at most {num_steps}")
            skipped = struct.unpack_from(f"<{count}H", data, _REPORT.size)
        except struct.error as error:
            raise PayloadError(f"the report of {len(data)} bytes is truncated") from error
        if any(step <= before for before, step in pairwise(skipped)) or (skipped and skipped[-1] >= num_steps):
            raise PayloadError(
                f"skipped steps out of order or out of range; expected ascending ones below {num_steps}"
            )
        if not weight or not math.isfinite(loss):
            raise PayloadError(
                f"weight {weight} and loss {loss} in the report; expected a positive weight and a finite loss"
            )
        gradients = codec.decode_scalars(data[_REPORT.size + 2 * count :], count=num_steps)
        # The largest quantised value may exceed the limit by a float32 rounding error.
        if (largest := float(np.abs(gradients).max(initial=0))) > max_gradient * (1 + 1e-6):
            raise PayloadError(f"a gradient of magnitude {largest:g} in the report; expected at most {max_gradient:g}")
        if gradients[list(skipped)].any():
            raise PayloadError("a gradient of a skipped step in the report; expected 0")
        return Report(weight, loss, skipped, gradients)

    @staticmethod
    def max_bytes(num_steps: int) -> int:
        """Length of the longest report of `num_steps` steps: float32 gradients, every step skipped."""
        return _REPORT.size + 2 * num_steps + len(codec.encode_scalars(np.zeros(0), bits=32)) + 4 * num_steps

    def sums(self, seeds: Integers, num_seeds: int) -> Floats:
        """(3, K): sums of gradients, of their clipped magnitudes, and the number of steps of each seed."""
        drawn = np.ones(len(seeds))
        drawn[list(self.skipped)] = 0
        total = np.zeros((3, num_seeds))
        for row, values in zip(
            total, (self.gradients, np.minimum(np.abs(self.gradients), MAX_AMPLITUDE), drawn), strict=True
        ):
            np.add.at(row, seeds, values)
        return total


def with_weight(report: bytes, weight: int) -> bytes:
    """A packed report with another weight."""
    _, loss, num_skipped = _REPORT.unpack_from(report)
    return _REPORT.pack(weight, loss, num_skipped) + report[_REPORT.size :]


def pack_reports(replies: Mapping[int, bytes]) -> Tensor:
    """Encode one round's reports by client as one record, (n,) uint8."""
    return to_tensor(b"".join(_ENTRY.pack(who, len(body)) + body for who, body in sorted(replies.items())))


def unpack_reports(record: Tensor) -> dict[int, bytes]:
    """Decode a record into reports by client, in ascending order. Raises PayloadError: truncated, or in no such order."""
    data, at, replies, last = to_bytes(record), 0, dict[int, bytes](), -1
    while at < len(data):
        who, body = _entry(data, at, _ENTRY, "record of a round")
        if who <= last:
            raise PayloadError(
                f"client {who} after client {last} in the record of a round; expected ascending numbers"
            )
        replies[who], last = body, who
        at += _ENTRY.size + len(body)
    return replies


def record_digests(round: int, record: Tensor) -> Tensor:
    """(num_clients, 8) uint8: a hash of each report in the record of round `round`, in the order of clients.

    A record of sums, where no single report is there, has one. Raises PayloadError: the record is damaged.
    """
    sums = record.is_floating_point()
    parts = {-1: record.contiguous().numpy().tobytes()} if sums else unpack_reports(record)
    bodies = [struct.pack("<qq", round, who) + body for who, body in parts.items()]
    digests = [hashlib.blake2b(body, digest_size=8).digest() for body in bodies]
    return to_tensor(b"".join(digests)).reshape(-1, 8)


def _entry(data: bytes, at: int, head: struct.Struct, what: str) -> tuple[int, bytes]:
    """The number and the bytes of the entry at `at`. Raises PayloadError: it goes beyond the end."""
    if at + head.size <= len(data):
        number, length = head.unpack_from(data, at)
        if at + head.size + length <= len(data):
            return int(number), data[at + head.size : at + head.size + length]
    raise PayloadError(f"the {what} of {len(data)} bytes is truncated")


def normalized_amplitudes(amplitudes: Floats, counts: Floats, sampling: Sampling) -> Floats:
    """(K,) in [0, 1]: mean gradient magnitude of each seed, min-max normalized over the pool.

    Args:
        amplitudes: (K,) sums of clipped gradient magnitudes.
        counts: (K,) number of steps taken with each seed.
        sampling: pro adds one gradient of 0 to every seed's mean, as the paper does, which lowers seeds that were
            rarely drawn; pro-unbiased takes plain means, and the overall mean for a seed that was never drawn.
    """
    amplitudes, counts = np.maximum(amplitudes, 0), np.maximum(counts, 0)
    if sampling == "pro":
        means = amplitudes / (counts + 1)
    else:
        overall = amplitudes.sum() / counts.sum() if counts.sum() else 0.0
        means = np.divide(amplitudes, counts, out=np.full_like(amplitudes, overall), where=counts > 0)
    lowest, highest = means.min(), means.max()
    normalized: Floats = (means - lowest) / (highest + 1e-10 - lowest)
    return normalized


def probabilities(amplitudes: Floats) -> Floats:
    """(K,) with sum 1: softmax of the normalized amplitudes; the ratio of two probabilities is at most e."""
    powers = np.exp(amplitudes - amplitudes.max())
    softmax: Floats = powers / powers.sum()
    return softmax


def encode_levels(amplitudes: Floats) -> bytes:
    """Quantise normalized amplitudes to 0 ... MAX_LEVEL: log-probabilities within 1 / 30 nats of the exact ones."""
    return codec.encode_scalars(np.rint(amplitudes * MAX_LEVEL), bits=5)


def sampling_weights(levels: bytes, *, num_seeds: int) -> Integers | None:
    """(K,) integer weights for SeedPool.sample, the same on server and client; None for uniform sampling.

    Raises:
        PayloadError: damaged, of another K, or out of range.
    """
    if not levels:
        return None
    rounded = np.rint(codec.decode_scalars(levels, count=num_seeds))
    if rounded.min() < 0 or rounded.max() > MAX_LEVEL:
        raise PayloadError(f"levels from {rounded.min():g} to {rounded.max():g}; expected 0 to {MAX_LEVEL}")
    decoded = rounded.astype(np.int64)
    table = np.array([round(1000 * math.exp(level / MAX_LEVEL)) for level in range(MAX_LEVEL + 1)], dtype=np.int64)
    return np.asarray(table[decoded], dtype=np.int64)


def to_tensor(data: bytes) -> Tensor:
    """(n,) uint8."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def to_bytes(tensor: Tensor) -> bytes:
    """The inverse of `to_tensor`. Raises PayloadError: not uint8 in one dimension."""
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        raise PayloadError(f"{tensor.dtype} of shape {tuple(tensor.shape)} where bytes were expected")
    return tensor.numpy().tobytes()
