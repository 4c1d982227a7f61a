"""What a seed-pool run sends and records, as bytes: orders down, reports up, and each seed's chance of being drawn.

Source of the chances: FedKSeed-Pro (Qin et al. 2024, arXiv:2312.06353), `calculate_probabilities` of the authors' code.
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

TOP_LEVEL = 15
"""Chances travel as whole numbers from 0 to this."""
CLIP = 1000.0
"""Slopes count at most this much in the chances; the update is not clipped."""
NO_DIGEST = bytes(8)

_ORDER = struct.Struct("<H8sB")
_MESSAGE = struct.Struct("<HI")
_REPORT = struct.Struct("<IfH")
_ENTRY = struct.Struct("<II")


@dataclass(frozen=True)
class Order:
    """What a client needs to stand where the server stands."""

    epoch: int
    """Number of the pool in hand, from 0."""
    digest: bytes = NO_DIGEST
    """8 bytes that the rebuilt weights must have; NO_DIGEST asks for no check."""
    messages: tuple[tuple[int, bytes], ...] = ()
    """(epoch, codec message) that take the client's states to the server's."""
    levels: bytes = b""
    """Chances of the seeds as `encode_scalars` writes levels; empty for equal ones."""

    def pack(self) -> Tensor:
        """(n,) uint8."""
        parts = [_ORDER.pack(self.epoch, self.digest, len(self.messages))]
        parts += [_MESSAGE.pack(epoch, len(body)) + body for epoch, body in self.messages]
        return to_tensor(b"".join([*parts, self.levels]))

    @staticmethod
    def unpack(tensor: Tensor) -> "Order":
        """The order in `tensor`. Raises PayloadError: cut off."""
        data = to_bytes(tensor)
        try:
            epoch, digest, count = _ORDER.unpack_from(data)
            at, messages = _ORDER.size, []
            for _ in range(count):
                number, length = _MESSAGE.unpack_from(data, at)
                at += _MESSAGE.size + length
                messages.append((number, data[at - length : at]))
        except struct.error as error:
            raise PayloadError(f"the order of {len(data)} bytes is cut off") from error
        return Order(epoch, digest, tuple(messages), data[at:])


@dataclass(frozen=True)
class Report:
    """What one client found in one round."""

    weight: int
    """Examples it holds, or 1."""
    loss: float
    """Mean training loss, nats per token."""
    skipped: tuple[int, ...]
    """Steps that found nothing."""
    slopes: Floats
    """(num_steps,), 0 where skipped."""

    def pack(self, bits: int) -> bytes:
        """The bytes of a reply; `bits` as in `codec.encode_scalars`."""
        skipped = struct.pack(f"<{len(self.skipped)}H", *self.skipped)
        head = _REPORT.pack(self.weight, self.loss, len(self.skipped))
        return head + skipped + codec.encode_scalars(self.slopes, bits=bits)

    @staticmethod
    def unpack(data: bytes, *, num_steps: int, max_slope: float) -> "Report":
        """The report in `data`.

        Raises:
            PayloadError: damaged, of another number of steps, or with a number that cannot be believed.
        """
        try:
            weight, loss, count = _REPORT.unpack_from(data)
            skipped = struct.unpack_from(f"<{count}H", data, _REPORT.size)
        except struct.error as error:
            raise PayloadError(f"a report of {len(data)} bytes is cut off") from error
        slopes = codec.decode_scalars(data[_REPORT.size + 2 * count :])
        if len(slopes) != num_steps or not all(step < num_steps for step in skipped):
            raise PayloadError(f"{len(slopes)} slopes in the report; expected {num_steps}")
        # The grid of the wire may overshoot its largest number by a rounding of float32.
        if (largest := float(np.abs(slopes).max())) > max_slope * (1 + 1e-6):
            raise PayloadError(f"a slope of size {largest:g} in the report; expected at most {max_slope:g}")
        if not weight or not math.isfinite(loss):
            raise PayloadError(f"weight {weight} and loss {loss} in the report; expected finite ones above 0")
        return Report(weight, loss, skipped, slopes)

    def sums(self, seeds: Integers, num_seeds: int) -> Floats:
        """(3, K): slopes, their clipped sizes, and how often each seed was tried."""
        tried = np.ones(len(seeds))
        tried[list(self.skipped)] = 0
        total = np.zeros((3, num_seeds))
        for row, values in zip(total, (self.slopes, np.minimum(np.abs(self.slopes), CLIP), tried), strict=True):
            np.add.at(row, seeds, values)
        return total


def pack_log(replies: Mapping[int, bytes]) -> Tensor:
    """One round's replies as one record, (n,) uint8."""
    return to_tensor(b"".join(_ENTRY.pack(who, len(body)) + body for who, body in sorted(replies.items())))


