"""The machine code of the CPU rebuild: 16 lanes as two vectors of eight floats, eight vectors at a time.

numba cannot express vector registers, so the inner loops are intrinsics that emit LLVM instructions. Each is straight-line
code over `rows`: a row is the 16 lanes of one table row, 64 bytes in the scratch table. Only additions, subtractions and
bit operations occur, so every host rounds alike; vector width and cache blocking cannot change a bit.

A block of K elements is R rows of 16 lanes; row = 16 * group + column. The scratch table is kept column by column
(`pitch` bytes apart), so that the butterflies over groups stay within a small contiguous range.

A 16-bit element is the even or odd half of a 32-bit word. For bfloat16 the two vectors hold the even and the odd lanes,
so conversion to and from float32 needs no shuffles: `LANE_ORDER` is the order of the lanes.
"""

import inspect
import itertools
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core.base import BaseContext
from numba.core.typing import Context, Signature
from numba.extending import intrinsic

from kilofed.zeroth.directions.philox import Words, compiled, inlined, philox_into

Floats = npt.NDArray[np.float32]

NATURAL: Final = tuple(range(16))
LANE_ORDER: Final = {"float32": NATURAL, "float16": NATURAL, "bfloat16": NATURAL[::2] + NATURAL[1::2]}

_WIDTH = 8
_ROW, _HALF = 64, 32
_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_FLOATS = ir.VectorType(ir.FloatType(), _WIDTH)
_INTS = ir.VectorType(_I32, _WIDTH)
_SHORTS = ir.VectorType(_I16, 2 * _WIDTH)
_HALVES = ir.VectorType(ir.HalfType(), _WIDTH)


def _splat(value: int) -> ir.Constant:
    return ir.Constant(_INTS, [value] * _WIDTH)


