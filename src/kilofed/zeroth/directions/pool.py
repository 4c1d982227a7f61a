"""The seed pool: K directions in weight space, and the point w0 + sum_k a_k z_k in one pass over memory.

Source of the idea: FedKSeed (Qin et al. 2024, arXiv:2312.06353). Differs: the directions are structured (HSP-1,
docs/seed-pool.md), which makes the sum a fast Hadamard transform and its bits the same on every device.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kilofed.zeroth.directions import cpu, reference, spec
from kilofed.zeroth.directions.kernels import Floats
from kilofed.zeroth.directions.layout import DTYPES
from kilofed.zeroth.directions.philox import philox, split64
from kilofed.zeroth.directions.spec import DirectionsError, check_below, check_num_seeds

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SeedPool:
    """K directions of +1 and -1, orthogonal within every full block of K parameters."""

    num_seeds: int = spec.DEFAULT_NUM_SEEDS
    """K, a power of two from 64 to 2**20; more directions span more of the space and cost more bytes."""
    key: int = 0
    """Below 2**64; pools with different keys have independent directions."""

    def __post_init__(self) -> None:
        check_num_seeds(self.num_seeds)
        check_below("key", self.key, 1 << 64)

    def at(self, a: Floats | Tensor) -> "Position":
        """The point with coefficients `a`: (K,) float32, finite, learning rate and sign folded in."""
        return Position(self, check_coefficients(a, self.num_seeds).copy())

    def rebuild(self, w0: Tensor, a: Floats | Tensor, *, first_block: int = 0, out: Tensor | None = None) -> Tensor:
        """round(w0 + sum_k a_k z_k) for one tensor; see Position.rebuild."""
        return self.at(a).rebuild(w0, first_block=first_block, out=out)

    def direction(
        self,
        k: int,
        num_elements: int,
        *,
        first_block: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """(num_elements,) of +1 and -1: direction k from the start of `first_block`."""
        check_below("direction k", k, self.num_seeds)
        check_below("num_elements", num_elements, 1 << 62)
        check_below("first_block", first_block, spec.MAX_FIRST_BLOCK)
        out = torch.empty(num_elements, dtype=_supported(dtype))
        cpu.direction(k, out, self.key, self.num_seeds, first_block)
        return out.to(device)

    def sample(self, round: int, client: int, num_steps: int, *, weights: Integers | None = None) -> Integers:
        """Sample a client's directions of a round: a pure function of the arguments and the key, so none are sent.

        Args:
            round: below 2**32.
            client: the client's own id, below 2**32.
            num_steps: how many to draw, with replacement.
            weights: (K,) integers from 0 with a sum from 1 to 2**32 - 1; the probability of k is weights[k] / sum, up to
                2**-32. None, or all equal, is uniform. Integers, because probabilities computed on two machines may
                differ in the last bit; see `integer_weights`.

        Returns:
            (num_steps,) numbers of directions.
        """
        check_below("round", round, 1 << 32)
        check_below("client", client, 1 << 32)
        check_below("num_steps", num_steps, 1 << 32)
        calls = np.arange(-(-num_steps // 4))
        counter = np.stack(np.broadcast_arrays(calls, round, client, spec.TAG_ORDER), axis=-1)
        words = philox(counter, split64(self.key)).reshape(-1)[:num_steps].astype(np.uint64)
        ends = np.cumsum(self._checked(weights)).astype(np.uint64)
        seeds: Integers = np.searchsorted(ends, words * ends[-1] >> np.uint64(32), side="right").astype(np.int64)
        return seeds

    def _checked(self, weights: Integers | None) -> Integers:
        if weights is None:
            return np.ones(self.num_seeds, dtype=np.int64)
        if weights.shape != (self.num_seeds,) or not np.issubdtype(weights.dtype, np.integer):
            raise DirectionsError(
                f"sampling weights are {weights.dtype} {weights.shape}; expected integers of shape ({self.num_seeds},)"
            )
        if weights.min() < 0 or weights.max() >= 1 << 32 or not 0 < int(weights.sum(dtype=np.uint64)) < 1 << 32:
            raise DirectionsError(
                "sampling weights are out of range; expected integers from 0 with a sum from 1 to 2**32 - 1"
            )
        return weights.astype(np.int64)


@dataclass(frozen=True)
class Position:
    """The point w0 + sum_k a_k z_k for coefficients `a`, for any tensor w0; made by SeedPool.at."""

    pool: SeedPool
    a: Floats
    _tables: dict[torch.dtype, Floats] = field(default_factory=dict, repr=False, compare=False)

    def moved(self, k: int, delta: float) -> "Position":
        """The point with a_k + delta instead of a_k, one float32 addition.

        Raises:
            DirectionsError: the sum is not finite, or rounds to a_k.
        """
        check_below("direction k", k, self.pool.num_seeds)
        a = self.a.copy()
        a[k] += np.float32(delta)
        if not np.isfinite(a[k]) or (a[k] == self.a[k] and delta):
            raise DirectionsError(
                f"coefficient {k} = {self.a[k]} plus {delta} is {a[k]} in float32; expected a finite number that differs"
            )
        return Position(self.pool, a)

    def rebuild(self, w0: Tensor, *, first_block: int = 0, out: Tensor | None = None) -> Tensor:
        """round(w0 + sum_k a_k z_k), summed in float32 and rounded once, to nearest, ties to even.

        The bits depend only on w0, a, the pool and first_block, not on device, threads or chunks. If every
        coefficient is zero the result is w0, bit for bit.

        Args:
            w0: finite float32, bfloat16 or float16 of any shape, contiguous; its first element is the first of
                `first_block`.
            first_block: Slot.first_block, or that plus whole blocks for a later part of the tensor.
            out: of the shape, dtype and device of w0, contiguous; may be w0. None allocates it.
        """
        _supported(w0.dtype)
        out = torch.empty_like(w0) if out is None else out
        if out.shape != w0.shape or out.dtype != w0.dtype or out.device != w0.device:
            raise DirectionsError(
                f"out is {out.dtype} {tuple(out.shape)} on {out.device}, w0 is {w0.dtype} {tuple(w0.shape)} on {w0.device}"
            )
        if not (w0.is_contiguous() and out.is_contiguous()):
            raise DirectionsError(
                "w0 or out is not contiguous; directions follow the elements in memory order, so pass contiguous tensors"
            )
        check_below("first_block", first_block, spec.MAX_FIRST_BLOCK)
        with torch.no_grad():
            if not self.a.any():
                return out.copy_(w0)
            self._rebuild_into(out.view(-1), w0.detach().view(-1), first_block)
        return out

    def _rebuild_into(self, out: Tensor, w0: Tensor, first_block: int) -> None:
        if w0.device.type == "cpu" and len(self.a) >= cpu.MIN_KERNEL_SEEDS:
            if w0.dtype not in self._tables:
                self._tables[w0.dtype] = cpu.row_butterflies(self.a, w0.dtype)
            cpu.rebuild(w0, out, self._tables[w0.dtype], self.pool.key, first_block)
        elif w0.device.type == "cuda" and len(self.a) >= cpu.MIN_KERNEL_SEEDS:
            from kilofed.zeroth.directions import cuda

            cuda.rebuild(w0, out, torch.from_numpy(self.a).to(w0.device), self.pool.key, first_block)
        else:
            out.copy_(reference.rebuild(w0, torch.from_numpy(self.a).to(w0.device), self.pool.key, first_block))


def check_coefficients(a: Floats | Tensor, num_seeds: int) -> Floats:
    """The coefficients as an array, or DirectionsError unless they are (K,) float32 and finite."""
    values: Floats = a.detach().cpu().numpy() if isinstance(a, Tensor) else a
    if values.dtype != np.float32 or values.shape != (num_seeds,):
        raise DirectionsError(
            f"coefficients are {values.dtype} of shape {values.shape}; expected float32 of shape ({num_seeds},)"
        )
    if not np.isfinite(values).all():
        raise DirectionsError(f"coefficient {int(np.argmin(np.isfinite(values)))} is not finite")
    return values


def coefficients(gradients: npt.NDArray[np.float64], lr: float) -> Floats:
    """Coefficients of SGD: -lr * gradients in float64, rounded once to float32.

    Args:
        gradients: (K,) accumulated projected gradients.
        lr: learning rate.
    """
    return (-lr * gradients).astype(np.float32)


def integer_weights(probabilities: npt.NDArray[np.float64]) -> Integers:
    """Weights for SeedPool.sample in proportion to `probabilities`, the largest 65535 (less for K above 65536)."""
    if not np.isfinite(probabilities).all() or probabilities.min() < 0 or probabilities.max() <= 0:
        raise DirectionsError(
            "probabilities are negative, not finite or all 0; expected finite values from 0, at least one of them positive"
        )
    largest = min(65535, ((1 << 32) - 1) // len(probabilities))
    weights: Integers = np.rint(probabilities / probabilities.max() * largest).astype(np.int64)
    return weights


def _supported(dtype: torch.dtype) -> torch.dtype:
    if dtype not in DTYPES:
        raise DirectionsError(f"the dtype is {dtype}; directions support float32, bfloat16 and float16")
    return dtype
