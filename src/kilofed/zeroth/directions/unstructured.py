"""Unstructured directions as a reference: slow, one random number per parameter and direction.

RademacherPool and GaussianPool draw every direction independently by Philox and have the same bits on every host.
`official_direction` draws as the code of FedKSeed (Qin et al. 2024, arXiv:2312.06353) does; its bits depend on the
device, the dtype and the version of torch.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from kilofed.zeroth.directions import spec
from kilofed.zeroth.directions.kernels import Floats
from kilofed.zeroth.directions.philox import Words, compiled, philox_into, split64
from kilofed.zeroth.directions.pool import Integers, SeedPool, check_coefficients

GAUSSIAN_MEAN: Final = 510
"""Mean of the sum of four bytes."""
GAUSSIAN_SCALE: Final = np.float32(147.80053)
"""Its standard deviation, sqrt((2**16 - 1) / 3), in float32."""
SPAN: Final = 1 << 14


@dataclass(frozen=True)
class IndependentPool(ABC):
    """Base of the two pools; elements are numbered as in SeedPool, element 0 of block b being b * K."""

    num_seeds: int = spec.DEFAULT_NUM_SEEDS
    key: int = 0

    def __post_init__(self) -> None:
        SeedPool(self.num_seeds, self.key)

    @abstractmethod
    def _add_to(self, sums: Floats, first: int, nonzero: Integers, a: Floats) -> None:
        """Add a[i] z_k for each k = nonzero[i] to sums, in order; sums[0] is element `first`."""

    def rebuild(self, w0: Tensor, a: Floats | Tensor, *, first_block: int = 0, out: Tensor | None = None) -> Tensor:
        """round(w0 + sum_k a_k z_k) on the CPU, summed in float32 in order of k, rounded once; see Position.rebuild."""
        values = check_coefficients(a, self.num_seeds)
        nonzero = np.flatnonzero(values)
        if not len(nonzero):
            return w0.clone() if out is None else out.copy_(w0)
        sums = np.zeros(w0.numel(), dtype=np.float32)
        for start in range(0, len(sums), SPAN):
            self._add_to(sums[start : start + SPAN], first_block * self.num_seeds + start, nonzero, values[nonzero])
        moved = (w0.float() + torch.from_numpy(sums).view(w0.shape)).to(w0.dtype)
        return moved if out is None else out.copy_(moved)

    def direction(self, k: int, num_elements: int, *, first_block: int = 0) -> Tensor:
        """(num_elements,) float32: direction k from the start of `first_block`."""
        spec.check_below("direction k", k, self.num_seeds)
        a = np.zeros(self.num_seeds, dtype=np.float32)
        a[k] = 1
        return self.rebuild(torch.zeros(num_elements), a, first_block=first_block)

    def sample(self, round: int, client: int, num_steps: int, *, weights: Integers | None = None) -> Integers:
        """Same as SeedPool.sample under the same key."""
        return SeedPool(self.num_seeds, self.key).sample(round, client, num_steps, weights=weights)


class RademacherPool(IndependentPool):
    """+1 or -1 by one bit: element p is bit p % 32 of word p // 32 % 4 of counter (p // 128, k, high half, 2)."""

    def _add_to(self, sums: Floats, first: int, nonzero: Integers, a: Floats) -> None:
        add_rademacher(sums, first, nonzero, a, np.array(split64(self.key), dtype=np.uint32))


class GaussianPool(IndependentPool):
    """Approximately normal: the four bytes of word p % 4 of counter (p // 4, k, high half, 3), summed, centred and scaled.

    Variance 1, kurtosis 2.7, magnitude at most 3.45; z is an exact integer divided once in float32.
    """

    def _add_to(self, sums: Floats, first: int, nonzero: Integers, a: Floats) -> None:
        add_gaussian(sums, first, nonzero, a, np.array(split64(self.key), dtype=np.uint32))


@compiled
def add_rademacher(sums: Floats, first: int, nonzero: Integers, a: Floats, key: Words) -> None:
    """See RademacherPool."""
    words = np.empty((4, 1), dtype=np.uint32)
    for i in range(len(nonzero)):
        for j in range(len(sums)):
            p = first + j
            if j == 0 or p % 128 == 0:
                _draw(words, p // 128, nonzero[i], 2, key)
            minus = words[p // 32 % 4, 0] >> np.uint32(p % 32) & np.uint32(1)
            sums[j] += -a[i] if minus else a[i]


@compiled
def add_gaussian(sums: Floats, first: int, nonzero: Integers, a: Floats, key: Words) -> None:
    """See GaussianPool."""
    words = np.empty((4, 1), dtype=np.uint32)
    for i in range(len(nonzero)):
        for j in range(len(sums)):
            p = first + j
            if j == 0 or p % 4 == 0:
                _draw(words, p // 4, nonzero[i], 3, key)
            word = np.int64(words[p % 4, 0])
            total = (word & 255) + (word >> 8 & 255) + (word >> 16 & 255) + (word >> 24)
            sums[j] += a[i] * (np.float32(total - GAUSSIAN_MEAN) / GAUSSIAN_SCALE)


@compiled
def _draw(words: Words, call: int, k: int, tag: int, key: Words) -> None:
    low, high = np.uint64(call & 0xFFFFFFFF), np.uint64(call >> 32)
    philox_into(words, 0, 0, (low, np.uint64(k), high, np.uint64(tag)), np.uint64(key[0]), np.uint64(key[1]))


def official_seeds(num_seeds: int, generator: np.random.RandomState) -> list[int]:
    """Candidate seeds as the official server draws them: integers from 1 to 1e11 - 1."""
    return [int(seed) for seed in generator.randint(1, 100_000_000_000, size=num_seeds)]


def official_direction(seed: int, parameters: Iterable[Tensor]) -> Iterator[Tensor]:
    """Normal directions for parameters in model order, as `torch.manual_seed` and `torch.normal` draw them.

    Seeds torch's global generators, as the official code does.
    """
    torch.manual_seed(seed)
    for parameter in parameters:
        yield torch.normal(mean=0, std=1, size=parameter.size(), device=parameter.device, dtype=parameter.dtype)


def official_rebuild(parameters: Iterable[Tensor], amplitudes: dict[int, float], lr: float) -> list[Tensor]:
    """The official replay: w - lr * amplitude * z for one seed after the other, in the dtype of the weights."""
    moved = [parameter.detach().clone() for parameter in parameters]
    for seed, amplitude in amplitudes.items():
        if amplitude != 0:
            for i, z in enumerate(official_direction(seed, moved)):
                moved[i] = moved[i] - lr * (amplitude * z)
    return moved
