"""Payload: named tensors and a few scalars, to and from one byte string in the safetensors format.

The header tells names, dtypes and shapes and nothing else; all that varies, the scalars too, lies in the data. So
payloads of one structure have one header, which is checked by safetensors once and then known by its bytes.
"""

import functools
import json
import math
import struct
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from safetensors import SafetensorError, deserialize
from torch import Tensor

from kilofed.errors import PayloadError

Scalar = int | float | str | bool

SCALARS = "@"
"""Name of the tensor that holds the scalars as JSON text, at the end."""

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
            PayloadError: a tensor or a name that safetensors cannot hold, or a scalar that is no finite plain value.
        """
        text, pack = self._text(), Pack.of(self.tensors)
        return b"".join([_header(pack.layout, len(text)), *map(_bytes, pack.flats), text])

    @staticmethod
    def decode(body: bytes) -> "Payload":
        """The payload in `body`; names come back sorted, in every process.

        Raises:
            PayloadError: `body` is cut, damaged, or was not written by `encode`.
        """
        try:
            layout, num_header, num_text = _read_header(body)
            pack = Pack.read(layout, bytearray(memoryview(body)[num_header:]))
            words = json.loads(body[len(body) - num_text :])
            scalars = {name: _read(word) for name, word in words.items()}
        except _BROKEN as error:
            raise _broken(body, error) from error
        return Payload(pack, scalars)

    @staticmethod
    def peek(body: bytes) -> dict[str, Scalar]:
        """The scalars in `body` alone, without a copy of its tensors. Raises PayloadError: as `decode`."""
        try:
            *_, num_text = _read_header(body)
            words = json.loads(body[len(body) - num_text :])
            return {name: _read(word) for name, word in words.items()}
        except _BROKEN as error:
            raise _broken(body, error) from error

    @property
    def num_bytes(self) -> int:
        """Length of `encode()`; only names, dtypes and shapes of the tensors are looked at."""
        layout = _layout_of(self.tensors)
        num_text = len(self._text())
        return len(_header(layout, num_text)) + _end(layout.runs) + num_text

    def _text(self) -> bytes:
        words = {name: _write(name, value) for name, value in self.scalars.items()}
        return json.dumps(words, sort_keys=True, separators=(",", ":")).encode()


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
        if any(flat.dtype == torch.bool and flat.view(torch.uint8).gt(1).any() for flat in flats):
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


@functools.lru_cache(maxsize=256)
def _plan(shapes: tuple[tuple[str, torch.dtype, torch.Size], ...]) -> Layout:
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
        places[name] = Place(len(runs) - 1, num, shape, torch.empty(shape, device="meta").stride())
        runs[-1] = dtype, first_byte, num + shape.numel()
    return Layout(tuple(runs), dict(sorted(places.items())))


@functools.lru_cache(maxsize=256)
def _header(layout: Layout, num_text: int) -> bytes:
    """The header of a payload with `num_text` bytes of scalars, its length in front. Raises PayloadError."""
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
    return struct.pack("<Q", len(text)) + text


_known: dict[tuple[bytes, int], tuple[Layout, int, int]] = {}


def _read_header(body: bytes) -> tuple[Layout, int, int]:
    """(layout, bytes of the header, bytes of the scalars' text); checked by safetensors unless the header is known."""
    header = body[: 8 + int.from_bytes(body[:8], "little")]
    key = header, len(body)
    if key not in _known:
        specs = deserialize(body)  # type: ignore[no-untyped-call]
        found = {name: (_READ[spec["dtype"]], torch.Size(spec["shape"])) for name, spec in specs}
        num_text = found.pop(SCALARS)[1].numel()
        layout = _plan(tuple((name, *found[name]) for name in sorted(found)))
        if _header(layout, num_text) != header:
            raise ValueError("the header is not as kilofed writes it")
        if len(_known) >= 256:
            _known.clear()
        _known[key] = layout, len(header), num_text
    return _known[key]


def _layout_of(tensors: Mapping[str, Tensor]) -> Layout:
    """Raises PayloadError: a name or dtype that cannot be sent."""
    if isinstance(tensors, Pack):
        return tensors.layout
    return _plan(tuple((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()))


_BROKEN = (SafetensorError, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError)


def _broken(body: bytes, error: Exception) -> PayloadError:
    return PayloadError(
        f"{len(body)} bytes are not a whole kilofed payload ({error}): cut off or foreign, ask for them again"
    )


def _end(runs: Sequence[tuple[torch.dtype, int, int]]) -> int:
    return runs[-1][1] + runs[-1][2] * runs[-1][0].itemsize if runs else 0


def _bytes(flat: Tensor) -> memoryview:
    return flat.view(torch.uint8).numpy().data


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
    raise PayloadError(f"scalar {name!r} is {value!r}; expected a finite number of 64 bits, text, true or false")


def _read(word: str) -> Scalar:
    kind, rest = word[0], word[1:]
    if kind == "b":
        return bool(int(rest))
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
    # b64decode would pass over letters that are not of its alphabet.
    eight = urlsafe_b64decode(text + "=")
    if _text(eight) != text:
        raise ValueError(f"{text!r} is not a number as kilofed writes it")
    return eight
