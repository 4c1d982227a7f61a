"""Trained tensors kept outside of their model, with their optimiser, so that many learners share one model."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kilofed.config.recipe import TrainSpec
from kilofed.errors import ModelError
from kilofed.models import loading, training

T = TypeVar("T")

WEIGHTS, MOMENTS = "weights.", "moments."


class Learner:
    """One party's copy of some trained tensors of a shared model, which is not changed.

    Args:
        model: the model whose forward uses the tensors.
        values: by short name (`loading.trained`); for its other trained tensors the model's own values are used.
        spec: optimiser and gradient clipping, whose norm is over these tensors only.

    Raises:
        ModelError: a name or shape does not match the model's trained tensors.
    """

    def __init__(self, model: nn.Module, values: Mapping[str, Tensor], spec: TrainSpec) -> None:
        trained = loading.trained(model)
        full_names = {id(p): name for name, p in model.named_parameters()}
        for name, value in values.items():
            if name not in trained or trained[name].shape != value.shape:
                raise ModelError(
                    f"{name} of shape {tuple(value.shape)} is not a trained tensor of this {type(model).__name__}"
                )
        positions = {name: number for number, name in enumerate(full_names.values())}
        # In the model's order, which fixes the summation order of the gradient norm.
        self.tensors = {
            name: nn.Parameter(values[name].detach().to(trained[name].device, trained[name].dtype, copy=True))
            for name in sorted(values, key=lambda name: positions[full_names[id(trained[name])]])
        }
        self._model, self._spec = model, spec
        self._full_names = {name: "model." + full_names[id(trained[name])] for name in self.tensors}
        self._optimizer = training.optimizer_for(list(self.tensors.values()), spec) if self.tensors else None

    def run(self, function: Callable[[], T]) -> T:
        """Call `function` with this learner's tensors in the model."""
        bound = _Bound(self._model, function)
        result: T = functional_call(bound, {self._full_names[name]: p for name, p in self.tensors.items()}, ())
        return result

    def step(self, rate: float) -> None:
        """One optimiser step with the accumulated gradients, which are cleared."""
        if self._optimizer is None:
            return
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        if self._spec.max_grad_norm:
            nn.utils.clip_grad_norm_(list(self.tensors.values()), self._spec.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def zero_grad(self) -> None:
        """Clear the accumulated gradients."""
        for parameter in self.tensors.values():
            parameter.grad = None

    def read(self) -> dict[str, Tensor]:
        """Copies of the tensors, float32 on the CPU."""
        return {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in self.tensors.items()}

    def write(self, values: Mapping[str, Tensor]) -> None:
        """Set the tensors; the optimiser's state is kept."""
        with torch.no_grad():
            for name, parameter in self.tensors.items():
                parameter.copy_(values[name])

    def save(self) -> dict[str, Tensor]:
        """Weights and optimiser moments, with the name prefixes WEIGHTS and MOMENTS."""
        saved = {WEIGHTS + name: value for name, value in self.read().items()}
        for name, parameter in self.tensors.items():
            for key, value in self._state(parameter).items():
                if isinstance(value, Tensor):
                    saved[f"{MOMENTS}{key}.{name}"] = value.detach().cpu().clone()
        return saved

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Load the result of `save`; gradients are cleared."""
        self.write({name: saved[WEIGHTS + name] for name in self.tensors})
        self.zero_grad()
        for parameter in self.tensors.values():
            self._state(parameter).clear()
        for name, value in saved.items():
            if name.startswith(MOMENTS):
                key, _, owner = name.removeprefix(MOMENTS).partition(".")
                parameter = self.tensors[owner]
                # Adam counts its steps on the CPU.
                self._state(parameter)[key] = value.clone() if key == "step" else value.to(parameter.device, copy=True)

    def _state(self, parameter: nn.Parameter) -> dict[str, object]:
        if self._optimizer is None:
            return {}
        result: dict[str, object] = self._optimizer.state[parameter]
        return result


def restore(model: nn.Module, saved: Mapping[str, Tensor], spec: TrainSpec) -> Learner:
    """A learner from the result of `save`; other names in `saved` are ignored."""
    weights = {name.removeprefix(WEIGHTS): value for name, value in saved.items() if name.startswith(WEIGHTS)}
    learner = Learner(model, weights, spec)
    learner.load({name: value for name, value in saved.items() if name.startswith((WEIGHTS, MOMENTS))})
    return learner


class _Bound(nn.Module):
    """A function that uses a model, as a module for `functional_call`."""

    def __init__(self, model: nn.Module, function: Callable[[], T]) -> None:
        super().__init__()
        self.model, self._function = model, function

    def forward(self) -> object:
        return self._function()
