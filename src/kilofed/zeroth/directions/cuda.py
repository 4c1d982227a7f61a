"""HSP-1 on CUDA devices: one Triton program per block, the same bits as the CPU kernels.

Only float32 additions, bit operations and one rounding occur, in the specification's order, so the compiler cannot
fuse or reorder anything. Needs the extra `kilofed[cuda]`; with TRITON_INTERPRET=1 it also runs on CPU tensors.
"""

import torch
from torch import Tensor

from kilofed.zeroth.directions import reference, spec
from kilofed.zeroth.directions.philox import split64
from kilofed.zeroth.directions.spec import DirectionsError

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise DirectionsError("directions on CUDA devices need triton: install kilofed[cuda]") from error

MAX_KERNEL_SEEDS = 1 << 14
"""Larger blocks do not fit the registers of one program and run in plain torch."""


def rebuild(w0: Tensor, out: Tensor, a: Tensor, key: int, first_block: int) -> None:
    """Write round(w0 + sum_k a_k z_k) to `out`, which may be w0 itself.

    Args:
        w0: (n,) float32, bfloat16 or float16, contiguous.
        out: (n,) same dtype and device, contiguous.
        a: (K,) float32 on the same device, K at least 512.
        key: the pool's key.
        first_block: number of the block in which w0 starts.
    """
    num_seeds = len(a)
    if num_seeds > MAX_KERNEL_SEEDS:
        out.copy_(reference.rebuild(w0, a, key, first_block))
        return
    if len(w0):
        grid = (-(-len(w0) // num_seeds),)
        # Triton specialises kernels on values of integer arguments; keys and block numbers change too often for that.
        words = torch.tensor([*split64(key), first_block], dtype=torch.int64, device=w0.device)
        _rebuild_kernel[grid](
            w0, out, a, words, len(w0), R=num_seeds // spec.LANES, num_warps=8, enable_fp_fusion=False
        )


@triton.jit  # type: ignore[untyped-decorator]
def _philox_word(
    block: tl.tensor, word: tl.tensor, lane: tl.tensor, stream: tl.constexpr, k0: tl.tensor, k1: tl.tensor
) -> tl.tensor:
    """Sign word `word` of each lane: rows 32 * word to 32 * word + 31."""
    m0: tl.constexpr = 0xD2511F53
    m1: tl.constexpr = 0xCD9E8D57
    zero = word * 0 + lane * 0
    c0 = zero + (block & 0xFFFFFFFF).to(tl.uint32)
    c1 = (zero + word // 4 * 32 + stream * 16 + lane).to(tl.uint32)
    c2 = zero + (block >> 32).to(tl.uint32)
    c3 = zero
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * m0
        p1 = c2.to(tl.uint64) * m1
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    which = word % 4
    return tl.where(which == 0, c0, tl.where(which == 1, c1, tl.where(which == 2, c2, c3)))


@triton.jit  # type: ignore[untyped-decorator]
def _flip(
    y: tl.tensor, block: tl.tensor, stream: tl.constexpr, k0: tl.tensor, k1: tl.tensor, R: tl.constexpr
) -> tl.tensor:
    """y (R, 16) with the signs of one stream applied to its sign bits."""
    word = tl.arange(0, R // 32).to(tl.uint32)[:, None]
    lane = tl.arange(0, 16).to(tl.uint32)[None, :]
    words = _philox_word(block, word, lane, stream, k0, k1)
    bits = words[:, None, :] >> tl.arange(0, 32).to(tl.uint32)[None, :, None]
    signs = tl.reshape(bits << 31, (R, 16))
    return (y.to(tl.uint32, bitcast=True) ^ signs).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _butterfly(y: tl.tensor, R: tl.constexpr, outer: tl.constexpr, inner: tl.constexpr) -> tl.tensor:
    """One level on y (R, 16): elements `inner` apart in memory order; outer * 2 * inner = R * 16."""
    pairs = tl.permute(tl.reshape(y, (outer, 2, inner)), (0, 2, 1))
    first, second = tl.split(pairs)
    return tl.reshape(tl.permute(tl.join(first + second, first - second), (0, 2, 1)), (R, 16))


@triton.jit  # type: ignore[untyped-decorator]
def _rebuild_kernel(
    w0_ptr: tl.tensor,
    out_ptr: tl.tensor,
    a_ptr: tl.tensor,
    words_ptr: tl.tensor,
    num_elements: tl.tensor,
    R: tl.constexpr,
) -> None:
    k0 = tl.load(words_ptr).to(tl.uint32)
    k1 = tl.load(words_ptr + 1).to(tl.uint32)
    index = tl.program_id(0).to(tl.int64)
    block = tl.load(words_ptr + 2) + index
    place = tl.arange(0, R)[:, None] * 16 + tl.arange(0, 16)[None, :]
    y = tl.load(a_ptr + place)
    for level in tl.static_range(4):
        y = _butterfly(y, R, R * 8 >> level, 1 << level)
    y = _flip(y, block, 1, k0, k1, R)
    for level in tl.static_range(8, 14):
        if (1 << level) < R * 16:
            y = _butterfly(y, R, R * 8 >> level, 1 << level)
    for level in tl.static_range(4, 8):
        y = _butterfly(y, R, R * 8 >> level, 1 << level)
    y = _flip(y, block, 0, k0, k1, R)
    at = index * (R * 16) + place
    inside = at < num_elements
    w0 = tl.load(w0_ptr + at, mask=inside, other=0.0)
    total = w0.to(tl.float32) + y
    if out_ptr.dtype.element_ty == tl.bfloat16:
        # Explicit rounding: Triton's interpreter truncates where devices round to nearest even.
        bits = total.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        tl.store(out_ptr + at, rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=inside)
    else:
        tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)
