"""Payload: named tensors and a few scalars, to and from one byte string in the safetensors format.

The header tells names, dtypes and shapes and nothing else; all that varies, the scalars too, lies in the data. So
payloads of one structure have one header, which is checked once and then known by its bytes.

Every payload has one encoding, and no other bytes are read: the header is made again from the names, dtypes and shapes
that it tells, and so are the scalars. Nothing is allocated for a tensor before the lengths agree.
"""

import functools
import json
import math
import struct
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import torch
from torch import Tensor

from kilofed.errors import PayloadError

Scalar = int | float | str | bool

SCALARS = "@"
"""Name of the tensor that holds the scalars as JSON text, at the end."""
MAX_HEADER: Final = 1 << 24
"""Bytes of a header, enough for 100,000 tensors."""
MAX_SCALARS: Final = 1 << 16
"""Bytes of the scalars' text."""
MAX_DIMENSIONS: Final = 32
MAX_KNOWN: Final = 1 << 21
"""Bytes of all headers that are remembered together."""

_STORED = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.bool: "BOOL",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_READ = {name: dtype for dtype, name in _STORED.items()}
_WIDEST_FIRST = {dtype: place for place, dtype in enumerate(_STORED)}  # Keeps every tensor aligned.


@dataclass(frozen=True)
class Payload:
    """What crosses the wire.

    Whatever grows with anything belongs in `tensors`; scalars are few, and each has a fixed width, so that the
    length of a message can be told before its numbers are known.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """Dense tensors on any device; decoded ones are on the CPU, may be written to, and share one block of memory."""
    scalars: Mapping[str, Scalar] = field(default_factory=dict)
    """Numbers, words and switches; finite numbers only."""

    def encode(self) -> bytes:
        """One byte string; equal payloads give equal bytes, whatever the order of their names.

        Raises:
            PayloadError: a tensor or a name that the format cannot hold, a scalar that is no finite plain value, or more
                of them than MAX_HEADER and MAX_SCALARS allow.
        """
        text, pack = _write_scalars(self.scalars), Pack.of(self.tensors)
        return b"".join([_header(pack.layout, len(text)), *map(_bytes, pack.flats), text])

    @staticmethod
    def decode(body: bytes) -> "Payload":
        """The payload in `body`; names come back sorted, in every process.

        What is decoded encodes to `body` again, and takes about as much memory.

        Raises:
            PayloadError: `body` is cut, damaged, or was not written by `encode`.
        """
        try:
            layout, num_header, num_text = _read_header(body)
            scalars = _read_scalars(body[len(body) - num_text :])
            pack = Pack.read(layout, bytearray(memoryview(body)[num_header:]))
        except _BROKEN as error:
            raise _broken(body, error) from error
        return Payload(pack, scalars)

    @staticmethod
    def peek(body: bytes) -> dict[str, Scalar]:
        """The scalars in `body` alone, without a look at the values of its tensors. Raises PayloadError: as `decode`."""
        try:
            *_, num_text = _read_header(body)
            return _read_scalars(body[len(body) - num_text :])
        except _BROKEN as error:
            raise _broken(body, error) from error

    @property
    def num_bytes(self) -> int:
        """Length of `encode()`; only names, dtypes and shapes of the tensors are looked at."""
        layout = _layout_of(self.tensors)
        num_text = len(_write_scalars(self.scalars))
        return len(_header(layout, num_text)) + _end(layout.runs) + num_text


class Place(NamedTuple):
    """Where one tensor lies."""

    run: int
    first: int
    """Its first element in the run."""
    shape: torch.Size
    stride: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the tensors of a payload lie: one run per dtype, back to back."""

    runs: tuple[tuple[torch.dtype, int, int], ...]
    """(dtype, first byte of the data, number of elements)."""
    places: dict[str, Place]
    """By name, names sorted."""

    def like(self, other: "Layout") -> bool:
        """Same tensors in the same places."""
        return self is other or (self.runs == other.runs and self.places == other.places)


