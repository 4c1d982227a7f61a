"""HSP-1 on the CPU: one pass over memory, any number of threads, the same bits.

Blocks are independent, so threads take spans of them from one queue; the assignment does not change the result.
"""

import ctypes
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kilofed.zeroth.directions import kernels, spec
from kilofed.zeroth.directions.kernels import Floats, Workspace
from kilofed.zeroth.directions.philox import Words, compiled, inlined, split64

Rebuild = Callable[[int, int, int, int, Workspace], None]
Span = tuple[int, int]
T = TypeVar("T", np.float32, np.uint32)

MIN_KERNEL_SEEDS: Final = 1024
"""Smaller pools, which only tests use, run in plain torch."""
SPAN_ELEMENTS: Final = 1 << 18
NONTEMPORAL_BYTES: Final = 1 << 24
"""Outputs of at least this size are written with non-temporal stores, which bypass the cache."""

REBUILD: Final[dict[torch.dtype, tuple[Rebuild, Rebuild]]] = {
    torch.float32: (kernels.rebuild_float32, kernels.nontemporal_float32),
    torch.float16: (kernels.rebuild_float16, kernels.nontemporal_float16),
    torch.bfloat16: (kernels.rebuild_bfloat16, kernels.nontemporal_bfloat16),
}


def rebuild(w0: Tensor, out: Tensor, table: Floats, key: int, first_block: int) -> None:
    """Write round(w0 + sum_k a_k z_k) to `out`, which may be w0 itself.

    Args:
        w0: (n,) float32, bfloat16 or float16, contiguous.
        out: (n,) same dtype, contiguous.
        table: the K coefficients after `row_butterflies` for this dtype; K is at least MIN_KERNEL_SEEDS.
        key: the pool's key.
        first_block: number of the block in which w0 starts.
    """
    whole_blocks, rest = divmod(len(w0), table.size)
    nontemporal = out.nbytes >= NONTEMPORAL_BYTES and out.data_ptr() % 32 == 0
    kernel = REBUILD[w0.dtype][nontemporal]
    lanes = _lanes(w0.dtype)
    block_bytes = table.size * w0.element_size()

    def run_spans(next_span: Callable[[], Span | None]) -> None:
        workspace = _workspace(table, lanes, key)
        while (span := next_span()) is not None:
            first, count = span
            shift = first * block_bytes
            kernel(w0.data_ptr() + shift, out.data_ptr() + shift, first_block + first, count, workspace)

    _in_threads(run_spans, whole_blocks, max(1, SPAN_ELEMENTS // table.size))
    if rest:
        # Not by torch: a parallel copy would wake torch's threads, which would then spin and compete with these.
        padded = np.zeros(block_bytes, dtype=np.uint8)
        at, shift, num_bytes = padded.ctypes.data, whole_blocks * block_bytes, rest * w0.element_size()
        ctypes.memmove(at, w0.data_ptr() + shift, num_bytes)
        REBUILD[w0.dtype][0](at, at, first_block + whole_blocks, 1, _workspace(table, lanes, key))
        ctypes.memmove(out.data_ptr() + shift, at, num_bytes)


def row_butterflies(a: Floats, dtype: torch.dtype) -> Floats:
    """Apply the butterflies within each row, once for all blocks.

    Args:
        a: (K,) coefficients.
        dtype: of the weights to rebuild; determines the order of the lanes.

    Returns:
        (16, R / 16, 16): row 16 * group + column at [column, group].
    """
    rows = a.reshape(-1, spec.LANES)
    for distance in (1, 2, 4, 8):
        split = rows.reshape(-1, spec.LANES // (2 * distance), 2, distance)
        first, second = split[:, :, 0], split[:, :, 1]
        rows = np.stack([first + second, first - second], axis=2).reshape(-1, spec.LANES)
    table = _aligned((16, len(rows) // 16, spec.LANES), np.float32)
    table[:] = rows[:, list(_lanes(dtype))].reshape(-1, 16, spec.LANES).swapaxes(0, 1)
    return table


def _lanes(dtype: torch.dtype) -> tuple[int, ...]:
    return kernels.LANE_ORDER[str(dtype).removeprefix("torch.")]


def direction(k: int, out: Tensor, key: int, num_seeds: int, first_block: int) -> None:
    """Write +1 and -1 of direction k, from the start of `first_block`, to `out` (n,), contiguous."""
    patterns = torch.uint32 if out.dtype == torch.float32 else torch.uint16
    bits = out.view(patterns).numpy()
    one = int(torch.ones(1, dtype=out.dtype).view(patterns))

    def run_spans(next_span: Callable[[], Span | None]) -> None:
        words = np.empty((2, _num_words(num_seeds), spec.LANES), dtype=np.uint32)
        while (span := next_span()) is not None:
            first, count = span
            part = bits[first * num_seeds : (first + count) * num_seeds]
            fill_direction(part, one, (k, num_seeds, first_block + first), words, _key_words(key))

    _in_threads(run_spans, -(-len(out) // num_seeds), max(1, SPAN_ELEMENTS // num_seeds))


@compiled
def fill_direction(
    out: npt.NDArray[np.unsignedinteger], one: int, place: tuple[int, int, int], words: Words, key: Words
) -> None:
    """Bit patterns of +1 and -1; `one` is the pattern of +1 in the dtype of `out`, `words` is scratch."""
    k, num_seeds, block = place
    lanes = np.arange(16).astype(np.uint32)
    row_signs, k_signs = words[0], words[1]
    top = np.uint32(out.itemsize * 8 - 1)
    plus = np.uint32(one)
    for start in range(0, out.size, num_seeds):
        kernels.sign_words(row_signs, block, 0, lanes, key)
        kernels.sign_words(k_signs, block, 1, lanes, key)
        block += 1
        for lane in range(16):
            e = k_signs[k // 512, lane] >> np.uint32(k // 16 % 32)
            k_signs[0, lane] = (e ^ np.uint32(_parity(lane & k))) & np.uint32(1)
        for row in range((min(num_seeds, out.size - start) + 15) // 16):
            odd, shift = np.uint32(_parity(row & k // 16)), np.uint32(row % 32)
            at = start + row * 16
            for lane in range(min(16, out.size - at)):
                sign = (row_signs[row // 32, lane] >> shift ^ odd ^ k_signs[0, lane]) & np.uint32(1)
                out[at + lane] = plus | sign << top


@inlined
def _parity(number: int) -> int:
    for shift in (16, 8, 4, 2, 1):
        number ^= number >> shift
    return number & 1


def _workspace(table: Floats, lanes: tuple[int, ...], key: int) -> Workspace:
    _, num_groups, _ = table.shape
    column = num_groups * 64
    # Columns at multiples of 4 KiB would map to the same few cache sets.
    pitch = column + 64 if column >= 4096 else column
    quad = 4 * pitch + 64
    return Workspace(
        a=table,
        y=_aligned((quad,), np.float32),
        num_groups=num_groups,
        pitch=pitch,
        quad=quad,
        d=_aligned((_num_words(table.size), spec.LANES), np.uint32),
        e=_aligned((_num_words(table.size), spec.LANES), np.uint32),
        lanes=np.array(lanes, dtype=np.uint32),
        key=_key_words(key),
    )


def _num_words(num_seeds: int) -> int:
    """Sign words per lane and block: whole Philox calls of four."""
    return -(-num_seeds // spec.LANES // spec.ROWS_PER_CALL) * 4


def _key_words(key: int) -> Words:
    return np.array(split64(key), dtype=np.uint32)


def _aligned(shape: tuple[int, ...], dtype: type[T]) -> npt.NDArray[T]:
    """An uninitialised array that starts on a multiple of 64 bytes."""
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(num_bytes + 64, dtype=np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + num_bytes].view(dtype).reshape(shape)


def _in_threads(run_spans: Callable[[Callable[[], Span | None]], None], num_blocks: int, span: int) -> None:
    """Let threads take spans of blocks, (first, count), from one queue until it is empty."""
    starts = iter(range(0, num_blocks, span))

    def next_span() -> Span | None:
        start = next(starts, None)
        return None if start is None else (start, min(span, num_blocks - start))

    num_threads = min(torch.get_num_threads(), -(-num_blocks // span))
    if num_threads < 2:
        run_spans(next_span)
        return
    with ThreadPoolExecutor(num_threads) as threads:
        for future in [threads.submit(run_spans, next_span) for _ in range(num_threads)]:
            future.result()
