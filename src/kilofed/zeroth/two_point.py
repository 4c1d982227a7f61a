"""Zeroth-order steps on a state (w0, a): two forwards per step, weights made right before each module needs them.

Source: MeZO (Malladi et al. 2023, arXiv:2305.17333), as FedKSeed uses it (Qin et al. 2024, arXiv:2312.06353).
Differs: w0 is never touched. Each weight is w0 + sum_k a_k z_k, rounded once, written to a scratch buffer before its
module runs, so nothing drifts in 16 bits and memory is that of inference plus the largest module. Vectors are held and
computed in float32 whatever the model's dtype: eps would vanish beside a norm's ones.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kilofed.data.examples import Example
from kilofed.errors import NonFiniteLoss
from kilofed.models import training
from kilofed.zeroth.directions.layout import Slot, layout_of
from kilofed.zeroth.directions.pool import Position, SeedPool
from kilofed.zeroth.directions.spec import DirectionsError

Floats = npt.NDArray[np.float64]
ALIGNMENT = 64
LEAST_MOVED = 0.05
"""Share of 16-bit weights that eps has to move: below it a slope is mostly rounding."""


@dataclass(frozen=True)
class Point:
    """Weights reached from w0 by one position after the other; each one rounds once."""

    chain: tuple[Position, ...]
    """Folded pools first; steps move along the last one."""

    @property
    def pool(self) -> SeedPool:
        """The pool along which steps go."""
        return self.chain[-1].pool

    def moved(self, k: int, delta: float) -> "Point":
        """The point with the last position's a_k + delta. Raises DirectionsError: delta vanishes beside a_k."""
        return Point((*self.chain[:-1], self.chain[-1].moved(k, delta)))

    def at(self, a: npt.NDArray[np.float32]) -> "Point":
        """The point with the last position's coefficients replaced by `a` (K,)."""
        return Point((*self.chain[:-1], self.pool.at(a)))

    def weights(self, w0: Tensor, slot: Slot, out: Tensor | None = None) -> Tensor:
        """The weights of one slot, in slot.dtype; written to `out` if given."""
        start = w0.detach().to(slot.dtype).contiguous()
        for position in self.chain:
            out = position.rebuild(start, first_block=slot.first_block, out=out)
            start = out
        assert out is not None
        return out


@dataclass(frozen=True)
class _Part:
    """One trained parameter, as one module holds it."""

    name: str
    slot: Slot
    parameter: nn.Parameter


class Stream:
    """A model whose trained weights can be those of any point, while the model itself stays at w0.

    Weights are swapped in by hooks, so a parameter has to be used in the forward of the module that holds it.

    Args:
        model: holds w0; its parameters are the same objects before and after.
        trained: the parameters that move, by name.
        num_seeds: K of the pools.
    """

    def __init__(self, model: nn.Module, trained: Mapping[str, nn.Parameter], num_seeds: int) -> None:
        self.model, self.trained = model, dict(trained)
        self.layout = layout_of(trained.items(), num_seeds)
        slots = {id(p): self.layout.by_name[name] for name, p in trained.items()}
        self._owners = {
            module: [
                _Part(n, slots[id(p)], p) for n, p in module._parameters.items() if p is not None and id(p) in slots
            ]
            for module in model.modules()
        }
        self.device = next(iter(trained.values())).device
        self._scratch = _Scratch(self.device)

    @contextmanager
    def at(self, point: Point) -> Iterator[nn.Module]:
        """The model at `point`, for as long as the block runs. A forward needs scratch for one module at a time."""
        self._scratch.top = 0
        with ExitStack() as stack:
            for module, parts in self._owners.items():
                if parts:
                    lent = _Lent(module, parts, point, self._scratch)
                    stack.callback(lent.give_back)
                    stack.callback(module.register_forward_pre_hook(lent.enter, prepend=True).remove)
                    stack.callback(module.register_forward_hook(lent.leave).remove)
            yield self.model

    def weights(self, point: Point) -> Iterator[tuple[str, Tensor]]:
        """Name and weights of each slot at `point`; a tensor is good until the next one is asked for."""
        for slot in self.layout.slots:
            self._scratch.top = 0
            yield slot.name, point.weights(self.trained[slot.name], slot, self._scratch.take(slot))

    def digest(self, point: Point) -> bytes:
        """8 bytes that two sites share exactly when names, shapes, dtypes and all weights at `point` are equal."""
        hashed = hashlib.blake2b(self.layout.digest.encode(), digest_size=8)
        for _, tensor in self.weights(point):
            hashed.update(tensor.reshape(-1).view(torch.uint8).cpu().numpy().data)
        return hashed.digest()

    def settle(self, point: Point) -> nn.Module:
        """Overwrite w0 with the weights at `point` and return the model; vectors are rounded to its dtype."""
        with torch.no_grad():
            for name, tensor in self.weights(point):
                self.trained[name].copy_(tensor)
        return self.model

    def check_eps(self, pool: SeedPool, eps: float) -> None:
        """Raise DirectionsError if rounding to 16 bits swallows a step of `eps`; looks at the largest matrix."""
        narrow = [slot for slot in self.layout.slots if slot.dtype != torch.float32]
        if not narrow:
            return
        slot = max(narrow, key=lambda slot: math.prod(slot.shape))
        w0 = self.trained[slot.name].detach()
        there = pool.at(np.zeros(pool.num_seeds, np.float32)).moved(0, eps).rebuild(w0, first_block=slot.first_block)
        share = float((there != w0).float().mean())
        if share < LEAST_MOVED:
            raise DirectionsError(
                f"eps is {eps}, which moves {100 * share:.1f} % of the weights of {slot.name} in "
                f"{str(slot.dtype).removeprefix('torch.')}: raise eps, or load the model in float32"
            )


