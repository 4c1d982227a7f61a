"""What a reply must be, known before it comes: names, dtypes, shapes and length, never read off another client's reply."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self

import torch

from kilofed.errors import PayloadError
from kilofed.payload import Layout, Pack, Payload, Scalar

Sizes = tuple[int | range, ...]
"""A tensor's shape; a range where a dimension differs from reply to reply."""


@dataclass(frozen=True)
class TensorLike:
    """What is known of one tensor before it comes."""

    dtype: torch.dtype
    shape: Sizes


@dataclass(frozen=True)
class Expected:
    """The replies to one action."""

    tensors: Mapping[str, TensorLike]
    scalars: Mapping[str, type[int] | type[float] | type[str] | type[bool]] = field(default_factory=dict)
    """Kinds by name; int and float are both numbers."""
    _passed: list[Layout | None] = field(default_factory=lambda: [None], repr=False, compare=False)
    """The layout that passed last: replies of one layout share the object, and need one look."""

    @classmethod
    def like(cls, outline: Payload) -> Self:
        """Replies with the names, dtypes and shapes of `outline`, whatever its numbers."""
        tensors = {name: TensorLike(tensor.dtype, tuple(tensor.shape)) for name, tensor in outline.tensors.items()}
        return cls(tensors, {name: type(value) for name, value in outline.scalars.items()})

    @cached_property
    def largest(self) -> Payload:
        """The largest of them, without numbers."""
        largest = {
            name: torch.empty([_most(size) for size in one.shape], dtype=one.dtype, device="meta")
            for name, one in self.tensors.items()
        }
        made_up: dict[str, Scalar] = {name: kind() for name, kind in self.scalars.items()}
        return Payload(largest, made_up)

    @property
    def max_bytes(self) -> int:
        """Length of the longest of them as bytes, where scalars are numbers."""
        return self.largest.num_bytes

    def only(self, left: Payload) -> Self:
        """These replies with no more than the names in `left`."""
        return type(self)(
            tensors={name: one for name, one in self.tensors.items() if name in left.tensors},
            scalars={name: kind for name, kind in self.scalars.items() if name in left.scalars},
        )

    def check(self, reply: Payload) -> None:
        """Raise PayloadError unless `reply` has these tensors and scalars and no other."""
        layout = Pack.of(reply.tensors).layout
        if layout is not self._passed[-1]:
            self._check_tensors(layout)
            self._passed[:] = [layout]
        if odd := reply.scalars.keys() != self.scalars.keys() and sorted(set(reply.scalars) ^ set(self.scalars))[:3]:
            raise PayloadError(f"it sent other scalars than it was asked for: {_named(odd, reply.scalars)}")
        for name, value in reply.scalars.items():
            if not _same_kind(value, self.scalars[name]):
                raise PayloadError(f"it sent the scalar {name}={value!r:.80}; expected {_kind(self.scalars[name])}")

    def _check_tensors(self, layout: Layout) -> None:
        if odd := sorted(set(layout.places) ^ set(self.tensors))[:3]:
            raise PayloadError(f"it sent other tensors than it was asked for: {_named(odd, layout.places)}")
        for name, place in layout.places.items():
            one, shape, dtype = self.tensors[name], tuple(place.shape), layout.runs[place.run][0]
            if not _fits(shape, one.shape):
                raise PayloadError(f"it sent {name} of shape {shape}; expected {_words(one.shape)}")
            if dtype != one.dtype:
                raise PayloadError(f"it sent {name} as {dtype}; expected {one.dtype}")


def _most(size: int | range) -> int:
    return size if isinstance(size, int) else max(size)


def _fits(shape: tuple[int, ...], expected: Sizes) -> bool:
    return len(shape) == len(expected) and all(
        size == one if isinstance(one, int) else size in one for size, one in zip(shape, expected, strict=True)
    )


def _same_kind(value: Scalar, kind: type) -> bool:
    numbers = (int, float)
    return type(value) in numbers if kind in numbers else type(value) is kind


def _kind(kind: type) -> str:
    return {bool: "true or false", str: "text"}.get(kind, "a number")


def _words(shape: Sizes) -> str:
    sizes = [str(size) if isinstance(size, int) else f"{min(size)} to {max(size)}" for size in shape]
    return f"({', '.join(sizes)}{',' * (len(sizes) == 1)})"


def _named(odd: list[str], sent: Mapping[str, object]) -> str:
    return ", ".join(f"{name!r:.80} is {'too many' if name in sent else 'missing'}" for name in odd)
