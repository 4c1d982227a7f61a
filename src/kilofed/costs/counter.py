"""Forecast of operations and memory of each party in a round, without running it.

A method lists the passes of its batches through parts of models (`Work`). A `CostCounter` counts each pass on fake tensors
with the counter that also measures a run, so models that do not fit on this machine can be planned too.

Shapes: B rows, T tokens with padding, K positions of a row that go through the output head, D channels per token.
"""

import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from typing import cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kilofed.config.recipe import AdapterSpec, ModelSpec, Recipe, TrainSpec
from kilofed.costs import environment, measurement
from kilofed.data.examples import Example
from kilofed.errors import ModelError
from kilofed.federation.workload import Pass, Work
from kilofed.models import loading, training

ON_HEAP, HEAP = 8 << 20, 1.5
"""Tensors of fewer than ON_HEAP bytes are allocated on a fragmented heap and take HEAP times their size, as measured by
`benchmarks/costs/forecast.py` on Linux; larger ones are returned to the system when freed."""


class CostCounter:
    """Counts operations and memory of passes on models of fake tensors.

    Args:
        adapter: of the models.
        spec: training hyperparameters.
        classes: names of the classes; empty for language models.
    """

    def __init__(self, adapter: AdapterSpec, spec: TrainSpec, classes: Sequence[str]) -> None:
        self._adapter, self._train, self._classes = adapter, spec, classes
        self._outlines: dict[tuple[ModelSpec, bool], nn.Module] = {}
        self._rates: dict[Pass, list[float]] = {}
        self._mode = FakeTensorMode()

    def outline(self, spec: ModelSpec, *, plain: bool = False) -> nn.Module:
        """The model of `spec` as fake tensors: names, shapes and dtypes. Raises ModelError.

        Args:
            plain: without the adapter.
        """
        if (spec, plain) not in self._outlines:
            adapter = AdapterSpec(kind="full", head=self._adapter.head) if plain else self._adapter
            outline = loading.outline(spec, adapter, self._classes)
            with self._mode:
                self._outlines[spec, plain] = _with_fake_tensors(outline)
        return self._outlines[spec, plain]

    def weight_bytes(self, spec: ModelSpec) -> int:
        """Bytes of all parameters of a model."""
        return sum(p.numel() * p.element_size() for p in self.outline(spec).parameters())

    def trained_bytes(self, spec: ModelSpec) -> int:
        """Bytes of the trained parameters of a model."""
        return sum(p.numel() * p.element_size() for p in self.outline(spec).parameters() if p.requires_grad)

    def operations(self, passes: Iterable[Pass], spec: ModelSpec) -> float:
        """Floating-point operations of `passes` by a party that loads `spec`."""
        return sum(self._operations(one, spec) for one in passes)

    def activations(self, passes: Iterable[Pass], spec: ModelSpec) -> int:
        """Peak bytes of the largest of `passes` in addition to the weights: activations and gradients."""
        kinds: dict[Pass, list[Pass]] = {}
        for one in passes:
            kinds.setdefault(replace(one, rows=1, width=1, kept=min(one.kept, 1), times=1.0), []).append(one)
        # Memory grows with tokens and with positions at the output head, so one of these two batches has the peak.
        largest = {max(group, key=by) for group in kinds.values() for by in (_tokens, _positions)}
        return max((self._run(one, spec)[1] for one in largest), default=0)

    def memory(self, works: Sequence[Work], spec: ModelSpec, *, messages: int, together: int = 1) -> int:
        """Bytes of a process that runs clients with these works, in addition to what it takes without a model.

        Args:
            messages: bytes of the buffers of the longest message.
            together: clients in the process.
        """
        passes = [one for work in works for one in work.passes]
        learns = any(one.learns for one in passes)
        moments = {"adamw": 2, "adam": 2, "sgd": 0}[self._train.optimizer] * self.trained_bytes(spec) if learns else 0
        activations = self.activations(passes, spec)
        busy = moments + activations + max(work.scratch for work in works)
        if any(work.waits for work in works):
            busy += (together - 1) * activations
        return self.weight_bytes(spec) + max(busy, messages)

    def _operations(self, one: Pass, spec: ModelSpec) -> float:
        like = replace(one, rows=1, width=1, kept=min(one.kept, 1), times=1.0, model=one.model or spec)
        if like not in self._rates:
            # Exact for stacks of blocks: operations per row, token, pair of tokens and position at the head.
            sizes = [(4, 1), (8, 1), (8, 4), (16, 2)]
            samples = [replace(like, width=wide, kept=kept * like.kept) for wide, kept in sizes]
            basis = torch.tensor([[1, p.width, p.width**2, p.kept] for p in samples], dtype=torch.float64)
            counted = torch.tensor([self._run(sample, spec)[0] for sample in samples], dtype=torch.float64)
            self._rates[like] = torch.linalg.lstsq(basis, counted[:, None], driver="gelsd").solution[:, 0].tolist()
        per_row = [1, one.width, one.width**2, one.kept]
        each = sum(rate * amount for rate, amount in zip(self._rates[like], per_row, strict=True))
        return one.times * round(one.rows * each)

    def _run(self, one: Pass, spec: ModelSpec) -> tuple[int, int]:
        """(operations, peak bytes) of a pass. Raises ModelError: the model does not run on fake tensors."""
        owner = one.model or spec
        model = self.outline(owner, plain=one.plain)
        try:
            return self._measured(model, one)
        except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
            # A model's own code may read values, which fake tensors do not have.
            first = str(error).strip().partition("\n")[0]
            raise ModelError(f"cannot forecast the costs of {owner.path} ({type(error).__name__}: {first})") from error
        finally:
            for parameter in model.parameters():
                parameter.grad = None
            model.eval()

    def _measured(self, model: nn.Module, one: Pass) -> tuple[int, int]:
        model.train(one.learns)
        dtype = torch.bfloat16 if self._train.autocast and one.learns else None
        with self._mode, torch.no_grad():
            forward = one.kind.prepare(model, one)
        with self._mode, _PeakMemory(model) as memory_peak, measurement.counted() as cost:
            with torch.autocast("cpu", dtype, enabled=dtype is not None), torch.set_grad_enabled(one.learns):
                loss = one.kind.loss(forward(), one)
            if one.learns:
                loss.backward()  # type: ignore[no-untyped-call]
        return cost.flops, memory_peak.peak


