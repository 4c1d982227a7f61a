"""Two-point zeroth-order SGD on weights w0 + sum_k a_k z_k: two forwards per step, weights rebuilt module by module.

Source: MeZO (Malladi et al. 2023, arXiv:2305.17333), as FedKSeed uses it (Qin et al. 2024, arXiv:2312.06353).
Differs: w0 is never perturbed in place. Each weight is w0 + sum_k a_k z_k, rounded once into a scratch buffer before its
module runs, so nothing drifts in 16 bits and memory is that of inference plus the largest module. Vectors are held and
computed in float32 whatever the model's dtype: in 16 bits, adding eps to a norm's weight of 1 changes nothing.
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
MIN_SHARE_MOVED = 0.05
"""Share of 16-bit weights that eps has to change; below it a projected gradient is mostly rounding error."""


@dataclass(frozen=True)
class Point:
    """Weights reached from w0 by adding the updates of one or more pools in turn; each addition rounds once."""

    chain: tuple[Position, ...]
    """Folded pools first; steps change the coefficients of the last one."""

    @property
    def pool(self) -> SeedPool:
        """The pool whose directions steps use."""
        return self.chain[-1].pool

    def moved(self, k: int, delta: float) -> "Point":
        """The point with the last position's a_k + delta. Raises DirectionsError: a_k + delta rounds to a_k."""
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
class _ModuleParameter:
    """One trained parameter under the name by which one module holds it."""

    name: str
    slot: Slot
    parameter: nn.Parameter


class PerturbedModel:
    """A model that can run with the weights of any point while its own parameters stay at w0.

    Weights are swapped in by forward hooks, so a parameter has to be used in the forward of the module that holds it.

    Args:
        model: holds w0; its parameters are the same objects before and after.
        trained: the parameters to perturb, by name.
        num_seeds: K of the pools.
    """

    def __init__(self, model: nn.Module, trained: Mapping[str, nn.Parameter], num_seeds: int) -> None:
        self.model, self.trained = model, dict(trained)
        self.layout = layout_of(trained.items(), num_seeds)
        slots = {id(p): self.layout.by_name[name] for name, p in trained.items()}
        self._owners = {
            module: [
                _ModuleParameter(n, slots[id(p)], p)
                for n, p in module._parameters.items()
                if p is not None and id(p) in slots
            ]
            for module in model.modules()
        }
        self.device = next(iter(trained.values())).device
        self._scratch = _Scratch(self.device)

    @contextmanager
    def at(self, point: Point) -> Iterator[nn.Module]:
        """The model with the weights at `point` inside the block. A forward needs scratch for one module at a time."""
        self._scratch.top = 0
        with ExitStack() as stack:
            for module, parameters in self._owners.items():
                if parameters:
                    swap = _WeightSwap(module, parameters, point, self._scratch)
                    stack.callback(swap.restore)
                    stack.callback(module.register_forward_pre_hook(swap.before_forward, prepend=True).remove)
                    stack.callback(module.register_forward_hook(swap.after_forward).remove)
            yield self.model

    def weights(self, point: Point) -> Iterator[tuple[str, Tensor]]:
        """Name and weights of each slot at `point`; the next iteration overwrites the tensor."""
        for slot in self.layout.slots:
            self._scratch.top = 0
            yield slot.name, point.weights(self.trained[slot.name], slot, self._scratch.take(slot))

    def digest(self, point: Point) -> bytes:
        """An 8-byte hash of names, shapes, dtypes and all weights at `point`."""
        hashed = hashlib.blake2b(self.layout.digest.encode(), digest_size=8)
        for _, tensor in self.weights(point):
            hashed.update(tensor.reshape(-1).view(torch.uint8).cpu().numpy().data)
        return hashed.digest()

    def merge(self, point: Point) -> nn.Module:
        """Overwrite w0 with the weights at `point` and return the model; vectors are rounded to the model's dtype."""
        with torch.no_grad():
            for name, tensor in self.weights(point):
                self.trained[name].copy_(tensor)
        return self.model

    def check_eps(self, pool: SeedPool, eps: float) -> None:
        """Raise DirectionsError if rounding to 16 bits loses a perturbation of `eps`; tests the largest matrix."""
        half_precision = [slot for slot in self.layout.slots if slot.dtype != torch.float32]
        if not half_precision:
            return
        slot = max(half_precision, key=lambda slot: math.prod(slot.shape))
        w0 = self.trained[slot.name].detach()
        origin = pool.at(np.zeros(pool.num_seeds, np.float32))
        perturbed = origin.moved(0, eps).rebuild(w0, first_block=slot.first_block)
        share = float((perturbed != w0).float().mean())
        if share < MIN_SHARE_MOVED:
            raise DirectionsError(
                f"eps is {eps}, which changes only {100 * share:.1f} % of the weights of {slot.name} in "
                f"{str(slot.dtype).removeprefix('torch.')}: raise eps, or load the model in float32"
            )


