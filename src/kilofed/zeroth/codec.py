"""Quantised, entropy-coded vectors: projected gradients up, pool coefficients down, with error feedback.

Up: scalars on a uniform grid scaled to the largest of them. Down: a state of integers times a power of two that the
server and every client share bit for bit. The server keeps the exact numbers too, so the rounding error of one message
is added to the next (error feedback); a client that is in sync gets the difference, any other the whole state.

Integers are entropy coded by Zstandard (RFC 8878), whose format is fixed; no probability is computed in floating point.
A message is: kind, count, header (HEADERS), width and coding of the integers, the integers, CRC-32. Little-endian.

A decoder is told how many numbers to expect, and refuses another count before it allocates anything. A frame may not
state its own size, since Zstandard would then believe the frame and not the limit, nor a window larger than what it
holds, nor use more bytes per integer than the kind of message can need.
"""

import math
import struct
import zlib
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
import zstandard

from kilofed.errors import KilofedError, PayloadError

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

MAX_COUNT: Final = (1 << 24) - 1
MAX_LEVEL: Final = (1 << 24) - 1
"""Integers of a state are exact in float32, and so is level * 2**exponent."""
MIN_EXPONENT: Final = -120
MAX_EXPONENT: Final = 100
MAX_VERSION: Final = (1 << 32) - 1
MAX_FLOAT32: Final = float(np.finfo(np.float32).max)

SCALARS, FLOATS, DELTA, STATE = 1, 2, 3, 4
HEADERS: Final = {SCALARS: "<f", FLOATS: "<", DELTA: "<Ih", STATE: "<Ih"}
"""Scalars: step of the grid. Delta: version before it, exponent after it. State: version, exponent."""
UNCOMPRESSED, ZSTANDARD = 0, 1
MAX_WIDTHS: Final = {SCALARS: 2, DELTA: 4, STATE: 4}
"""Bytes per integer: scalars have at most 16 bits; a delta leads from one state to another, hence below 2**25."""
MAX_SCALAR: Final = (1 << 15) - 1

_FRAME = zstandard.FORMAT_ZSTD1_MAGICLESS
_MIN_WINDOW = 1 << 10


def encode_scalars(values: npt.ArrayLike, *, bits: int = 6) -> bytes:
    """Encode scalars as integers of `bits` bits, scaled so that the largest magnitude uses the whole range.

    Args:
        values: (n,) finite numbers.
        bits: 2 to 16, or 32 for float32; fewer bits send fewer bytes and round more coarsely.
    """
    numbers = _finite_vector(values)
    largest = float(np.abs(numbers).max(initial=0))
    if largest > MAX_FLOAT32:
        raise KilofedError(f"the largest value is {largest}, too large for float32")
    if bits == 32:
        return _assemble(FLOATS, len(numbers), b"", numbers.astype("<f4").tobytes())
    limit = _limit(bits)
    step = float(np.float32(largest / limit))
    # A step below the smallest float32 is 0, and so are all values.
    levels = np.clip(np.rint(numbers / (step or np.inf)), -limit, limit).astype(np.int64)
    return _assemble(SCALARS, len(numbers), struct.pack(HEADERS[SCALARS], step), _pack(levels))


def decode_scalars(data: bytes, *, count: int) -> Floats:
    """(count,) float64, the same on every machine.

    Raises:
        PayloadError: damaged, of another count, or not a message of `encode_scalars`.
    """
    kind, header, body = _parse(data, (SCALARS, FLOATS), count)
    if kind == FLOATS:
        if len(body) != 4 * count:
            raise PayloadError(f"{count} float32 numbers take {4 * count} bytes; the message has {len(body)}")
        floats = np.frombuffer(body, dtype="<f4")
        if not np.isfinite(floats).all():
            raise PayloadError("the message contains a number that is not finite")
        return floats.astype(np.float64)
    step = float(header[0])
    if not math.isfinite(step) or math.copysign(1, step) < 0:
        raise PayloadError(f"the step of the grid is {step}; expected a finite one from 0")
    levels = _unpack(body, count, MAX_WIDTHS[SCALARS])
    if np.abs(levels).max(initial=0) > (MAX_SCALAR if step else 0):
        raise PayloadError(f"an integer of {np.abs(levels).max()} at a step of {step}; expected at most {MAX_SCALAR}")
    return levels.astype(np.float64) * step