class Pack(Mapping[str, Tensor]):
    """Tensors that lie in one flat tensor per dtype; read as a mapping of views."""

    def __init__(self, layout: Layout, flats: list[Tensor]) -> None:
        self.layout, self.flats = layout, flats
        self._views: dict[str, Tensor] = {}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Pack":
        """`tensors` in flat form: itself if it is a pack, else a copy on the CPU. Raises PayloadError."""
        if isinstance(tensors, Pack):
            return tensors
        layout = _layout_of(tensors)
        parts: list[list[Tensor]] = [[] for _ in layout.runs]
        with torch.no_grad():
            for name, place in layout.places.items():
                tensor = tensors[name]
                if tensor.layout != torch.strided:
                    raise PayloadError(f"tensor {name!r} is {tensor.layout}; expected a dense one")
                parts[place.run].append((tensor if tensor.is_cpu else tensor.cpu()).reshape(-1))
            return cls(layout, [torch.cat(part) for part in parts])

    @classmethod
    def read(cls, layout: Layout, data: bytearray) -> "Pack":
        """The pack in `data`, without a copy. Raises ValueError: a bool that is neither 0 nor 1."""
        flats = [
            torch.frombuffer(data, dtype=dtype, count=num, offset=first_byte) if num else torch.empty(0, dtype=dtype)
            for dtype, first_byte, num in layout.runs
        ]
        # The maximum, not a comparison: that would take as much memory again.
        if any(flat.dtype == torch.bool and len(flat) and int(flat.view(torch.uint8).max()) > 1 for flat in flats):
            raise ValueError("a bool is neither 0 nor 1")
        return cls(layout, flats)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._views:
            run, first, shape, stride = self.layout.places[name]
            # `.data`: autograd must not see that tensors share memory, or a write to one spoils the graphs of all.
            self._views[name] = self.flats[run].as_strided(shape, stride, first).data
        return self._views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.places)

    def __len__(self) -> int:
        return len(self.layout.places)


Shapes = tuple[tuple[str, torch.dtype, torch.Size], ...]


def _plan(shapes: Shapes) -> Layout:
    """The layout for tensors of these names, dtypes and shapes. Raises PayloadError."""
    runs: list[tuple[torch.dtype, int, int]] = []
    places: dict[str, Place] = {}
    for name, dtype, shape in sorted(shapes, key=lambda s: (_WIDEST_FIRST.get(s[1], 0), s[0])):
        if dtype not in _STORED:
            known = ", ".join(str(d).removeprefix("torch.") for d in _STORED)
            raise PayloadError(f"tensor {name!r} is {dtype}; expected one of {known}")
        if name in (SCALARS, "__metadata__"):
            raise PayloadError(f"no tensor may be named {name!r}")
        if not runs or runs[-1][0] != dtype:
            runs.append((dtype, _end(runs), 0))
        _, first_byte, num = runs[-1]
        places[name] = Place(len(runs) - 1, num, shape, _stride(name, shape))
        runs[-1] = dtype, first_byte, num + shape.numel()
    return Layout(tuple(runs), dict(sorted(places.items())))


_plan_once = functools.lru_cache(maxsize=256)(_plan)
"""For tensors of this process; what others send is remembered in `_known`, which has a limit in bytes."""


def _stride(name: str, shape: torch.Size) -> tuple[int, ...]:
    """Distance in elements along each dimension. Raises PayloadError: more than a tensor can have."""
    if len(shape) > MAX_DIMENSIONS or math.prod(max(size, 1) for size in shape) >= 1 << 58:
        raise PayloadError(
            f"tensor {name!r} has {len(shape)} dimensions or too many elements; expected at most {MAX_DIMENSIONS} "
            "dimensions and fewer than 2**58 elements"
        )
    steps = [1]
    for size in reversed(shape[1:]):
        steps.append(steps[-1] * max(size, 1))
    return tuple(reversed(steps[: len(shape)]))


@functools.lru_cache(maxsize=256)
def _header(layout: Layout, num_text: int) -> bytes:
    """The header of a payload with `num_text` bytes of scalars, its length in front. Raises PayloadError."""
    return _make_header(layout, num_text)


def _make_header(layout: Layout, num_text: int) -> bytes:
    table = {}
    for name, (run, first, shape, _) in layout.places.items():
        dtype, first_byte, _ = layout.runs[run]
        begin = first_byte + first * dtype.itemsize
        span = [begin, begin + shape.numel() * dtype.itemsize]
        table[name] = {"dtype": _STORED[dtype], "shape": list(shape), "data_offsets": span}
    end = _end(layout.runs)
    table[SCALARS] = {"dtype": "U8", "shape": [num_text], "data_offsets": [end, end + num_text]}
    try:
        text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise PayloadError(f"a tensor's name is not text ({error})") from error
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER or num_text > MAX_SCALARS:
        raise PayloadError(
            f"{len(layout.places)} tensors take a header of {len(text)} bytes and the scalars {num_text}; expected at "
            f"most {MAX_HEADER} and {MAX_SCALARS}: send fewer tensors, shorter names or shorter words"
        )
    return struct.pack("<Q", len(text)) + text


_known: dict[bytes, tuple[Layout, int, int]] = {}


