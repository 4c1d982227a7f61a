"""Each model is loaded once, and what it began with is there whatever was written into it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kilofed.config.recipe import AdapterSpec, ModelSpec
from kilofed.errors import ModelError
from kilofed.models import loading
from kilofed.models.halves import Part
from kilofed.models.store import ModelStore

LORA = AdapterSpec(rank=3, alpha=6.0)


@pytest.fixture
def spec(tiny_model: Path) -> ModelSpec:
    return ModelSpec(path=str(tiny_model))


def test_a_model_is_loaded_once(spec: ModelSpec) -> None:
    store = ModelStore(LORA, 0)
    assert len(store) == 0
    model = store.model(spec)
    assert store.model(replace(spec)) is model
    assert len(store) == 1


def test_a_part_of_a_model_is_another_model(spec: ModelSpec) -> None:
    store, part = ModelStore(LORA, 0), Part(**vars(spec), num_blocks=1, head=False)
    whole, below = store.model(spec), store.model(part)
    assert len(store) == 2
    assert sum(p.numel() for p in below.parameters()) < sum(p.numel() for p in whole.parameters())
    assert set(store.start(part)) < set(store.start(spec))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_start_is_that_of_a_fresh_model_whatever_was_trained_since(spec: ModelSpec, kind: str) -> None:
    adapter = replace(LORA, kind=kind)  # type: ignore[arg-type]
    store = ModelStore(adapter, 7)
    fresh = loading.read_trained(loading.load_model(spec, adapter, 7))
    with torch.no_grad():
        for parameter in loading.trained(store.model(spec)).values():
            parameter.add_(1)
    first = store.start(spec)
    loading.write_trained(store.model(spec), first)
    with torch.no_grad():
        for parameter in loading.trained(store.model(spec)).values():
            parameter.mul_(3)
    for start in (first, store.start(spec)):
        assert start.keys() == fresh.keys()
        assert all(torch.equal(start[name], fresh[name]) for name in fresh)


def test_equal_seeds_begin_equal_and_others_do_not(spec: ModelSpec) -> None:
    first, second, other = (ModelStore(LORA, seed).start(spec) for seed in (7, 7, 8))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_classes_give_a_head_for_each(spec: ModelSpec) -> None:
    start = ModelStore(LORA, 0, ("a", "b", "c")).start(spec)
    assert start["score.weight"].shape == (3, 16)
    assert not any("score" in name for name in ModelStore(LORA, 0).start(spec))


def test_a_model_that_is_not_there_is_refused_each_time(spec: ModelSpec, tmp_path: Path) -> None:
    store = ModelStore(LORA, 0)
    for ask in (store.model, store.start, store.model):
        with pytest.raises(ModelError, match="model directory"):
            ask(replace(spec, path=str(tmp_path / "gone")))
    assert len(store) == 0
