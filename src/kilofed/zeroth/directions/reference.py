"""HSP-1 in plain torch: any device, any K, the same bits as the kernels, several thousand times slower.

This is the readable form of the specification. The sums are float32 and their order is part of the specification:
inside a row 1, 2, 4, 8; over rows 16, 32, ... R / 2 and then 1, 2, 4, 8.
"""

import torch
from torch import Tensor

from kilofed.zeroth.directions import spec
from kilofed.zeroth.directions.philox import LOW, MULTIPLIERS, NUM_ROUNDS, WEYL, split64

CHUNK_ELEMENTS = 1 << 22
"""Elements per chunk: bounds the memory, changes no bit."""


def rebuild(w0: Tensor, a: Tensor, key: int, first_block: int) -> Tensor:
    """round(w0 + sum_k a_k z_k).

    Args:
        w0: (n,) float32, bfloat16 or float16; element 0 is the first of `first_block`.
        a: (K,) float32 on the same device, not all zero.
        key: the pool's key, below 2**64.
        first_block: number of the block in which w0 starts.

    Returns:
        (n,) in the dtype of w0, rounded once to nearest, ties to even.
    """
    out = torch.empty_like(w0)
    span = max(1, CHUNK_ELEMENTS // len(a)) * len(a)
    for start in range(0, len(w0), span):
        part = w0[start : start + span]
        blocks = torch.arange(-(-len(part) // len(a)), device=w0.device) + (first_block + start // len(a))
        total = block_sums(a, key, blocks).reshape(-1)[: len(part)]
        out[start : start + span] = (part.float() + total).to(w0.dtype)
    return out


def block_sums(a: Tensor, key: int, blocks: Tensor) -> Tensor:
    """(blocks, K): sum_k a_k z_k over whole blocks, in the specification's order."""
    num_seeds = len(a)
    y = a.reshape(-1, spec.LANES)
    for distance in (1, 2, 4, 8):
        y = _butterfly(y, 1, distance)
    y = y * signs(blocks, spec.STREAM_E, key, num_seeds)
    for distance in spec.far_levels(num_seeds) + spec.near_levels(num_seeds):
        y = _butterfly(y, 1, distance)
    return (y * signs(blocks, spec.STREAM_D, key, num_seeds)).flatten(1)


def direction(k: int, num_elements: int, key: int, num_seeds: int, first_block: int) -> Tensor:
    """(num_elements,) float32 of +1 and -1: direction k from the start of `first_block`."""
    k_row, k_lane = divmod(k, spec.LANES)
    rows = torch.arange(num_seeds // spec.LANES)
    parity = _parity(rows & k_row)[:, None] ^ _parity(torch.arange(spec.LANES) & k_lane)
    blocks = torch.arange(-(-num_elements // num_seeds)) + first_block
    d = signs(blocks, spec.STREAM_D, key, num_seeds)
    e = signs(blocks, spec.STREAM_E, key, num_seeds)[:, k_row, None]
    return (d * e * (1 - 2 * parity)).reshape(-1)[:num_elements]


def signs(blocks: Tensor, stream: int, key: int, num_seeds: int) -> Tensor:
    """(blocks, R, 16) float32 of +1 and -1: the signs of one stream."""
    num_rows, device = num_seeds // spec.LANES, blocks.device
    calls = torch.arange(-(-num_rows // spec.ROWS_PER_CALL), device=device)[:, None]
    second = calls * spec.COUNTER_STRIDE + stream * spec.LANES + torch.arange(spec.LANES, device=device)
    low, high = (part[:, None, None] for part in (blocks & LOW, blocks >> 32))
    zero = torch.zeros_like(low + second)
    words = torch.stack(philox(low + zero, second + zero, high + zero, zero, key), dim=2)  # (blocks, calls, 4, lanes)
    bits = words[:, :, :, None] >> torch.arange(32, device=device)[:, None] & 1  # (blocks, calls, 4, 32, lanes)
    return (1 - 2 * bits.reshape(len(blocks), -1, spec.LANES)[:, :num_rows]).float()


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words per counter, in int64. Products wrap modulo 2**64, which keeps the bits that are used."""
    k0, k1 = split64(key)
    for _ in range(NUM_ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = _high(p1) ^ c1 ^ k0, p1 & LOW, _high(p0) ^ c3 ^ k1, p0 & LOW
        k0, k1 = (k0 + WEYL[0]) & LOW, (k1 + WEYL[1]) & LOW
    return c0, c1, c2, c3


def _high(product: Tensor) -> Tensor:
    return product >> 32 & LOW


def _butterfly(y: Tensor, dim: int, distance: int) -> Tensor:
    pairs = (*y.shape[:dim], y.shape[dim] // (2 * distance), 2, distance, *y.shape[dim + 1 :])
    first, second = y.reshape(pairs).unbind(dim + 1)
    return torch.stack([first + second, first - second], dim + 1).reshape(y.shape)


def _parity(numbers: Tensor) -> Tensor:
    for shift in (16, 8, 4, 2, 1):
        numbers = numbers ^ numbers >> shift
    return numbers & 1
