"""The L2 norm of an update as both ends measure it, and the clip that holds after rounding.

A reply's tensor that carries the name of a tensor of the ask is a new value of it, and its update is the difference; a
tensor with another name is an update as it stands.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kilofed.errors import PrivacyError
from kilofed.payload import Payload

_CHUNK = 2**20
"""Elements that are widened to float64 at a time."""
_CLOSE = 0.99
"""Share of the clip from which on no larger update is looked for."""
_NUM_TRIES = 30
_MARGINS = (40, 34, 28, 22, 16, 10)
"""Powers of 1/2 by which an update that rounding made larger than the clip is shrunk a little more, one after another."""


def norm(reply: Payload, ask: Payload) -> float:
    """L2 norm of the update in `reply` over all its tensors, of the numbers as they are stored, in float64.

    Every machine gets the same bits, so that a server finds what a client found. NaN or infinite where a number is, or
    where the sum of squares is above what float64 holds.

    Raises:
        PrivacyError: a tensor is not of floating point, or unlike the ask's tensor of its name.
    """
    parts = [part for name in reply.tensors for part in _squares(name, reply.tensors[name], ask)]
    try:
        return math.sqrt(math.fsum(parts))
    except OverflowError:
        return math.inf


def clipped(reply: Payload, ask: Payload, clip: float) -> Payload:
    """`reply` itself where its update's norm is at most `clip`, else with an update shrunk to it, dtypes kept.

    Args:
        clip: above 0. The `norm` of what is returned is at most this, however coarse a dtype is.

    Raises:
        PrivacyError: as `norm`; the norm is no finite number; or a tensor's dtype cannot hold the ask's tensor of its
            name, so that even no update at all would leave as one above `clip`.
    """
    size = norm(reply, ask)
    if size <= clip:
        return reply
    if not math.isfinite(size):
        raise PrivacyError(f"the update's norm is {size}; expected a finite one")
    scale = clip / size
    found = scaled(reply, ask, scale)
    if (size := norm(found, ask)) <= clip:
        return found
    for bits in _MARGINS:
        less = scale * clip / size * (1 - 2.0**-bits)
        found = scaled(reply, ask, less)
        if (size := norm(found, ask)) <= clip:
            # Far below it, the numbers are coarse: between the two may lie more of the update.
            return found if size >= _CLOSE * clip else _searched(reply, ask, clip, scale)
        scale = less
    return _searched(reply, ask, clip, scale)


def _searched(reply: Payload, ask: Payload, clip: float, high: float) -> Payload:
    """The largest update within `clip` that is found between none and `high` times the reply's: for coarse numbers."""
    kept, low = scaled(reply, ask, 0.0), 0.0
    if norm(kept, ask) > clip:
        raise PrivacyError(
            f"numbers of the ask do not fit {_coarsest(reply)}, so that no clip of {clip:g} can hold: reply in the "
            "ask's dtype, or with differences under names that are not in the ask"
        )
    for _ in range(_NUM_TRIES):
        scale = (low + high) / 2
        found = scaled(reply, ask, scale)
        if (size := norm(found, ask)) > clip:
            high = scale
            continue
        kept, low = found, scale
        if size >= _CLOSE * clip:
            break
    return kept


def scaled(reply: Payload, ask: Payload, scale: float) -> Payload:
    """`reply` with `scale` times its update, each number rounded once to its own dtype; no scalars."""
    return Payload({name: _scaled(tensor, ask.tensors.get(name), scale) for name, tensor in reply.tensors.items()})


def update_of(name: str, tensor: Tensor, ask: Payload) -> Tensor:
    """The update that `tensor` stands for, float64, on the CPU. Raises PrivacyError: as `norm`."""
    if not tensor.is_floating_point():
        raise PrivacyError(f"{name!r} is {tensor.dtype}; clipping and noise need floating-point updates")
    start = ask.tensors.get(name)
    if start is None:
        return tensor.detach().cpu().double()
    if start.shape != tensor.shape:
        raise PrivacyError(f"{name!r} has shape {tuple(tensor.shape)}, the ask's has {tuple(start.shape)}")
    return tensor.detach().cpu().double() - start.detach().cpu().double()


def _scaled(tensor: Tensor, start: Tensor | None, scale: float) -> Tensor:
    if scale == 0.0:
        # Zero times infinity is no number, and what is not finite must be able to leave as no update.
        return torch.zeros_like(tensor) if start is None else start.to(tensor.dtype)
    if start is None:
        return (tensor.double() * scale).to(tensor.dtype)
    begin = start.double()
    return (begin + (tensor.double() - begin) * scale).to(tensor.dtype)


def _squares(name: str, tensor: Tensor, ask: Payload) -> Iterator[float]:
    for chunk in torch.split(update_of(name, tensor, ask).reshape(-1), _CHUNK):
        yield from _folded(chunk.square())


def _folded(values: Tensor) -> list[float]:
    """At most 64 numbers with the sum of `values`, changed in place."""
    # Halves are added number by number: torch's own sum depends on the width of a machine's vector registers.
    while (num := values.numel()) > 64:
        half = (num + 1) // 2
        values[: num - half] += values[half:]
        values = values[:half]
    return list(values.tolist())


def _coarsest(reply: Payload) -> str:
    widths = {tensor.dtype: tensor.dtype.itemsize for tensor in reply.tensors.values()}
    return str(min(widths, key=lambda dtype: widths[dtype]))
