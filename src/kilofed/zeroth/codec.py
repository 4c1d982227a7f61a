"""Small vectors as few bytes: slopes on the way up, coefficients on the way down, exact on both ends.

Up: scalars on a uniform grid that reaches the largest of them. Down: a state of integers times a power of two that the
server and every client share bit for bit. The server keeps the exact numbers too, so what one message rounds away the
next one carries (error feedback); a client in step gets the difference, any other the whole state.

Integers are entropy coded by Zstandard (RFC 8878), whose format is fixed; no probability is computed in floating point.
A message is: kind, count, head (HEADS), width and coding of the integers, the integers, CRC-32. Little-endian.
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
"""Integers of a state stay within float32, so level times 2**exponent is exact."""
MIN_EXPONENT: Final = -120
MAX_FLOAT32: Final = float(np.finfo(np.float32).max)

SCALARS, FLOATS, DELTA, STATE = 1, 2, 3, 4
HEADS: Final = {SCALARS: "<f", FLOATS: "<", DELTA: "<Ih", STATE: "<Ih"}
"""Scalars: step of the grid. Delta: version it starts from, exponent it ends with. State: version, exponent."""
PLAIN, ZSTANDARD = 0, 1

_FRAME = zstandard.FORMAT_ZSTD1_MAGICLESS


def encode_scalars(values: npt.ArrayLike, *, bits: int = 6) -> bytes:
    """Scalars as integers of `bits` bits, the largest in size on the last step of the grid.

    Args:
        values: (n,) finite numbers.
        bits: 2 to 16, or 32 for float32 without a grid; fewer bits, fewer bytes, coarser steps.
    """
    numbers = _checked(values)
    largest = float(np.abs(numbers).max(initial=0))
    if largest > MAX_FLOAT32:
        raise KilofedError(f"the largest value is {largest}, too large for float32")
    if bits == 32:
        return _seal(FLOATS, len(numbers), b"", numbers.astype("<f4").tobytes())
    limit = _limit(bits)
    step = float(np.float32(largest / limit))
    # A step too small for float32 is zero, and so are the values.
    levels = np.clip(np.rint(numbers / (step or np.inf)), -limit, limit).astype(np.int64)
    return _seal(SCALARS, len(numbers), struct.pack(HEADS[SCALARS], step), _pack(levels))


def decode_scalars(data: bytes) -> Floats:
    """(n,) float64, the same on every machine.

    Raises:
        PayloadError: not what `encode_scalars` makes.
    """
    kind, count, head, body = _open(data, (SCALARS, FLOATS))
    if kind == FLOATS:
        if len(body) != 4 * count:
            raise PayloadError(f"{count} float32 take {4 * count} bytes, the message has {len(body)}")
        values = np.frombuffer(body, dtype="<f4").astype(np.float64)
    else:
        values = _unpack(body, count).astype(np.float64) * float(head[0])
    if not np.isfinite(values).all():
        raise PayloadError("the message has a number that is not finite")
    return values


@dataclass(frozen=True)
class State:
    """What the server and every client in step hold: K integers and one exponent."""

    levels: Integers
    """(K,) below 2**24 in size."""
    exponent: int = 0
    version: int = 0
    """How many deltas led here; the zero state is version 0."""
    values: npt.NDArray[np.float32] = field(init=False, repr=False, compare=False)
    """(K,) levels * 2**exponent, exact."""

    def __post_init__(self) -> None:
        values = np.ldexp(self.levels.astype(np.float32), np.int32(self.exponent))
        object.__setattr__(self, "values", values)

    @staticmethod
    def zeros(count: int) -> "State":
        """Where every run starts."""
        return State(np.zeros(count, dtype=np.int64))


def advance(state: State, exact: npt.ArrayLike, *, bits: int = 6) -> tuple[State, bytes]:
    """Move the shared state to the exact numbers, as near as the grid allows.

    Args:
        state: what the clients in step hold.
        exact: (K,) what the server has summed, from the start of the run, never rounded.
        bits: 2 to 16, size of the integers of a typical delta; fewer bits, fewer bytes, more carried to the next one.

    Returns:
        The next state, and the message that takes a client from `state` to it.
    """
    numbers = _checked(exact)
    if len(numbers) != len(state.levels):
        raise KilofedError(f"the state has {len(state.levels)} numbers, the exact vector {len(numbers)}")
    exponent = _exponent(state, numbers, _limit(bits))
    levels = np.rint(np.ldexp(numbers, -exponent)).astype(np.int64)
    moved = State(levels, exponent, state.version + 1)
    delta = levels - _rescale(state.levels, state.exponent, exponent)
    head = struct.pack(HEADS[DELTA], state.version, exponent)
    return moved, _seal(DELTA, len(levels), head, _pack(delta))


def encode_state(state: State) -> bytes:
    """The whole state, for a client that is not in step."""
    head = struct.pack(HEADS[STATE], state.version, state.exponent)
    return _seal(STATE, len(state.levels), head, _pack(state.levels))


def receive(state: State | None, data: bytes) -> State:
    """The state a message leads to, equal on every client whichever way it came.

    Args:
        state: what this client holds; None if nothing, then only a whole state will do.
        data: from `advance` or `encode_state`.

    Raises:
        PayloadError: damaged, or a delta that does not start at this client's state.
    """
    kind, count, head, body = _open(data, (DELTA, STATE))
    version, exponent = int(head[0]), int(head[1])
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
        raise PayloadError(f"integers times 2**{exponent} are out of the range of a state")
    return State(levels, exponent, version)


def _exponent(state: State, exact: Floats, limit: int) -> int:
    """The grid of the next delta: the present one unless the step is far too coarse or too fine."""
    largest = float(np.abs(exact).max(initial=0))
    missing = float(np.abs(exact - np.ldexp(state.levels.astype(np.float64), state.exponent)).max(initial=0))
    finest = max(MIN_EXPONENT, _ceil_log2(largest / (MAX_LEVEL // 2)))
    if finest > 100:
        raise KilofedError(f"the largest number is {largest}; a state holds numbers below 2**120")
    if missing == 0 or (state.version and limit / 4 <= np.ldexp(missing, -state.exponent) <= 2 * limit):
        return max(state.exponent, finest)
    return max(_ceil_log2(missing / limit), finest)


def _ceil_log2(number: float) -> int:
    mantissa, exponent = np.frexp(number)
    if not mantissa:
        return MIN_EXPONENT
    return int(exponent) - (1 if mantissa == 0.5 else 0)


def _rescale(levels: Integers, old: int, new: int) -> Integers:
    """Levels on another grid; towards a coarser one, halves are rounded up, on every machine alike."""
    if new <= old:
        shift = min(old - new, 38)
        return levels << shift
    shift = min(new - old, 62)
    return levels + (1 << (shift - 1)) >> shift


def _checked(values: npt.ArrayLike) -> Floats:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or len(numbers) > MAX_COUNT:
        raise KilofedError(f"expected a vector of at most {MAX_COUNT} numbers, got shape {numbers.shape}")
    if not np.isfinite(numbers).all():
        raise KilofedError(f"number {int(np.argmin(np.isfinite(numbers)))} is not finite")
    return numbers


def _limit(bits: int) -> int:
    if not 2 <= bits <= 16:
        raise KilofedError(f"bits is {bits}; expected 2 to 16, or 32 for scalars without a grid")
    return (1 << (bits - 1)) - 1


def _pack(levels: Integers) -> bytes:
    """Zigzag, then one plane per byte, then Zstandard where it helps."""
    folded = np.where(levels < 0, -2 * levels - 1, 2 * levels)
    width = max(1, (int(folded.max(initial=0)).bit_length() + 7) // 8)
    planes = folded.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :width].T.tobytes()
    options = zstandard.ZstdCompressionParameters.from_level(
        19, format=_FRAME, write_content_size=False, write_checksum=False
    )
    coded = zstandard.ZstdCompressor(compression_params=options).compress(planes)
    if len(coded) < len(planes):
        return bytes([width << 4 | ZSTANDARD]) + coded
    return bytes([width << 4 | PLAIN]) + planes


def _unpack(body: bytes, count: int) -> Integers:
    width, coding = divmod(body[0], 16) if body else (0, 0)
    if not 1 <= width <= 7 or coding > ZSTANDARD:
        raise PayloadError("the integers have an unknown form")
    planes, size = body[1:], width * count
    if coding == ZSTANDARD:
        reader = zstandard.ZstdDecompressor(format=_FRAME)
        try:
            planes = reader.decompress(planes, max_output_size=size, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise PayloadError(f"the integers cannot be decompressed: {error}") from error
    if len(planes) != size:
        raise PayloadError(f"{count} integers of {width} bytes expected, the message has {len(planes)} bytes")
    folded = np.zeros((count, 8), dtype=np.uint8)
    folded[:, :width] = np.frombuffer(planes, dtype=np.uint8).reshape(width, count).T
    numbers = folded.view("<u8").reshape(count).astype(np.int64)
    return np.where(numbers & 1, -(numbers >> 1) - 1, numbers >> 1)


def _seal(kind: int, count: int, head: bytes, body: bytes) -> bytes:
    message = struct.pack("<BI", kind, count)[:4] + head + body
    return message + struct.pack("<I", zlib.crc32(message))


def _open(data: bytes, kinds: tuple[int, ...]) -> tuple[int, int, tuple[float, ...], bytes]:
    if len(data) < 8 or struct.unpack("<I", data[-4:])[0] != zlib.crc32(data[:-4]):
        raise PayloadError(f"{len(data)} bytes that are not a whole message: the checksum does not match")
    kind, count = data[0], int.from_bytes(data[1:4], "little")
    if kind not in kinds:
        raise PayloadError(f"a message of kind {kind}; expected one of {', '.join(map(str, kinds))}")
    layout = struct.Struct(HEADS[kind])
    if len(data) < 8 + layout.size:
        raise PayloadError("the message ends inside its head")
    return kind, count, layout.unpack(data[4 : 4 + layout.size]), data[4 + layout.size : -4]