class _Scratch:
    """One buffer, handed out in a stack; grows to what the largest module needs."""

    def __init__(self, device: torch.device) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)
        self.top = 0

    def take(self, slot: Slot) -> Tensor:
        """An uninitialised tensor for the weights of `slot`."""
        end = self.top + math.prod(slot.shape) * slot.dtype.itemsize
        if end > len(self._buffer):
            # Tensors handed out before keep the old buffer alive for as long as they are used.
            with torch.inference_mode(False):
                self._buffer = torch.empty(end, dtype=torch.uint8, device=self._buffer.device)
        part = self._buffer[self.top : end].view(slot.dtype).view(slot.shape)
        self.top = -(-end // ALIGNMENT) * ALIGNMENT
        return part


class _Lent:
    """Scratch weights lent to one module for the length of its forward."""

    def __init__(self, module: nn.Module, parts: list[_Part], point: Point, scratch: _Scratch) -> None:
        self._module, self._parts, self._point, self._scratch = module, parts, point, scratch
        self._dtype = parts[0].parameter.dtype
        self._widen = all(part.slot.dtype != part.parameter.dtype for part in parts)
        self._start = 0
        self._bias: Tensor | None = None

    def enter(self, module: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...] | None:
        """Put weights in; a module of vectors alone, such as a norm, computes in float32."""
        self._start = self._scratch.top
        for part in self._parts:
            weights = self._point.weights(part.parameter, part.slot, self._scratch.take(part.slot))
            if weights.dtype != part.parameter.dtype and not self._widen:
                # Beside a matrix of 16 bits a vector has to be as narrow; a bias can be added afterwards instead.
                narrow = weights.to(part.parameter.dtype)
                if part.name == "bias":
                    self._bias, narrow = weights, torch.zeros_like(narrow)
                weights = narrow
            module._parameters[part.name] = nn.Parameter(weights, requires_grad=False)
        if not self._widen:
            return None
        return tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)

    def leave(self, module: nn.Module, inputs: tuple[object, ...], output: object) -> object:
        """Take weights out again; the output has the model's dtype."""
        if isinstance(output, Tensor) and self._bias is not None:
            output = (output.float() + self._bias).to(output.dtype)
        if isinstance(output, Tensor) and self._widen:
            output = output.to(self._dtype)
        self.give_back()
        return output

    def give_back(self) -> None:
        """Let the module have its own parameters again."""
        for part in self._parts:
            self._module._parameters[part.name] = part.parameter
        self._scratch.top, self._bias = self._start, None


@dataclass(frozen=True)
class Walk:
    """What a stretch of steps found."""

    slopes: Floats
    """(num_steps,) finite; 0 where a step was skipped."""
    skipped: tuple[int, ...]
    """Steps whose losses or slope were not finite or out of range; they moved nothing."""
    loss: float
    """Mean over the other steps, nats per token."""
    end: Point


@dataclass(frozen=True)
class Steps:
    """How a walk goes."""

    eps: float
    """Distance of the two forwards from the point, along a direction of +1 and -1."""
    lr: float
    """What a slope is multiplied with; constant."""
    max_slope: float = math.inf
    """Steps with a steeper slope are skipped."""
    objective: training.Loss = training.loss


def walk(stream: Stream, point: Point, seeds: Sequence[int], batches: Iterable[list[Example]], steps: Steps) -> Walk:
    """Walk downhill from `point`: one direction and one batch per step, the slope by two forwards.

    Args:
        seeds: (num_steps,) directions of the point's pool.
        batches: one per step.

    Raises:
        DirectionsError: eps vanishes in float32 beside a coefficient. NonFiniteLoss: every step was skipped.
    """
    start = point.chain[-1].a.astype(np.float64)
    sums = np.zeros_like(start)
    slopes, skipped, losses = np.zeros(len(seeds)), [], []
    stream.model.eval()
    for number, (k, examples) in enumerate(zip(seeds, batches, strict=True)):
        found, loss = slope(stream, point, int(k), training.collate(examples, stream.device), steps)
        if not (math.isfinite(loss) and abs(found) <= steps.max_slope):
            skipped.append(number)
            continue
        slopes[number] = found
        losses.append(loss)
        sums[k] += found
        point = point.at((start - steps.lr * sums).astype(np.float32))
    if not losses:
        raise NonFiniteLoss(
            f"none of {len(seeds)} steps had a finite loss and a slope below {steps.max_slope:g}: lower lr"
        )
    return Walk(slopes, tuple(skipped), float(np.mean(losses)), point)


def slope(stream: Stream, point: Point, k: int, batch: training.Batch, steps: Steps) -> tuple[float, float]:
    """The derivative of the batch's loss along direction k, by two forwards, and their mean loss (nats)."""
    ends, losses = (point.moved(k, steps.eps), point.moved(k, -steps.eps)), []
    with torch.inference_mode():
        for end in ends:
            with stream.at(end) as model:
                losses.append(float(steps.objective(model, batch)))
    # The distance that float32 coefficients really lie apart, which 2 eps is only nearly.
    apart = float(ends[0].chain[-1].a[k]) - float(ends[1].chain[-1].a[k])
    return (losses[0] - losses[1]) / apart, (losses[0] + losses[1]) / 2
