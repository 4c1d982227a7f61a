"""Updates far larger than those of the other clients: told by their norm against the cohort's median."""

import math
import statistics
from collections.abc import Mapping

import torch
from torch import Tensor

from kilofed.payload import Layout, Pack, Payload

FEWEST = 3
"""Of two clients nobody can say which one is unlike the other."""

_CHUNK = 2**20
"""Elements that are widened to float64 at a time."""


class Start:
    """What a round's updates start from: the tensors of its ask."""

    def __init__(self, ask: Payload) -> None:
        self._ask = ask
        self._layout: Layout | None = None
        self._flats: list[Tensor | None] = []
        """The ask's tensors where those of a reply with that layout lie, 0 where the ask has none."""

    def norm(self, reply: Payload) -> float:
        """L2 norm of what `reply` changes, over all its tensors.

        A tensor that carries the name of a tensor of the ask is a new value of it; any other is a change as it stands.
        """
        pack = Pack.of(reply.tensors)
        if self._layout is None or not pack.layout.like(self._layout):
            self._layout, self._flats = (
                pack.layout,
                [self._aligned(pack.layout, run) for run in range(len(pack.flats))],
            )
        return math.sqrt(sum(map(_squared, pack.flats, self._flats)))

    def _aligned(self, layout: Layout, run: int) -> Tensor | None:
        dtype, _, num = layout.runs[run]
        flat, shared = torch.zeros(num, dtype=dtype), False
        for name, place in layout.places.items():
            start = self._ask.tensors.get(name)
            if place.run == run and start is not None and start.shape == place.shape:
                flat[place.first : place.first + start.numel()] = start.reshape(-1).to(dtype)
                shared = True
        return flat if shared else None


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


def _squared(flat: Tensor, start: Tensor | None) -> float:
    total = 0.0
    for at in range(0, flat.numel(), _CHUNK):
        part = flat[at : at + _CHUNK].to(torch.float64)
        if start is not None:
            part = part - start[at : at + _CHUNK].to(torch.float64)
        total += float(torch.dot(part, part))
    return total
