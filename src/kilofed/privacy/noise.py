"""Normal noise that nobody can foresee or take away without the key: SHAKE-256 in counter mode, then the normal quantile.

The hash of (key, purpose, parts, number of the chunk) gives 64 bits for each number: one is its sign, 63 its distance
from the middle, in steps that are finest in the tails. Equal inputs give equal noise, so that a resumed run goes on with
the same bytes; inputs that differ anywhere give noise that has nothing to do with each other.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

_CHUNK = 2**15
"""Numbers that are expanded at a time: 256 KiB of hash, so that all of it stays in the cache of a core."""


class Noise:
    """A stream of independent standard normal numbers.

    Args:
        key: 32 hex digits, the secret.
        purpose: what the noise is for; no null character.
        parts: what tells this stream from others of its purpose.
    """

    def __init__(self, key: str, purpose: str, *parts: int | bytes) -> None:
        texts = [purpose, *(part.hex() if isinstance(part, bytes) else str(part) for part in parts)]
        self._secret = bytes.fromhex(key) + "\0".join(texts).encode() + b"\0"
        self._num_chunks = 0

    def add_into(self, values: Tensor, deviation: float) -> None:
        """Add the stream's next numbers, `deviation` times each, to `values`: float64, contiguous, on the CPU."""
        flat = values.view(-1).numpy()
        for first in range(0, flat.size, _CHUNK):
            some = flat[first : first + _CHUNK]
            some += deviation * self._next(some.size)

    def _next(self, num: int) -> NDArray[np.float64]:
        secret = self._secret + self._num_chunks.to_bytes(8, "big")
        self._num_chunks += 1
        return quantiles(hashlib.shake_256(secret).digest(8 * num))


def quantiles(words: bytes) -> NDArray[np.float64]:
    """Standard normal numbers, one per 8 bytes: the top bit is the sign, the others the probability of the tail.

    All are finite; the largest that exist are 9.2 deviations away, where 1 in 2^64 is.
    """
    # scipy.special takes a quarter of a second to import, and most runs draw no noise.
    from scipy.special import ndtri

    drawn = np.frombuffer(words, dtype="<i8")
    # A half keeps it above 0; below 1/2 it is never rounded to where the quantile is infinite.
    tail = ((drawn & (2**63 - 1)).astype(np.float64) + 0.5) * 2.0**-64
    found: NDArray[np.float64] = np.copysign(ndtri(tail), drawn)
    return found