def _tokens(one: Pass) -> int:
    return one.rows * one.width**2


def _positions(one: Pass) -> int:
    return one.rows * one.kept


def _with_fake_tensors(model: nn.Module) -> nn.Module:
    """`model` with its tensors replaced by fake ones of the current mode; ties are kept."""
    replaced: dict[int, Tensor] = {}
    for module in model.modules():
        for table, kind in ((module._parameters, nn.Parameter), (module._buffers, None)):
            for name, old in table.items():
                if old is None:
                    continue
                if id(old) not in replaced:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    replaced[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad) if kind else new
                table[name] = replaced[id(old)]  # type: ignore[assignment]
    return model


class _PeakMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tracks the bytes of tensors created inside the block and their peak.

    Args:
        model: views of its tensors do not count.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._now = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(
        self, func: Callable[..., object], types: object, args: Sequence[object] = (), kwargs: object = None
    ) -> object:
        given = cast(Mapping[str, object], kwargs or {})
        out = func(*args, **given)
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, Tensor):
                self._track(one)
        return out

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()
        size = round(HEAP * size) if size < ON_HEAP else size
        self._seen.add(key)
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._now -= size


@dataclass(frozen=True)
class MachineSpeed:
    """Measured speed and memory of this machine."""

    flops: float
    """Operations per second of a training step."""
    runtime: int
    """Bytes of a process with the libraries, this recipe's rows and one finished training step."""


STEPS = 4


@cache
def measure() -> MachineSpeed:
    """Measure a few short training steps of the embedded small model; call it before a large model is loaded."""
    spec = Recipe().model
    model = loading.load_model(spec, Recipe().adapter, 0)
    row = Example(list(range(1, 97)), list(range(1, 97)), [], [])
    batches = iter([[row] * 8] * STEPS)
    with measurement.counted() as cost:  # Counting slows a step down.
        training.fit(model, islice(batches, 1), TrainSpec(), first=0, total=STEPS, dropout=torch.Generator())
    began = time.perf_counter()
    training.fit(model, batches, TrainSpec(), first=1, total=STEPS, dropout=torch.Generator())
    seconds = time.perf_counter() - began
    environment.reset_peak_memory()  # Counting and long rows took memory that is not part of a process's base.
    short = Example([1, 2, 3], [1, 2, 3], [], [])
    training.fit(model, iter([[short]]), TrainSpec(), first=0, total=1, dropout=torch.Generator())
    return MachineSpeed(cost.flops * (STEPS - 1) / seconds, environment.own_peak_memory())
