"""Message formats of a seed-pool run: requests down, reports up, and each seed's sampling probability.

Source of the probabilities: FedKSeed-Pro (Qin et al. 2024, arXiv:2312.06353), `calculate_probabilities` in its code.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kilofed.errors import PayloadError
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
        """(n,) uint8."""
        parts = [_REQUEST.pack(self.pool, self.digest, len(self.updates))]
        parts += [_UPDATE.pack(pool, len(body)) + body for pool, body in self.updates]
        return to_tensor(b"".join([*parts, self.levels]))

    @staticmethod
    def unpack(tensor: Tensor) -> "Request":
        """Decode a request. Raises PayloadError: truncated."""
        data = to_bytes(tensor)
        try:
            pool, digest, count = _REQUEST.unpack_from(data)
            at, updates = _REQUEST.size, []
            for _ in range(count):
                number, length = _UPDATE.unpack_from(data, at)
                at += _UPDATE.size + length
                updates.append((number, data[at - length : at]))
        except struct.error as error:
            raise PayloadError(f"the request of {len(data)} bytes is truncated") from error
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
        """Encode the report; `bits` as in `codec.encode_scalars`."""
        skipped = struct.pack(f"<{len(self.skipped)}H", *self.skipped)
        head = _REPORT.pack(self.weight, self.loss, len(self.skipped))
        return head + skipped + codec.encode_scalars(self.gradients, bits=bits)

    @staticmethod
    def unpack(data: bytes, *, num_steps: int, max_gradient: float) -> "Report":
        """Decode a report.

        Raises:
            PayloadError: damaged, of another number of steps, or with a number out of range.
        """
        try:
            weight, loss, count = _REPORT.unpack_from(data)
            skipped = struct.unpack_from(f"<{count}H", data, _REPORT.size)
        except struct.error as error:
            raise PayloadError(f"the report of {len(data)} bytes is truncated") from error
        gradients = codec.decode_scalars(data[_REPORT.size + 2 * count :])
        if len(gradients) != num_steps or not all(step < num_steps for step in skipped):
            raise PayloadError(f"{len(gradients)} gradients in the report; expected {num_steps}")
        # The largest quantised value may exceed the limit by a float32 rounding error.
        if (largest := float(np.abs(gradients).max())) > max_gradient * (1 + 1e-6):
            raise PayloadError(f"a gradient of magnitude {largest:g} in the report; expected at most {max_gradient:g}")
        if not weight or not math.isfinite(loss):
            raise PayloadError(
                f"weight {weight} and loss {loss} in the report; expected a positive weight and a finite loss"
            )
        return Report(weight, loss, skipped, gradients)

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


def pack_reports(replies: Mapping[int, bytes]) -> Tensor:
    """Encode one round's reports by client as one record, (n,) uint8."""
    return to_tensor(b"".join(_ENTRY.pack(who, len(body)) + body for who, body in sorted(replies.items())))


def unpack_reports(record: Tensor) -> dict[int, bytes]:
    """Decode a record into reports by client. Raises PayloadError: truncated."""
    data, at, replies = to_bytes(record), 0, {}
    while at < len(data):
        if at + _ENTRY.size > len(data):
            raise PayloadError("the record of a round is truncated")
        who, length = _ENTRY.unpack_from(data, at)
        at += _ENTRY.size + length
        if at > len(data):
            raise PayloadError("the record of a round is truncated")
        replies[who] = data[at - length : at]
    return replies


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


def sampling_weights(levels: bytes) -> Integers | None:
    """Integer weights for SeedPool.sample, the same on server and client; None for uniform sampling."""
    if not levels:
        return None
    decoded = np.rint(codec.decode_scalars(levels)).astype(np.int64)
    if decoded.min() < 0 or decoded.max() > MAX_LEVEL:
        raise PayloadError(f"levels from {decoded.min()} to {decoded.max()}; expected 0 to {MAX_LEVEL}")
    table = np.array([round(1000 * math.exp(level / MAX_LEVEL)) for level in range(MAX_LEVEL + 1)], dtype=np.int64)
    return np.asarray(table[decoded], dtype=np.int64)


def to_tensor(data: bytes) -> Tensor:
    """(n,) uint8."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def to_bytes(tensor: Tensor) -> bytes:
    """The inverse of `to_tensor`. Raises PayloadError: not uint8."""
    if tensor.dtype != torch.uint8:
        raise PayloadError(f"{tensor.dtype} where bytes were expected")
    return tensor.numpy().tobytes()