@dataclass(frozen=True)
class State:
    """The coefficients shared by the server and every client in sync: K integers and one exponent."""

    levels: Integers
    """(K,) at most MAX_LEVEL in magnitude."""
    exponent: int = 0
    """MIN_EXPONENT to MAX_EXPONENT."""
    version: int = 0
    """Number of deltas applied, at most MAX_VERSION; the zero state is version 0."""
    values: npt.NDArray[np.float32] = field(init=False, repr=False, compare=False)
    """(K,) levels * 2**exponent, exact."""

    def __post_init__(self) -> None:
        _check_range(self.levels, self.exponent, self.version)
        values = np.ldexp(self.levels.astype(np.float32), np.int32(self.exponent))
        object.__setattr__(self, "values", values)

    @staticmethod
    def zeros(count: int) -> "State":
        """The state in which every run starts."""
        return State(np.zeros(count, dtype=np.int64))


def advance(state: State, exact: npt.ArrayLike, *, bits: int = 6) -> tuple[State, bytes]:
    """Move the shared state to the exact numbers, up to quantisation.

    Args:
        state: held by the clients in sync.
        exact: (K,) the server's sums since the start of the run, never rounded.
        bits: 2 to 16, size of the integers of a typical delta; fewer bits send fewer bytes and leave a larger residual
            for the next delta.

    Returns:
        The next state, and the delta message from `state` to it.
    """
    numbers = _finite_vector(exact)
    if len(numbers) != len(state.levels):
        raise KilofedError(f"the state has {len(state.levels)} numbers, the exact vector {len(numbers)}")
    exponent = _exponent(state, numbers, _limit(bits))
    levels = np.rint(np.ldexp(numbers, -exponent)).astype(np.int64)
    moved = State(levels, exponent, state.version + 1)
    delta = levels - _rescale(state.levels, state.exponent, exponent)
    header = struct.pack(HEADERS[DELTA], state.version, exponent)
    return moved, _assemble(DELTA, len(levels), header, _pack(delta))


def encode_state(state: State) -> bytes:
    """Encode the whole state, for a client that is out of sync."""
    header = struct.pack(HEADERS[STATE], state.version, state.exponent)
    return _assemble(STATE, len(state.levels), header, _pack(state.levels))


def receive(state: State | None, data: bytes, *, count: int) -> State:
    """Apply a delta or decode a whole state; both lead to the same bits.

    Args:
        state: held by this client; None if it holds nothing, then a delta is refused.
        data: from `advance` or `encode_state`.
        count: K.

    Raises:
        PayloadError: damaged, of another count, a delta from another version than this client's, or one that leads out
            of the range of a state.
    """
    kind, header, body = _parse(data, (DELTA, STATE), count)
    version, exponent = int(header[0]), int(header[1])
    if kind == DELTA and (state is None or state.version != version or len(state.levels) != count):
        held = "nothing" if state is None else f"version {state.version} of {len(state.levels)} numbers"
        raise PayloadError(f"a delta from version {version} of {count} numbers, but this client holds {held}")
    levels = _unpack(body, count, MAX_WIDTHS[kind])
    if kind == DELTA and state is not None:
        levels = levels + _rescale(state.levels, state.exponent, exponent)
        version += 1
    try:
        return State(levels, exponent, version)
    except KilofedError as error:
        raise PayloadError(f"the message leads out of the range of a state: {error}") from error


def _check_range(levels: Integers, exponent: int, version: int) -> None:
    """Raise KilofedError unless these can be sent and are exact in float32."""
    largest = int(np.abs(levels).max(initial=0))
    if largest > MAX_LEVEL or not MIN_EXPONENT <= exponent <= MAX_EXPONENT or not 0 <= version <= MAX_VERSION:
        raise KilofedError(
            f"a state of integers up to {largest}, exponent {exponent} and version {version}; expected at most "
            f"{MAX_LEVEL}, {MIN_EXPONENT} to {MAX_EXPONENT}, and 0 to {MAX_VERSION}"
        )


