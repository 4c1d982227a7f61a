"""Scoring and learning a teacher's scores costs what a plain pass does, and little for its few tokens."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kilofed.config.recipe import AdapterSpec, ModelSpec, TrainSpec
from kilofed.costs.counter import CostCounter
from kilofed.distillation.passes import Distilled
from kilofed.federation.workload import Pass

ONE = Pass(3, 11, 5)


@pytest.fixture
def spec(tiny_model: Path) -> ModelSpec:
    return ModelSpec(str(tiny_model))


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 8, 10_000])
def test_matrix_products_are_those_of_a_plain_pass(spec: ModelSpec, learns: bool, num_tokens: int) -> None:
    bench, one = CostCounter(AdapterSpec(rank=2), TrainSpec(), ()), replace(ONE, learns=learns)
    distilled = replace(one, kind=Distilled(num_tokens))
    assert bench.operations([distilled], spec) == bench.operations([one], spec) > 0


def test_the_loss_is_a_scalar_with_a_gradient_and_the_scores_are_few() -> None:
    out = torch.randn(3, 5, 29, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = Distilled(4).loss(out, replace(ONE, learns=True))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.shape == ()
    assert out.grad is not None
    assert out.grad.abs().sum() > 0
    scored = Distilled(4).loss(out.detach(), ONE)
    assert scored.shape[0] == 3 * 5
    assert scored.shape[1] <= 5  # Four tokens, and what is left.


def test_more_tokens_than_the_vocabulary_are_the_vocabulary() -> None:
    out = torch.zeros(1, 2, 7)
    assert Distilled(10_000).loss(out, ONE).shape == Distilled(7).loss(out, ONE).shape