def unpack_log(record: Tensor) -> dict[int, bytes]:
    """The replies in a record, by client. Raises PayloadError: cut off."""
    data, at, replies = to_bytes(record), 0, {}
    while at < len(data):
        if at + _ENTRY.size > len(data):
            raise PayloadError("the record of a round is cut off")
        who, length = _ENTRY.unpack_from(data, at)
        at += _ENTRY.size + length
        if at > len(data):
            raise PayloadError("the record of a round is cut off")
        replies[who] = data[at - length : at]
    return replies


def interest(sizes: Floats, counts: Floats, sampling: Sampling) -> Floats:
    """(K,) in [0, 1]: how large a seed's slopes were, between the smallest and the largest of all.

    Args:
        sizes: (K,) sums of clipped absolute slopes.
        counts: (K,) how often each seed was tried.
        sampling: pro counts a slope of 0 for every seed, as the paper does, which punishes seeds that were rarely
            drawn; pro-unbiased takes plain means, and the mean of all for a seed that was never drawn.
    """
    sizes, counts = np.maximum(sizes, 0), np.maximum(counts, 0)
    if sampling == "pro":
        means = sizes / (counts + 1)
    else:
        whole = sizes.sum() / counts.sum() if counts.sum() else 0.0
        means = np.divide(sizes, counts, out=np.full_like(sizes, whole), where=counts > 0)
    lowest, highest = means.min(), means.max()
    scaled: Floats = (means - lowest) / (highest + 1e-10 - lowest)
    return scaled


def probabilities(interests: Floats) -> Floats:
    """(K,) with sum 1: softmax of `interest`; the likeliest is e times as likely as the least likely at most."""
    powers = np.exp(interests - interests.max())
    chances: Floats = powers / powers.sum()
    return chances


def encode_levels(interests: Floats) -> bytes:
    """Interests as levels 0 to TOP_LEVEL: chances within 1 / 30 nats of the exact ones, few bytes."""
    return codec.encode_scalars(np.rint(interests * TOP_LEVEL), bits=5)


def integer_chances(levels: bytes) -> Integers | None:
    """Weights for SeedPool.sample, the same on server and client; None where all seeds are alike."""
    if not levels:
        return None
    found = np.rint(codec.decode_scalars(levels)).astype(np.int64)
    if found.min() < 0 or found.max() > TOP_LEVEL:
        raise PayloadError(f"levels from {found.min()} to {found.max()}; expected 0 to {TOP_LEVEL}")
    table = np.array([round(1000 * math.exp(level / TOP_LEVEL)) for level in range(TOP_LEVEL + 1)], dtype=np.int64)
    return np.asarray(table[found], dtype=np.int64)


def to_tensor(data: bytes) -> Tensor:
    """(n,) uint8."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def to_bytes(tensor: Tensor) -> bytes:
    """What `to_tensor` was given. Raises PayloadError: not uint8."""
    if tensor.dtype != torch.uint8:
        raise PayloadError(f"{tensor.dtype} where bytes were expected")
    return tensor.numpy().tobytes()