class _Scratch:
    """One buffer used as a stack; grows to what the largest module needs."""

    def __init__(self, device: torch.device) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)
        self.top = 0

    def take(self, slot: Slot) -> Tensor:
        """An uninitialised tensor for the weights of `slot`."""
        end = self.top + math.prod(slot.shape) * slot.dtype.itemsize
        if end > len(self._buffer):
            # Tensors taken earlier keep the old buffer alive for as long as they are used.
            with torch.inference_mode(False):
                self._buffer = torch.empty(end, dtype=torch.uint8, device=self._buffer.device)
        taken = self._buffer[self.top : end].view(slot.dtype).view(slot.shape)
        self.top = -(-end // ALIGNMENT) * ALIGNMENT
        return taken


class _WeightSwap:
    """Replaces one module's parameters by weights in scratch memory during its forward."""

    def __init__(self, module: nn.Module, parameters: list[_ModuleParameter], point: Point, scratch: _Scratch) -> None:
        self._module, self._parameters, self._point, self._scratch = module, parameters, point, scratch
        self._dtype = parameters[0].parameter.dtype
        self._in_float32 = all(p.slot.dtype != p.parameter.dtype for p in parameters)
        self._start = 0
        self._bias: Tensor | None = None

    def before_forward(self, module: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...] | None:
        """Set the weights; a module that has only vectors, such as a norm, computes in float32."""
        self._start = self._scratch.top
        for own in self._parameters:
            weights = self._point.weights(own.parameter, own.slot, self._scratch.take(own.slot))
            if weights.dtype != own.parameter.dtype and not self._in_float32:
                # In a module with a 16-bit matrix a vector has to be 16-bit too; a bias can be added afterwards instead.
                rounded = weights.to(own.parameter.dtype)
                if own.name == "bias":
                    self._bias, rounded = weights, torch.zeros_like(rounded)
                weights = rounded
            module._parameters[own.name] = nn.Parameter(weights, requires_grad=False)
        if not self._in_float32:
            return None
        return tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)

    def after_forward(self, module: nn.Module, inputs: tuple[object, ...], output: object) -> object:
        """Restore the module's own parameters; the output gets the model's dtype."""
        if isinstance(output, Tensor) and self._bias is not None:
            output = (output.float() + self._bias).to(output.dtype)
        if isinstance(output, Tensor) and self._in_float32:
            output = output.to(self._dtype)
        self.restore()
        return output

    def restore(self) -> None:
        """Give the module its own parameters back and free the scratch memory."""
        for own in self._parameters:
            self._module._parameters[own.name] = own.parameter
        self._scratch.top, self._bias = self._start, None


@dataclass(frozen=True)
class StepsResult:
    """Outcome of a sequence of two-point steps."""

    gradients: Floats
    """(num_steps,) projected gradients, finite; 0 where a step was skipped."""
    skipped: tuple[int, ...]
    """Steps whose loss or projected gradient was not finite or out of range; they changed no coefficient."""
    loss: float
    """Mean over the other steps, nats per token."""
    end: Point
    """The weights after the last step."""


@dataclass(frozen=True)
class StepSettings:
    """Hyperparameters of two-point steps."""

    eps: float
    """Perturbation: the two forwards are at the point plus and minus eps times a direction of +1 and -1."""
    lr: float
    """Learning rate, constant."""
    max_gradient: float = math.inf
    """Steps whose projected gradient is larger in magnitude are skipped."""
    objective: training.Loss = training.loss


def take_steps(
    perturbed: PerturbedModel,
    point: Point,
    seeds: Sequence[int],
    batches: Iterable[list[Example]],
    settings: StepSettings,
) -> StepsResult:
    """Descend from `point` by two-point steps: one direction and one batch per step.

    Args:
        seeds: (num_steps,) directions of the point's pool.
        batches: one per step.

    Raises:
        DirectionsError: a coefficient plus eps rounds to the coefficient in float32.
        NonFiniteLoss: every step was skipped.
    """
    start = point.chain[-1].a.astype(np.float64)
    sums = np.zeros_like(start)
    gradients, skipped, losses = np.zeros(len(seeds)), [], []
    perturbed.model.eval()
    for number, (k, examples) in enumerate(zip(seeds, batches, strict=True)):
        batch = training.collate(examples, perturbed.device)
        gradient, loss = projected_gradient(perturbed, point, int(k), batch, settings)
        if not (math.isfinite(loss) and abs(gradient) <= settings.max_gradient):
            skipped.append(number)
            continue
        gradients[number] = gradient
        losses.append(loss)
        sums[k] += gradient
        point = point.at((start - settings.lr * sums).astype(np.float32))
    if not losses:
        raise NonFiniteLoss(
            f"none of {len(seeds)} steps had a finite loss and a projected gradient below {settings.max_gradient:g}; "
            "lower method.lr"
        )
    return StepsResult(gradients, tuple(skipped), float(np.mean(losses)), point)


def projected_gradient(
    perturbed: PerturbedModel, point: Point, k: int, batch: training.Batch, settings: StepSettings
) -> tuple[float, float]:
    """The batch loss's central difference along direction k, by two forwards, and their mean loss (nats)."""
    ends, losses = (point.moved(k, settings.eps), point.moved(k, -settings.eps)), []
    with torch.inference_mode():
        for end in ends:
            with perturbed.at(end) as model:
                losses.append(float(settings.objective(model, batch)))
    # The exact distance of the two float32 coefficients; 2 eps is off by their rounding.
    distance = float(ends[0].chain[-1].a[k]) - float(ends[1].chain[-1].a[k])
    return (losses[0] - losses[1]) / distance, (losses[0] + losses[1]) / 2
