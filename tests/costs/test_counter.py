"""What is counted on a model without numbers is what the same passes cost on the real one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kilofed.config.recipe import AdapterSpec, ModelSpec, TrainSpec
from kilofed.costs import measurement
from kilofed.costs.counter import CostCounter, measure
from kilofed.data.examples import IGNORED, Example
from kilofed.errors import ModelError
from kilofed.federation.workload import Pass, PassKind, Work, shape
from kilofed.models import loading, training

LORA = AdapterSpec(rank=2, alpha=4.0)


@pytest.fixture
def spec(tiny_model: Path) -> ModelSpec:
    return ModelSpec(str(tiny_model))


def bench(adapter: AdapterSpec = LORA, **train: object) -> CostCounter:
    return CostCounter(adapter, replace(TrainSpec(), **train), ())  # type: ignore[arg-type]


def batch(rows: int, width: int) -> list[Example]:
    ids = [1 + n % 200 for n in range(width)]
    return [Example(ids, [IGNORED] * 2 + ids[2:], ids[:2], []) for _ in range(rows)]


@pytest.mark.parametrize(("rows", "width"), [(1, 5), (3, 17), (4, 40)])
@pytest.mark.parametrize("adapter", [LORA, AdapterSpec(kind="full")], ids=["lora", "full"])
def test_operations_of_a_training_step_are_those_of_the_real_one(
    spec: ModelSpec, adapter: AdapterSpec, rows: int, width: int
) -> None:
    some = batch(rows, width)
    told = bench(adapter).operations([replace(shape(some), learns=True)], spec)
    model = loading.load_model(spec, adapter, 0).train()
    with measurement.counted() as cost:
        training.loss(model, training.collate(some)).backward()
    assert told == cost.flops


def test_a_forward_is_counted_by_its_times_and_costs_less_than_a_step(spec: ModelSpec) -> None:
    one = Pass(3, 17, 4)
    counter = bench()
    forward = counter.operations([one], spec)
    assert counter.operations([replace(one, times=2.5), one], spec) == pytest.approx(3.5 * forward)
    assert counter.operations([replace(one, learns=True)], spec) > 1.5 * forward
    assert counter.operations([], spec) == 0


def test_without_its_adapter_a_model_costs_what_the_base_does(spec: ModelSpec) -> None:
    one = Pass(2, 9, 3)
    plain = bench().operations([replace(one, plain=True)], spec)
    assert plain == bench(AdapterSpec(kind="full")).operations([one], spec)
    assert plain < bench().operations([one], spec)


def test_bytes_of_weights_are_those_of_the_model_and_nothing_is_loaded(spec: ModelSpec) -> None:
    model = loading.load_model(spec, LORA, 0)
    counter = bench()
    assert counter.weight_bytes(spec) == sum(p.numel() * p.element_size() for p in model.parameters())
    assert counter.trained_bytes(spec) == sum(p.numel() * 4 for p in loading.trained(model).values())
    outline = counter.outline(spec)
    assert counter.outline(spec) is outline
    assert {name: p.shape for name, p in outline.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    with pytest.raises(RuntimeError):
        float(next(iter(outline.parameters())).flatten()[0])  # There is no number to read.


def test_activations_are_those_of_the_largest_batch_and_grow_with_it(spec: ModelSpec) -> None:
    counter = bench()
    small, large = (replace(shape(batch(2, width)), learns=True) for width in (8, 64))
    held = counter.activations([large], spec)
    assert held > 2 * counter.activations([small], spec)
    assert counter.activations([small, large, small], spec) == held
    assert counter.activations([replace(large, learns=False)], spec) < held
    assert counter.activations([], spec) == 0


def test_memory_adds_moments_for_those_who_train_and_activations_for_those_who_wait(spec: ModelSpec) -> None:
    one = replace(shape(batch(2, 30)), learns=True)
    work, weights = Work([one]), bench().weight_bytes(spec)
    trained, held = bench().trained_bytes(spec), bench().activations([one], spec)
    assert bench(optimizer="sgd").memory([work], spec, messages=0) == weights + held
    assert bench(optimizer="adamw").memory([work], spec, messages=0) == weights + held + 2 * trained
    waiting = replace(work, waits=True, scratch=1000)
    assert bench(optimizer="sgd").memory([waiting, work], spec, messages=0, together=3) == weights + 3 * held + 1000
    assert bench().memory([work], spec, messages=10**12) == weights + 10**12
    assert bench().memory([Work()], spec, messages=0) == weights


def test_a_model_that_looks_at_its_numbers_is_an_error_that_names_it(spec: ModelSpec) -> None:
    class Curious(PassKind):
        def loss(self, out: torch.Tensor, one: Pass) -> torch.Tensor:
            return out if float(out.sum()) > 0 else -out

    with pytest.raises(ModelError, match=r"cannot forecast the costs of .*tiny-model"):
        bench().operations([Pass(1, 4, 1, kind=Curious())], spec)


@pytest.mark.slow
def test_this_machine_is_measured_once() -> None:
    found = measure()
    assert found.flops > 1e6
    assert found.runtime > 50e6
    assert measure() is found