def _spread(b: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
    single = b.insert_element(ir.Constant(_INTS, ir.Undefined), scalar, ir.Constant(_I32, 0))
    return b.shuffle_vector(single, ir.Constant(_INTS, ir.Undefined), _splat(0))


def _at(b: ir.IRBuilder, address: ir.Value, num_bytes: int) -> ir.Value:
    return b.add(address, ir.Constant(_I64, num_bytes))


def _load(b: ir.IRBuilder, address: ir.Value, kind: ir.Type, align: int) -> ir.Value:
    return b.load(b.inttoptr(address, kind.as_pointer()), align=align)


def _store(b: ir.IRBuilder, value: ir.Value, address: ir.Value, align: int) -> ir.Value:
    return b.store(value, b.inttoptr(address, value.type.as_pointer()), align=align)


def _flip(b: ir.IRBuilder, row: ir.Value, signs: ir.Value) -> ir.Value:
    top = b.and_(signs, _splat(1 << 31))
    return b.bitcast(b.xor(b.bitcast(row, _INTS), top), _FLOATS)


def _butterflies(b: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    distance = 1
    while distance < len(rows):
        for i in range(len(rows)):
            if not i & distance:
                x, y = rows[i], rows[i + distance]
                rows[i], rows[i + distance] = b.fadd(x, y), b.fsub(x, y)
        distance *= 2
    return rows


def _intrinsic(emit: Callable[..., None]) -> Callable[..., None]:
    """A numba intrinsic of int64 arguments; `emit` writes its instructions."""

    def define(typing_context: Context, *arguments: types.Type) -> tuple[types.Type, Callable[..., ir.Value]]:
        def generate(context: BaseContext, b: ir.IRBuilder, signature: Signature, values: list[ir.Value]) -> ir.Value:
            emit(b, *values)
            return context.get_dummy_value()

        return types.void(*[types.int64] * len(arguments)), generate

    # numba needs named arguments: it would pack *arguments into a tuple.
    names = ["typing_context", *list(inspect.signature(emit).parameters)[1:]]
    named = inspect.Signature([inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in names])
    define.__signature__ = named  # type: ignore[attr-defined]
    piece: Callable[..., None] = intrinsic(define)
    return piece


def _first_levels(num_rows: int, radix: int) -> Callable[..., None]:
    """Load consecutive rows of `a`, apply signs E and levels 1 .. radix / 2 over groups, store to the scratch table."""

    def emit(b: ir.IRBuilder, a: ir.Value, y: ir.Value, e: ir.Value, column: ir.Value) -> None:
        bit = b.trunc(column, _I32)
        shifts = [_spread(b, b.sub(ir.Constant(_I32, last), bit)) for last in (31, 15)]
        for first, half in itertools.product(range(0, num_rows, radix), (0, _HALF)):
            rows = []
            for i in range(first, first + radix):
                word = _load(b, _at(b, e, i // 2 * _ROW + half), _INTS, _HALF)
                row = _load(b, _at(b, a, i * _ROW + half), _FLOATS, _HALF)
                rows.append(_flip(b, row, b.shl(word, shifts[i % 2])))
            for i, row in enumerate(_butterflies(b, rows)):
                _store(b, row, _at(b, y, (first + i) * _ROW + half), _HALF)

    return emit


def _levels(num_rows: int) -> Callable[..., None]:
    """Apply all levels to scratch rows `stride` bytes apart, in place."""

    def emit(b: ir.IRBuilder, y: ir.Value, stride: ir.Value) -> None:
        for half in (0, _HALF):
            places = [_at(b, b.add(y, b.mul(stride, ir.Constant(_I64, i))), half) for i in range(num_rows)]
            rows = _butterflies(b, [_load(b, place, _FLOATS, _HALF) for place in places])
            for row, place in zip(rows, places, strict=True):
                _store(b, row, place, _HALF)

    return emit


def _last_levels(b: ir.IRBuilder, y: ir.Value, pitch: ir.Value, far: ir.Value) -> None:
    """Apply the last level over groups (`far` bytes apart), then levels 1 and 2 over four columns (`pitch` apart)."""
    for half in (0, _HALF):
        columns = [_at(b, b.add(y, b.mul(pitch, ir.Constant(_I64, i))), half) for i in range(4)]
        places = [place for column in columns for place in (column, b.add(column, far))]
        rows = _butterflies(b, [_load(b, place, _FLOATS, _HALF) for place in places])
        for row, place in zip(rows, places, strict=True):
            _store(b, row, place, _HALF)


Mover = Callable[[ir.IRBuilder, list[ir.Value], ir.Value], list[ir.Value]]
"""Maps a row's two vectors of sums and the address of its w0 to the updated row, as vectors of 32 bytes."""


def _finish(move: Mover, row_bytes: int, nontemporal: bool) -> Callable[..., None]:
    """Apply levels 4 and 8 over the 16 columns of one group and signs D, add to w0, round once, store."""

    def emit(
        b: ir.IRBuilder,
        y: ir.Value,
        pitch: ir.Value,
        quad: ir.Value,
        d: ir.Value,
        bit: ir.Value,
        w0: ir.Value,
        out: ir.Value,
    ) -> None:
        shift = _spread(b, b.sub(ir.Constant(_I32, 16), b.trunc(bit, _I32)))
        signs = [b.shl(_load(b, _at(b, d, half), _INTS, _HALF), shift) for half in (0, _HALF)]
        quads = [b.add(y, b.mul(quad, ir.Constant(_I64, i // 4))) for i in range(16)]
        columns = [b.add(quads[i], b.mul(pitch, ir.Constant(_I64, i % 4))) for i in range(16)]
        pieces: dict[int, ir.Value] = {}
        for i in range(4):
            halves = [
                _butterflies(b, [_load(b, _at(b, columns[j], half), _FLOATS, _HALF) for j in range(i, 16, 4)])
                for half in (0, _HALF)
            ]
            for j in range(i, 16, 4):
                row = [_flip(b, halves[h][j // 4], b.shl(signs[h], _splat(15 - j))) for h in (0, 1)]
                moved = move(b, row, _at(b, w0, j * row_bytes))
                pieces.update({j * row_bytes + n * 32: piece for n, piece in enumerate(moved)})
            # Whole cache lines at a time: a partial non-temporal store would cost a read.
            if (i + 1) * row_bytes % 64 == 0:
                for place in sorted(pieces):
                    _put(b, pieces.pop(place), _at(b, out, place), nontemporal)

    return emit


def _put(b: ir.IRBuilder, piece: ir.Value, out: ir.Value, nontemporal: bool) -> None:
    if nontemporal:
        written = _store(b, piece, out, 32)
        written.set_metadata("nontemporal", b.module.add_metadata([ir.Constant(_I32, 1)]))
    else:
        _store(b, piece, out, 2)


def _move_float32(b: ir.IRBuilder, row: list[ir.Value], w0: ir.Value) -> list[ir.Value]:
    return [b.fadd(_load(b, _at(b, w0, h * _HALF), _FLOATS, 4), row[h]) for h in (0, 1)]


def _move_float16(b: ir.IRBuilder, row: list[ir.Value], w0: ir.Value) -> list[ir.Value]:
    halves = [b.fpext(_load(b, _at(b, w0, h * 16), _HALVES, 2), _FLOATS) for h in (0, 1)]
    totals = [b.fptrunc(b.fadd(halves[h], row[h]), _HALVES) for h in (0, 1)]
    return [b.shuffle_vector(totals[0], totals[1], ir.Constant(ir.VectorType(_I32, 16), list(range(16))))]


def _move_bfloat16(b: ir.IRBuilder, row: list[ir.Value], w0: ir.Value) -> list[ir.Value]:
    words = _load(b, w0, _INTS, 2)
    even = b.bitcast(b.shl(words, _splat(16)), _FLOATS)
    odd = b.bitcast(b.and_(words, _splat(0xFFFF << 16)), _FLOATS)
    rounded = [_to_upper_half(b, b.fadd(x, y)) for x, y in zip((even, odd), row, strict=True)]
    low = b.bitcast(b.lshr(rounded[0], _splat(16)), _SHORTS)
    high = b.bitcast(rounded[1], _SHORTS)
    blend = [i if i % 2 == 0 else 16 + i for i in range(16)]
    return [b.shuffle_vector(low, high, ir.Constant(ir.VectorType(_I32, 16), blend))]


def _to_upper_half(b: ir.IRBuilder, total: ir.Value) -> ir.Value:
    """Nearest bfloat16, ties to even, in the upper half of each word.

    A NaN stays NaN: its lower half is zero, since it came from a bfloat16 or from the processor.
    """
    bits = b.bitcast(total, _INTS)
    odd = b.and_(b.lshr(bits, _splat(16)), _splat(1))
    return b.add(b.add(bits, _splat(0x7FFF)), odd)


def _wait_for_stores(b: ir.IRBuilder) -> None:
    """Make non-temporal stores visible to other threads."""
    b.fence("seq_cst")


class Workspace(NamedTuple):
    """One thread's inputs and scratch memory for any number of blocks; arrays are aligned to 64 bytes."""

    a: Floats
    """(16 columns, R / 16 groups, 16 lanes): the coefficients after the butterflies within each row."""
    y: Floats
    """Scratch table: column 4 * i + j starts i * quad + j * pitch bytes in."""
    num_groups: int
    pitch: int
    quad: int
    d: Words
    """(R / 32, 16): signs of stream D of the current block; rounded up to whole Philox calls."""
    e: Words
    """Likewise for stream E."""
    lanes: Words
    """(16,): order of the lanes, see LANE_ORDER."""
    key: Words
    """(2,): the pool's key."""


first_levels4, first_levels8, first_levels16 = (_intrinsic(_first_levels(n, n // 2)) for n in (4, 8, 16))
levels2, levels4, levels8 = (_intrinsic(_levels(n)) for n in (2, 4, 8))
last_levels = _intrinsic(_last_levels)
finish_float32 = _intrinsic(_finish(_move_float32, 64, False))
finish_float16 = _intrinsic(_finish(_move_float16, 32, False))
finish_bfloat16 = _intrinsic(_finish(_move_bfloat16, 32, False))
finish_nontemporal_float32 = _intrinsic(_finish(_move_float32, 64, True))
finish_nontemporal_float16 = _intrinsic(_finish(_move_float16, 32, True))
finish_nontemporal_bfloat16 = _intrinsic(_finish(_move_bfloat16, 32, True))
wait_for_stores = _intrinsic(_wait_for_stores)


@inlined
def sign_words(out: Words, block: int, stream: int, lanes: Words, key: Words) -> None:
    """Signs of one stream of one block: bit row % 32 of out[row // 32, i] is the sign of lane lanes[i]."""
    k0, k1 = np.uint64(key[0]), np.uint64(key[1])
    low, high = np.uint64(block) & np.uint64(0xFFFFFFFF), np.uint64(block) >> np.uint64(32)
    for call in range(out.shape[0] // 4):
        for i in range(16):
            second = np.uint64(call * 32 + stream * 16) + np.uint64(lanes[i])
            philox_into(out, call * 4, i, (low, second, high, np.uint64(0)), k0, k1)


@compiled
def mix_levels(a: int, y: int, e: int, num_groups: int, pitch: int, quad: int) -> None:
    """Apply all levels but 4 and 8 of one block, from `a` into the scratch table; needs at least four groups."""
    row, half = 64, num_groups // 2
    for column in range(16):
        source, table = a + column * num_groups * row, y + column // 4 * quad + column % 4 * pitch
        if num_groups == 4:
            distance = 2
            first_levels4(source, table, e, column)
        elif num_groups == 8:
            distance = 4
            first_levels8(source, table, e, column)
        else:
            distance = 8
            for group in range(0, num_groups, 16):
                first_levels16(source + group * row, table + group * row, e + group * 32, column)
        while distance < half:
            factor = min(8, half // distance)
            for start in range(0, num_groups, factor * distance):
                for group in range(start, start + distance):
                    if factor == 8:
                        levels8(table + group * row, distance * row)
                    elif factor == 4:
                        levels4(table + group * row, distance * row)
                    else:
                        levels2(table + group * row, distance * row)
            distance *= factor
        if column % 4 == 3:
            for group in range(half):
                last_levels(table - 3 * pitch + group * row, pitch, half * row)


@compiled
def rebuild_float32(w0: int, out: int, first_block: int, num_blocks: int, workspace: Workspace) -> None:
    """Rebuild whole float32 blocks from address w0 to address out."""
    a, y, num_groups, pitch, quad, d, e, lanes, key = workspace
    for i in range(num_blocks):
        sign_words(e, first_block + i, 1, lanes, key)
        sign_words(d, first_block + i, 0, lanes, key)
        mix_levels(a.ctypes.data, y.ctypes.data, e.ctypes.data, num_groups, pitch, quad)
        for group in range(num_groups):
            at = (i * num_groups + group) * 1024
            signs, bit = d.ctypes.data + group // 2 * 64, group % 2 * 16
            finish_float32(y.ctypes.data + group * 64, pitch, quad, signs, bit, w0 + at, out + at)


@compiled
def nontemporal_float32(w0: int, out: int, first_block: int, num_blocks: int, workspace: Workspace) -> None:
    """As rebuild_float32, with non-temporal stores; `out` is a multiple of 32."""
    a, y, num_groups, pitch, quad, d, e, lanes, key = workspace
    for i in range(num_blocks):
        sign_words(e, first_block + i, 1, lanes, key)
        sign_words(d, first_block + i, 0, lanes, key)
        mix_levels(a.ctypes.data, y.ctypes.data, e.ctypes.data, num_groups, pitch, quad)
        for group in range(num_groups):
            at = (i * num_groups + group) * 1024
            signs, bit = d.ctypes.data + group // 2 * 64, group % 2 * 16
            finish_nontemporal_float32(y.ctypes.data + group * 64, pitch, quad, signs, bit, w0 + at, out + at)
    wait_for_stores()


@compiled
def rebuild_float16(w0: int, out: int, first_block: int, num_blocks: int, workspace: Workspace) -> None:
    """Rebuild whole float16 blocks from address w0 to address out."""
    a, y, num_groups, pitch, quad, d, e, lanes, key = workspace
    for i in range(num_blocks):
        sign_words(e, first_block + i, 1, lanes, key)
        sign_words(d, first_block + i, 0, lanes, key)
        mix_levels(a.ctypes.data, y.ctypes.data, e.ctypes.data, num_groups, pitch, quad)
        for group in range(num_groups):
            at = (i * num_groups + group) * 512
            signs, bit = d.ctypes.data + group // 2 * 64, group % 2 * 16
            finish_float16(y.ctypes.data + group * 64, pitch, quad, signs, bit, w0 + at, out + at)


@compiled
def nontemporal_float16(w0: int, out: int, first_block: int, num_blocks: int, workspace: Workspace) -> None:
    """As rebuild_float16, with non-temporal stores; `out` is a multiple of 32."""
    a, y, num_groups, pitch, quad, d, e, lanes, key = workspace
    for i in range(num_blocks):
        sign_words(e, first_block + i, 1, lanes, key)
        sign_words(d, first_block + i, 0, lanes, key)
        mix_levels(a.ctypes.data, y.ctypes.data, e.ctypes.data, num_groups, pitch, quad)
        for group in range(num_groups):
            at = (i * num_groups + group) * 512
            signs, bit = d.ctypes.data + group // 2 * 64, group % 2 * 16
            finish_nontemporal_float16(y.ctypes.data + group * 64, pitch, quad, signs, bit, w0 + at, out + at)
    wait_for_stores()


@compiled
def rebuild_bfloat16(w0: int, out: int, first_block: int, num_blocks: int, workspace: Workspace) -> None:
    """Rebuild whole bfloat16 blocks from address w0 to address out."""
    a, y, num_groups, pitch, quad, d, e, lanes, key = workspace
    for i in range(num_blocks):
        sign_words(e, first_block + i, 1, lanes, key)
        sign_words(d, first_block + i, 0, lanes, key)
        mix_levels(a.ctypes.data, y.ctypes.data, e.ctypes.data, num_groups, pitch, quad)
        for group in range(num_groups):
            at = (i * num_groups + group) * 512
            signs, bit = d.ctypes.data + group // 2 * 64, group % 2 * 16
            finish_bfloat16(y.ctypes.data + group * 64, pitch, quad, signs, bit, w0 + at, out + at)


@compiled
def nontemporal_bfloat16(w0: int, out: int, first_block: int, num_blocks: int, workspace: Workspace) -> None:
    """As rebuild_bfloat16, with non-temporal stores; `out` is a multiple of 32."""
    a, y, num_groups, pitch, quad, d, e, lanes, key = workspace
    for i in range(num_blocks):
        sign_words(e, first_block + i, 1, lanes, key)
        sign_words(d, first_block + i, 0, lanes, key)
        mix_levels(a.ctypes.data, y.ctypes.data, e.ctypes.data, num_groups, pitch, quad)
        for group in range(num_groups):
            at = (i * num_groups + group) * 512
            signs, bit = d.ctypes.data + group // 2 * 64, group % 2 * 16
            finish_nontemporal_bfloat16(y.ctypes.data + group * 64, pitch, quad, signs, bit, w0 + at, out + at)
    wait_for_stores()
