"""The parts of a cut model cost together what the whole does."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kilofed.config.recipe import AdapterSpec, ModelSpec, TrainSpec
from kilofed.costs.counter import CostCounter
from kilofed.federation.workload import Pass
from kilofed.models import loading
from kilofed.split.passes import PartName, PartOfModel

ONE = Pass(3, 11, 2)


@pytest.fixture
def spec(tiny_large: Path) -> ModelSpec:
    return ModelSpec(str(tiny_large))


def operations(spec: ModelSpec, one: Pass) -> float:
    return CostCounter(AdapterSpec(rank=2), TrainSpec(), ()).operations([one], spec)


def part(cut: int, name: PartName, one: Pass = ONE) -> Pass:
    return replace(one, kind=PartOfModel(cut, name))


@pytest.mark.parametrize("cut", [1, 2])
def test_below_and_above_the_cut_are_the_whole(spec: ModelSpec, cut: int) -> None:
    assert operations(spec, part(cut, "below")) + operations(spec, part(cut, "above")) == operations(spec, ONE)


@pytest.mark.parametrize("cut", [1, 2])
def test_between_cut_and_head_and_the_head_are_what_is_above(spec: ModelSpec, cut: int) -> None:
    between, head = (operations(spec, part(cut, name)) for name in ("between", "head"))
    assert between + head == operations(spec, part(cut, "above"))
    assert head == operations(spec, part(1, "head"))


def test_a_later_cut_moves_blocks_to_the_client(spec: ModelSpec) -> None:
    first, second = (operations(spec, part(cut, "below")) for cut in (1, 2))
    assert second == 2 * first > 0


@pytest.mark.parametrize(("name", "width"), [("below", 32), ("between", 32), ("above", 259), ("head", 259)])
def test_a_part_gives_hidden_states_or_logits_and_learns_from_them(
    spec: ModelSpec, name: PartName, width: int
) -> None:
    one = part(1, name, replace(ONE, learns=True))
    model = loading.load_model(spec, AdapterSpec(kind="full"), 0)
    out = one.kind.prepare(model, one)()
    assert out.shape == (3, 11 if width == 32 else 2, width)
    loss = one.kind.loss(out, one)
    assert loss.shape == ()
    loss.backward()  # type: ignore[no-untyped-call]
    blocks = model.model.layers  # type: ignore[union-attr]
    learnt = [any(p.grad is not None for p in block.parameters()) for block in blocks]  # type: ignore[union-attr]
    assert learnt == {"below": [True, False, False], "head": [False] * 3}.get(name, [False, True, True])
    assert torch.isfinite(out).all()