def _exponent(state: State, exact: Floats, limit: int) -> int:
    """Exponent of the next delta: the current one unless its step is far too coarse or too fine."""
    largest = float(np.abs(exact).max(initial=0))
    residual = float(np.abs(exact - np.ldexp(state.levels.astype(np.float64), state.exponent)).max(initial=0))
    finest = max(MIN_EXPONENT, _ceil_log2(largest / (MAX_LEVEL // 2)))
    if finest > MAX_EXPONENT:
        raise KilofedError(f"the largest number is {largest}; a state holds numbers below 2**120")
    if residual == 0 or (state.version and limit / 4 <= np.ldexp(residual, -state.exponent) <= 2 * limit):
        return max(state.exponent, finest)
    return max(_ceil_log2(residual / limit), finest)


def _ceil_log2(number: float) -> int:
    mantissa, exponent = np.frexp(number)
    if not mantissa:
        return MIN_EXPONENT
    return int(exponent) - (1 if mantissa == 0.5 else 0)


def _rescale(levels: Integers, old: int, new: int) -> Integers:
    """Levels on a grid with another exponent; towards a coarser one, ties round up."""
    if new <= old:
        shift = min(old - new, 38)
        return levels << shift
    shift = min(new - old, 62)
    return levels + (1 << (shift - 1)) >> shift


def _finite_vector(values: npt.ArrayLike) -> Floats:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or len(numbers) > MAX_COUNT:
        raise KilofedError(f"expected a vector of at most {MAX_COUNT} numbers, got shape {numbers.shape}")
    if not np.isfinite(numbers).all():
        raise KilofedError(f"number {int(np.argmin(np.isfinite(numbers)))} is not finite")
    return numbers


def _limit(bits: int) -> int:
    if not 2 <= bits <= 16:
        raise KilofedError(f"bits is {bits}; expected 2 to 16, or 32 for float32")
    return (1 << (bits - 1)) - 1


def _pack(levels: Integers) -> bytes:
    """Zigzag, then one plane per byte, then Zstandard where that is shorter."""
    zigzag = np.where(levels < 0, -2 * levels - 1, 2 * levels)
    width = max(1, (int(zigzag.max(initial=0)).bit_length() + 7) // 8)
    byte_planes = zigzag.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :width].T.tobytes()
    options = zstandard.ZstdCompressionParameters.from_level(
        19, format=_FRAME, write_content_size=False, write_checksum=False
    )
    compressed = zstandard.ZstdCompressor(compression_params=options).compress(byte_planes)
    if len(compressed) < len(byte_planes):
        return bytes([width << 4 | ZSTANDARD]) + compressed
    return bytes([width << 4 | UNCOMPRESSED]) + byte_planes


def _unpack(body: bytes, count: int, max_width: int) -> Integers:
    width, coding = divmod(body[0], 16) if body else (0, 0)
    if not 1 <= width <= max_width or coding > ZSTANDARD:
        raise PayloadError(f"integers of width {width} in coding {coding}; expected 1 to {max_width}, and 0 or 1")
    byte_planes, size = body[1:], width * count
    if coding == ZSTANDARD:
        byte_planes = _decompress(byte_planes, size)
    if len(byte_planes) != size:
        raise PayloadError(f"{count} integers of {width} bytes expected, the message has {len(byte_planes)} bytes")
    if width > 1 and byte_planes.count(0, size - count) == count:
        raise PayloadError(f"{width} bytes per integer in the message; fewer are enough")
    zigzag = np.zeros((count, 8), dtype=np.uint8)
    zigzag[:, :width] = np.frombuffer(byte_planes, dtype=np.uint8).reshape(width, count).T
    numbers = zigzag.view("<u8").reshape(count).astype(np.int64)
    return np.where(numbers & 1, -(numbers >> 1) - 1, numbers >> 1)


def _decompress(frame: bytes, size: int) -> bytes:
    """At most `size` bytes from a frame of `_pack`, whose header tells nothing but its window."""
    if len(frame) >= size or frame[:1] != b"\0":
        raise PayloadError(f"a compressed block of {len(frame)} bytes is not as kilofed writes it for {size}")
    window = max(_MIN_WINDOW, 1 << (size - 1).bit_length())
    reader = zstandard.ZstdDecompressor(format=_FRAME, max_window_size=window)
    try:
        return reader.decompress(frame, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise PayloadError(f"the integers cannot be decompressed: {error}") from error


def _assemble(kind: int, count: int, header: bytes, body: bytes) -> bytes:
    message = struct.pack("<BI", kind, count)[:4] + header + body
    return message + struct.pack("<I", zlib.crc32(message))


def _parse(data: bytes, kinds: tuple[int, ...], count: int) -> tuple[int, tuple[float, ...], bytes]:
    if len(data) < 8 or struct.unpack("<I", data[-4:])[0] != zlib.crc32(memoryview(data)[:-4]):
        raise PayloadError(f"a message of {len(data)} bytes is damaged: the checksum does not match")
    kind, sent = data[0], int.from_bytes(data[1:4], "little")
    if kind not in kinds:
        raise PayloadError(f"a message of kind {kind}; expected one of {', '.join(map(str, kinds))}")
    if sent != count:
        raise PayloadError(f"a message of {sent} numbers; expected {count}")
    layout = struct.Struct(HEADERS[kind])
    if len(data) < 8 + layout.size:
        raise PayloadError("the message ends inside its header")
    return kind, layout.unpack(data[4 : 4 + layout.size]), data[4 + layout.size : -4]