def _read_header(body: bytes) -> tuple[Layout, int, int]:
    """(layout, bytes of the header, bytes of the scalars' text); checked unless the header is known."""
    length = int.from_bytes(body[:8], "little")
    if len(body) < 8 or length > min(MAX_HEADER, len(body) - 8):
        raise ValueError(f"a header of {length} bytes")
    if 8 + length > MAX_KNOWN:
        found = _check_header(memoryview(body)[: 8 + length])
    else:
        header = body[: 8 + length]
        known = _known.get(header)
        found = known or _check_header(memoryview(header))
        if known is None:
            if sum(map(len, _known)) + len(header) > MAX_KNOWN or len(_known) >= 256:
                _known.clear()
            _known[header] = found
    layout, num_header, num_text = found
    if len(body) != num_header + _end(layout.runs) + num_text:
        raise ValueError(f"the header stands for {num_header + _end(layout.runs) + num_text} bytes")
    return found


def _check_header(header: memoryview) -> tuple[Layout, int, int]:
    """What `_read_header` returns. Raises ValueError, and what _BROKEN lists: not a header of `_make_header`."""
    found = {}
    for name, spec in json.loads(str(header[8:], "utf-8")).items():
        if not all(type(size) is int and 0 <= size < 1 << 58 for size in spec["shape"]):
            raise ValueError("a size that is no number of elements")
        found[name] = _READ[spec["dtype"]], torch.Size(spec["shape"])
    num_text = math.prod(found.pop(SCALARS)[1])
    if num_text > MAX_SCALARS:
        raise ValueError(f"{num_text} bytes of scalars")
    layout = _plan(tuple((name, *found[name]) for name in sorted(found)))
    # Offsets, order and spaces are not read: in the one header for these shapes they are right.
    if _make_header(layout, num_text) != header:
        raise ValueError("the header is not as kilofed writes it")
    return layout, len(header), num_text


def _layout_of(tensors: Mapping[str, Tensor]) -> Layout:
    """Raises PayloadError: a name or dtype that cannot be sent."""
    if isinstance(tensors, Pack):
        return tensors.layout
    return _plan_once(tuple((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()))


_BROKEN = (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError)


def _broken(body: bytes, error: Exception) -> PayloadError:
    what = f"{error}"[:200]  # It may quote what was sent.
    return PayloadError(
        f"{len(body)} bytes are not a whole kilofed payload ({what}): cut off or foreign, ask for them again"
    )


def _end(runs: Sequence[tuple[torch.dtype, int, int]]) -> int:
    return runs[-1][1] + runs[-1][2] * runs[-1][0].itemsize if runs else 0


def _bytes(flat: Tensor) -> memoryview:
    return flat.view(torch.uint8).numpy().data


def _write_scalars(scalars: Mapping[str, Scalar]) -> bytes:
    words = {name: _write(name, value) for name, value in scalars.items()}
    return json.dumps(words, sort_keys=True, separators=(",", ":")).encode()


def _read_scalars(text: bytes) -> dict[str, Scalar]:
    """The inverse of `_write_scalars`. Raises ValueError, and what _BROKEN lists."""
    scalars = {name: _read(word) for name, word in json.loads(text.decode("ascii")).items()}
    # One text for equal scalars: no other order, spaces, repeated names or ways to write a number.
    if _write_scalars(scalars) != text:
        raise ValueError("the scalars are not as kilofed writes them")
    return scalars


def _write(name: str, value: Scalar) -> str:
    # Fixed width by type: the length of a message depends on its names and shapes, never on its numbers.
    if isinstance(value, bool):
        return f"b{value:d}"
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return "i" + _text(struct.pack(">q", value))
    if isinstance(value, float) and math.isfinite(value):
        return "f" + _text(struct.pack(">d", value))
    if isinstance(value, str):
        return "s" + value
    # An integer of many digits has no text.
    shown = f"an integer of {value.bit_length()} bits" if isinstance(value, int) else f"{value!r}"[:200]
    raise PayloadError(f"scalar {name!r} is {shown}; expected a finite number of 64 bits, text, true or false")


def _read(word: str) -> Scalar:
    kind, rest = word[0], word[1:]
    if kind == "b":
        return rest == "1"
    if kind == "i":
        return int(struct.unpack(">q", _eight(rest))[0])
    if kind == "f":
        return float(struct.unpack(">d", _eight(rest))[0])
    if kind == "s":
        return rest
    raise ValueError(f"scalar of unknown kind {kind!r}")


def _text(eight: bytes) -> str:
    return urlsafe_b64encode(eight)[:-1].decode()  # The last letter is always padding.


def _eight(text: str) -> bytes:
    if len(text) != 11 or not text.isascii():
        raise ValueError("a number that is not of 64 bits")
    # What is no letter of the alphabet is passed over.
    eight = urlsafe_b64decode(text + "=")
    if len(eight) != 8:
        raise ValueError("a number that is not of 64 bits")
    return eight
