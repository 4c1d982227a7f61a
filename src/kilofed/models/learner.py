"""Trained tensors that live outside the model they belong to, with their optimiser: many learners share one model."""

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
    """A party's own copy of some trained tensors of a shared model; nothing is written into the model.

    Args:
        model: where the tensors belong.
        values: by short name (`models.trained`); others of the model's trained tensors stay the model's own.
        spec: optimiser and gradient clipping. The norm is that of these tensors alone.

    Raises:
        ModelError: a value belongs to nothing that the model trains, or has another shape.
    """

    def __init__(self, model: nn.Module, values: Mapping[str, Tensor], spec: TrainSpec) -> None:
        own = loading.trained(model)
        full = {id(p): name for name, p in model.named_parameters()}
        for name, value in values.items():
            if name not in own or own[name].shape != value.shape:
                raise ModelError(f"{name} of shape {tuple(value.shape)} is not trained by {type(model).__name__} here")
        place = {name: number for number, name in enumerate(full.values())}
        # In the model's order: a norm over all of them is a sum in that order.
        self.tensors = {
            name: nn.Parameter(values[name].detach().to(own[name].device, own[name].dtype, copy=True))
            for name in sorted(values, key=lambda name: place[full[id(own[name])]])
        }
        self._model, self._spec = model, spec
        self._places = {name: "model." + full[id(own[name])] for name in self.tensors}
        self._optimizer = training.optimizer_for(list(self.tensors.values()), spec) if self.tensors else None

    def run(self, function: Callable[[], T]) -> T:
        """Call `function` while the model has this learner's tensors."""
        bound = _Bound(self._model, function)
        found: T = functional_call(bound, {self._places[name]: p for name, p in self.tensors.items()}, ())
        return found

    def step(self, rate: float) -> None:
        """One optimiser step with the gradients that were added up; they are gone afterwards."""
        if self._optimizer is None:
            return
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        if self._spec.max_grad_norm:
            nn.utils.clip_grad_norm_(list(self.tensors.values()), self._spec.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def forget(self) -> None:
        """Drop gradients that no step will use."""
        for parameter in self.tensors.values():
            parameter.grad = None

    def read(self) -> dict[str, Tensor]:
        """Copies of the tensors, float32 on the CPU."""
        return {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in self.tensors.items()}

    def write(self, values: Mapping[str, Tensor]) -> None:
        """Take over `values`; the optimiser goes on as it was."""
        with torch.no_grad():
            for name, parameter in self.tensors.items():
                parameter.copy_(values[name])

    def save(self) -> dict[str, Tensor]:
        """Weights and moments, under names that begin with WEIGHTS and MOMENTS."""
        saved = {WEIGHTS + name: value for name, value in self.read().items()}
        for name, parameter in self.tensors.items():
            for key, value in self._state(parameter).items():
                if isinstance(value, Tensor):
                    saved[f"{MOMENTS}{key}.{name}"] = value.detach().cpu().clone()
        return saved

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Take over what `save` gave; gradients are dropped."""
        self.write({name: saved[WEIGHTS + name] for name in self.tensors})
        self.forget()
        for parameter in self.tensors.values():
            self._state(parameter).clear()
        for name, value in saved.items():
            if name.startswith(MOMENTS):
                key, _, of = name.removeprefix(MOMENTS).partition(".")
                parameter = self.tensors[of]
                # Adam counts its steps on the CPU.
                self._state(parameter)[key] = value.clone() if key == "step" else value.to(parameter.device, copy=True)

    def _state(self, parameter: nn.Parameter) -> dict[str, object]:
        if self._optimizer is None:
            return {}
        found: dict[str, object] = self._optimizer.state[parameter]
        return found


def restored(model: nn.Module, saved: Mapping[str, Tensor], spec: TrainSpec) -> Learner:
    """The learner that `save` was called on; other names in `saved` are left alone."""
    weights = {name.removeprefix(WEIGHTS): value for name, value in saved.items() if name.startswith(WEIGHTS)}
    learner = Learner(model, weights, spec)
    learner.load({name: value for name, value in saved.items() if name.startswith((WEIGHTS, MOMENTS))})
    return learner


class _Bound(nn.Module):
    """A function of a model, as a module whose parameters can be exchanged for one call."""

    def __init__(self, model: nn.Module, function: Callable[[], T]) -> None:
        super().__init__()
        self.model, self._function = model, function

    def forward(self) -> object:
        return self._function()
