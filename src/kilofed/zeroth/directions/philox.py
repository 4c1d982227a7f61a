"""Philox4x32-10, the counter-based generator behind every sign (Salmon et al. 2011, "As easy as 1, 2, 3").

One call turns a 128-bit counter and a 64-bit key into four 32-bit words. It has no state, so any word of any
stream can be computed directly, on any device, in integer arithmetic.
"""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import numba
import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]
Word = np.uint64
P = ParamSpec("P")
R = TypeVar("R")

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
NUM_ROUNDS = 10
LOW = 0xFFFFFFFF

_M0, _M1 = (np.uint64(m) for m in MULTIPLIERS)
_W0, _W1 = (np.uint64(w) for w in WEYL)
_LOW = np.uint64(LOW)
_HALF = np.uint64(32)


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Compile at the first call, without the interpreter lock; cache the machine code where a folder is writable."""
    try:
        kernel: Callable[P, R] = numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba found no writable cache folder: a read-only installation without a home folder.
        kernel = numba.njit(nogil=True)(function)
    return kernel


def inlined(function: Callable[P, R]) -> Callable[P, R]:
    """Compile a function into each kernel that calls it."""
    kernel: Callable[P, R] = numba.njit(inline="always")(function)
    return kernel


def philox(counter: npt.ArrayLike, key: npt.ArrayLike) -> Words:
    """Four words per counter, in plain numpy.

    Args:
        counter: (..., 4) integers below 2**32.
        key: (..., 2) integers below 2**32, broadcast against `counter`.

    Returns:
        (..., 4) words.
    """
    c0, c1, c2, c3 = np.moveaxis(np.asarray(counter, dtype=np.uint64), -1, 0)
    k0, k1 = np.moveaxis(np.asarray(key, dtype=np.uint64), -1, 0)
    for _ in range(NUM_ROUNDS):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (p1 >> _HALF) ^ c1 ^ k0, p1 & _LOW, (p0 >> _HALF) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3), axis=-1).astype(np.uint32)


def split64(value: int) -> tuple[int, int]:
    """The low and the high 32 bits of an integer below 2**64."""
    return value & LOW, value >> 32


@inlined
def philox_into(out: Words, row: int, column: int, counter: tuple[Word, Word, Word, Word], k0: Word, k1: Word) -> None:
    """Write the four words of one counter to out[row .. row + 3, column]. All integers are uint64 below 2**32."""
    c0, c1, c2, c3 = counter
    for _ in range(NUM_ROUNDS):
        p0 = (c0 & _LOW) * _M0
        p1 = (c2 & _LOW) * _M1
        c0 = (p1 >> _HALF) ^ c1 ^ k0
        c1 = p1 & _LOW
        c2 = (p0 >> _HALF) ^ c3 ^ k1
        c3 = p0 & _LOW
        k0 = (k0 + _W0) & _LOW
        k1 = (k1 + _W1) & _LOW
    out[row, column] = np.uint32(c0)
    out[row + 1, column] = np.uint32(c1)
    out[row + 2, column] = np.uint32(c2)
    out[row + 3, column] = np.uint32(c3)
