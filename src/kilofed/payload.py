"""Payload: named tensors and a few scalars, to and from one byte string in the safetensors format."""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from safetensors import SafetensorError, TensorSpec, deserialize, serialize
from torch import Tensor

from kilofed.errors import PayloadError

Scalar = int | float | str | bool

_SCALARS = "kilofed"
_STORED: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPES = {dtype: str(dtype).removeprefix("torch.") for dtype in _STORED.values()}


@dataclass(frozen=True)
class Payload:
    """What crosses the wire.

    Whatever grows with anything belongs in `tensors`; scalars are few, and each has a fixed width, so that the
    length of a message can be told before its numbers are known.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """Dense tensors on any device; decoded ones are on the CPU and own their memory."""
    scalars: Mapping[str, Scalar] = field(default_factory=dict)
    """Numbers, words and switches; finite numbers only."""

    def encode(self) -> bytes:
        """One byte string; equal payloads give equal bytes, whatever the order of their names.

        Raises:
            PayloadError: a dtype that safetensors lacks, or a scalar that is no finite plain value.
        """
        words = {name: _write(name, value) for name, value in self.scalars.items()}
        text = json.dumps(words, sort_keys=True, separators=(",", ":"))
        # `alive` holds the buffers until `serialize` has read them by address.
        alive = {name: self.tensors[name].detach().to("cpu").contiguous() for name in sorted(self.tensors)}
        return bytes(serialize({name: _spec(name, t) for name, t in alive.items()}, {_SCALARS: text}))

    @staticmethod
    def decode(body: bytes) -> "Payload":
        """The payload in `body`; names come back sorted, in every process.

        Raises:
            PayloadError: `body` is cut, damaged, or was not written by `encode`.
        """
        try:
            tensors = {name: _restore(spec) for name, spec in sorted(deserialize(body))}
            scalars = _scalars(body)
        except (SafetensorError, ValueError, KeyError, IndexError, TypeError, RuntimeError, struct.error) as error:
            raise PayloadError(
                f"{len(body)} bytes are not a whole kilofed payload ({error}): cut off or foreign, ask for them again"
            ) from error
        return Payload(tensors, scalars)

    @property
    def num_bytes(self) -> int:
        """Length of `encode()`."""
        return len(self.encode())


def _write(name: str, value: Scalar) -> str:
    # Fixed width by type: the length of a message depends on its names and shapes, never on its numbers.
    if isinstance(value, bool):
        return f"b{value:d}"
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return f"i{value & (2**64 - 1):016x}"
    if isinstance(value, float) and math.isfinite(value):
        return "f" + struct.pack(">d", value).hex()
    if isinstance(value, str):
        return "s" + value
    raise PayloadError(f"scalar {name!r} is {value!r}; expected a finite number of 64 bits, text, true or false")


def _read(word: str) -> Scalar:
    kind, rest = word[0], word[1:]
    if kind == "b":
        return bool(int(rest))
    if kind == "i":
        return (int(rest, 16) ^ 2**63) - 2**63
    if kind == "f":
        return float(struct.unpack(">d", bytes.fromhex(rest))[0])
    if kind == "s":
        return rest
    raise ValueError(f"scalar of unknown kind {kind!r}")


def _spec(name: str, tensor: Tensor) -> TensorSpec:
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        raise PayloadError(f"tensor {name!r} is {tensor.dtype}; expected one of {', '.join(_DTYPES.values())}")
    return TensorSpec(dtype=dtype, shape=list(tensor.shape), data_ptr=tensor.data_ptr(), data_len=tensor.nbytes)


def _restore(spec: dict[str, object]) -> Tensor:
    dtype, shape, data = _STORED[str(spec["dtype"])], spec["shape"], spec["data"]
    assert isinstance(shape, list) and isinstance(data, bytearray)
    return torch.frombuffer(data, dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)


def _scalars(body: bytes) -> dict[str, Scalar]:
    # `deserialize` keeps the metadata to itself; the header is an 8-byte length and JSON.
    length = int.from_bytes(body[:8], "little")
    header = json.loads(body[8 : 8 + length])
    return {name: _read(word) for name, word in json.loads(header["__metadata__"][_SCALARS]).items()}
