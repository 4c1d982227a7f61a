"""Quantised, entropy-coded vectors: projected gradients up, pool coefficients down, with error feedback.

Up: scalars on a uniform grid scaled to the largest of them. Down: a state of integers times a power of two that the
server and every client share bit for bit. The server keeps the exact numbers too, so the rounding error of one message
is added to the next (error feedback); a client that is in sync gets the difference, any other the whole state.

Integers are entropy coded by Zstandard (RFC 8878), whose format is fixed; no probability is computed in floating point.
A message is: kind, count, header (HEADERS), width and coding of the integers, the integers, CRC-32. Little-endian.
"""

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
MAX_FLOAT32: Final = float(np.finfo(np.float32).max)

SCALARS, FLOATS, DELTA, STATE = 1, 2, 3, 4
HEADERS: Final = {SCALARS: "<f", FLOATS: "<", DELTA: "<Ih", STATE: "<Ih"}
"""Scalars: step of the grid. Delta: version before it, exponent after it. State: version, exponent."""
UNCOMPRESSED, ZSTANDARD = 0, 1

_FRAME = zstandard.FORMAT_ZSTD1_MAGICLESS


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


def decode_scalars(data: bytes) -> Floats:
    """(n,) float64, the same on every machine.

    Raises:
        PayloadError: damaged, or not a message of `encode_scalars`.
    """
    kind, count, header, body = _parse(data, (SCALARS, FLOATS))
    if kind == FLOATS:
        if len(body) != 4 * count:
            raise PayloadError(f"{count} float32 numbers take {4 * count} bytes; the message has {len(body)}")
        values = np.frombuffer(body, dtype="<f4").astype(np.float64)
    else:
        values = _unpack(body, count).astype(np.float64) * float(header[0])
    if not np.isfinite(values).all():
        raise PayloadError("the message contains a number that is not finite")
    return values


@dataclass(frozen=True)
class State:
    """The coefficients shared by the server and every client in sync: K integers and one exponent."""

    levels: Integers
    """(K,) below 2**24 in magnitude."""
    exponent: int = 0
    version: int = 0
    """Number of deltas applied; the zero state is version 0."""
    values: npt.NDArray[np.float32] = field(init=False, repr=False, compare=False)
    """(K,) levels * 2**exponent, exact."""

    def __post_init__(self) -> None:
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


def receive(state: State | None, data: bytes) -> State:
    """Apply a delta or decode a whole state; both lead to the same bits.

    Args:
        state: held by this client; None if it holds nothing, then a delta is refused.
        data: from `advance` or `encode_state`.

    Raises:
        PayloadError: damaged, or a delta from another version than this client's.
    """
    kind, count, header, body = _parse(data, (DELTA, STATE))
    version, exponent = int(header[0]), int(header[1])
    levels = _unpack(body, count)
    if kind == DELTA:
        if state is None or state.version != version or len(state.levels) != count:
            held = "nothing" if state is None else f"version {state.version} of {len(state.levels)} numbers"
            raise PayloadError(f"a delta from version {version} of {count} numbers, but this client holds {held}")
        if abs(exponent - state.exponent) > 300:
            raise PayloadError(f"exponent {exponent} is out of range")
        levels = levels + _rescale(state.levels, state.exponent, exponent)
        version += 1
    if np.abs(levels).max(initial=0) > MAX_LEVEL or not MIN_EXPONENT <= exponent <= 100:
        raise PayloadError(f"integers times 2**{exponent} exceed the range of a state")
    return State(levels, exponent, version)


def _exponent(state: State, exact: Floats, limit: int) -> int:
    """Exponent of the next delta: the current one unless its step is far too coarse or too fine."""
    largest = float(np.abs(exact).max(initial=0))
    residual = float(np.abs(exact - np.ldexp(state.levels.astype(np.float64), state.exponent)).max(initial=0))
    finest = max(MIN_EXPONENT, _ceil_log2(largest / (MAX_LEVEL // 2)))
    if finest > 100:
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


def _unpack(body: bytes, count: int) -> Integers:
    width, coding = divmod(body[0], 16) if body else (0, 0)
    if not 1 <= width <= 7 or coding > ZSTANDARD:
        raise PayloadError("unknown width or coding of the integers")
    byte_planes, size = body[1:], width * count
    if coding == ZSTANDARD:
        reader = zstandard.ZstdDecompressor(format=_FRAME)
        try:
            byte_planes = reader.decompress(byte_planes, max_output_size=size, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise PayloadError(f"the integers cannot be decompressed: {error}") from error
    if len(byte_planes) != size:
        raise PayloadError(f"{count} integers of {width} bytes expected, the message has {len(byte_planes)} bytes")
    zigzag = np.zeros((count, 8), dtype=np.uint8)
    zigzag[:, :width] = np.frombuffer(byte_planes, dtype=np.uint8).reshape(width, count).T
    numbers = zigzag.view("<u8").reshape(count).astype(np.int64)
    return np.where(numbers & 1, -(numbers >> 1) - 1, numbers >> 1)


def _assemble(kind: int, count: int, header: bytes, body: bytes) -> bytes:
    message = struct.pack("<BI", kind, count)[:4] + header + body
    return message + struct.pack("<I", zlib.crc32(message))


def _parse(data: bytes, kinds: tuple[int, ...]) -> tuple[int, int, tuple[float, ...], bytes]:
    if len(data) < 8 or struct.unpack("<I", data[-4:])[0] != zlib.crc32(data[:-4]):
        raise PayloadError(f"a message of {len(data)} bytes is damaged: the checksum does not match")
    kind, count = data[0], int.from_bytes(data[1:4], "little")
    if kind not in kinds:
        raise PayloadError(f"a message of kind {kind}; expected one of {', '.join(map(str, kinds))}")
    layout = struct.Struct(HEADERS[kind])
    if len(data) < 8 + layout.size:
        raise PayloadError("the message ends inside its header")
    return kind, count, layout.unpack(data[4 : 4 + layout.size]), data[4 + layout.size : -4]
