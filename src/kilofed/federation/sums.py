"""The weighted mean of payloads: float64, in the order in which they come, one flat addition per dtype."""

import math

import torch
from torch import Tensor

from kilofed.errors import PayloadError
from kilofed.payload import Layout, Pack, Payload

_CHUNK = 2**20
"""Elements that are widened to float64 at a time."""


class WeightedSum:
    """A weighted sum of payloads in float64, added in the order in which they come."""

    def __init__(self) -> None:
        self.num = 0
        self._weight = 0.0
        self._layout: Layout | None = None
        self._totals: list[Tensor] = []
        """One per run of the layout."""
        self._scalars: dict[str, float] = {}

    @property
    def weight(self) -> float:
        """Sum of the weights."""
        return self._weight

    @staticmethod
    def check(reply: Payload) -> None:
        """Raise PayloadError unless all that `reply` holds are finite numbers."""
        _check_finite(Pack.of(reply.tensors))
        for name, value in reply.scalars.items():
            if isinstance(value, str | bool):
                raise PayloadError(f"it sent the scalar {name}={value!r:.80}; a mean takes numbers only")

    def add(self, reply: Payload, weight: float) -> None:
        """Add one reply, whole or not at all.

        Args:
            reply: of the same names, dtypes and shapes as the others, which is for the caller to see to.
            weight: finite, from 0.

        Raises:
            PayloadError: it is no number, or unlike the others.
        """
        if not 0.0 <= weight < math.inf:
            raise PayloadError(f"it has weight {weight}; expected a number from 0")
        self.check(reply)
        pack = Pack.of(reply.tensors)
        if self._layout is not None and not pack.layout.like(self._layout):
            raise PayloadError("it has other tensors than what was added before")
        if self.num and reply.scalars.keys() != self._scalars.keys():
            raise PayloadError("it has other scalars than what was added before")
        if self._layout is None:
            self._layout = pack.layout
            self._totals = [torch.zeros(num, dtype=torch.float64) for _, _, num in pack.layout.runs]
        for total, flat in zip(self._totals, pack.flats, strict=True):
            for some, values in zip(torch.split(total, _CHUNK), torch.split(flat, _CHUNK), strict=True):
                # Product and sum are rounded one by one: a fused step would round by where a vector register ends.
                some.add_(values.to(torch.float64, copy=True).mul_(weight))
        for name, value in reply.scalars.items():
            self._scalars[name] = self._scalars.get(name, 0.0) + weight * float(value)
        self._weight += weight
        self.num += 1

    def mean(self) -> Payload:
        """The weighted mean in the replies' dtypes; empty if nothing was added. Integers come as float64."""
        return self.rounded(self.exact_mean())

    def exact_mean(self) -> Payload:
        """The weighted mean in float64, not rounded to what the replies came in; empty if nothing was added."""
        if not self._weight or self._layout is None:
            return Payload()
        flats = [total / self._weight for total in self._totals]
        tensors = dict(Pack(self._layout, flats).items())
        return Payload(tensors, {name: total / self._weight for name, total in self._scalars.items()})

    def rounded(self, mean: Payload) -> Payload:
        """`mean`, or what was made of it, in the replies' dtypes; integers stay float64. No memory is shared."""
        tensors = {}
        for name, tensor in mean.tensors.items():
            dtype = self._dtype(name)
            tensors[name] = tensor.to(dtype if dtype.is_floating_point else torch.float64, copy=True)
        return Payload(tensors, mean.scalars)

    def _dtype(self, name: str) -> torch.dtype:
        assert self._layout is not None
        return self._layout.runs[self._layout.places[name].run][0]


def _check_finite(pack: Pack) -> None:
    # A sum costs less than a look at each number, and is finite only if all are; the reverse is not so.
    if all(math.isfinite(flat.sum().item()) for flat in pack.flats):
        return
    if bad := [name for name, tensor in pack.items() if not tensor.isfinite().all()]:
        raise PayloadError(f"it sent NaN or infinite numbers in {', '.join(bad[:3])}")
