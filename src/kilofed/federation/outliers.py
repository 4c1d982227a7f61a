"""Updates far larger than those of the other clients: told by their norm against the cohort's median."""

import math
import statistics
from collections.abc import Mapping

import torch
from torch import Tensor

from kilofed.payload import Payload

FEWEST = 3
"""Of two clients nobody can say which one is unlike the other."""

_CHUNK = 2**20
"""Elements that are widened to float64 at a time."""


def update_norm(reply: Payload, ask: Payload) -> float:
    """L2 norm of what a reply changes, over all its tensors.

    A tensor that carries the name of a tensor of the ask is a new value of it; any other is a change as it stands.
    """
    return math.sqrt(sum(_squared(tensor, ask.tensors.get(name)) for name, tensor in reply.tensors.items()))


def far_out(norms: Mapping[int, float], ratio: float) -> tuple[float, dict[int, float]]:
    """The largest norm that passes, `ratio` times the median, and the norms above it by client.

    Nothing is far out among fewer than FEWEST clients that changed anything.
    """
    known = [norm for norm in norms.values() if norm > 0]
    if len(known) < FEWEST:
        return math.inf, {}
    limit = ratio * statistics.median(known)
    return limit, {client: norm for client, norm in norms.items() if norm > limit}


def scaled(reply: Payload, ask: Payload, factor: float) -> Payload:
    """`reply` with its update multiplied by `factor`, in its own dtypes; scalars are as they were."""
    tensors = {}
    for name, tensor in reply.tensors.items():
        start = ask.tensors.get(name)
        wide = tensor.double()
        moved = wide * factor if start is None else start.double() + (wide - start.double()) * factor
        tensors[name] = (moved if tensor.is_floating_point() else moved.round()).to(tensor.dtype)
    return Payload(tensors, reply.scalars)


def _squared(tensor: Tensor, start: Tensor | None) -> float:
    total, flat = 0.0, tensor.reshape(-1)
    begin = None if start is None or start.shape != tensor.shape else start.reshape(-1)
    for at in range(0, flat.numel(), _CHUNK):
        part = flat[at : at + _CHUNK].to(torch.float64)
        if begin is not None:
            part = part - begin[at : at + _CHUNK].to(part)
        total += float(torch.dot(part, part))
    return total
