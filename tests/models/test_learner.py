"""A learner takes the steps that a model of its own would take."""

from pathlib import Path

import pytest
import torch

from kilofed.config.recipe import AdapterSpec, ModelSpec, TrainSpec
from kilofed.data.examples import Example
from kilofed.errors import ModelError
from kilofed.models import loading, training
from kilofed.models.learner import Learner, restore

ROWS = [Example([5 + n, 9, 7 + n, 3, 8], [-100, 9, 7 + n, 3, 8], [], []) for n in range(4)]


@pytest.fixture
def model(tiny_model: Path) -> torch.nn.Module:
    return loading.load_model(ModelSpec(str(tiny_model)), AdapterSpec(rank=2), 0)


def train(learner: Learner, model: torch.nn.Module, steps: int, spec: TrainSpec) -> None:
    for _ in range(steps):
        learner.run(lambda: training.loss(model, training.collate(ROWS))).backward()
        learner.step(spec.lr)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_its_steps_are_those_of_training_the_model(model: torch.nn.Module, optimizer: str) -> None:
    spec = TrainSpec(optimizer=optimizer, lr=0.01, max_grad_norm=0.1, weight_decay=0.1)  # type: ignore[arg-type]
    start = loading.read_trained(model)
    learner = Learner(model, start, spec)
    train(learner, model, 3, spec)
    assert all(torch.equal(tensor, start[name]) for name, tensor in loading.read_trained(model).items())
    training.fit(model, iter([ROWS] * 3), spec, first=0, total=3, dropout=torch.Generator())
    assert all(torch.equal(tensor, learner.read()[name]) for name, tensor in loading.read_trained(model).items())


def test_saved_and_restored_between_steps_it_continues_bit_for_bit(model: torch.nn.Module) -> None:
    spec = TrainSpec(lr=0.01)
    whole, first = (Learner(model, loading.read_trained(model), spec) for _ in range(2))
    train(whole, model, 4, spec)
    train(first, model, 2, spec)
    second = restore(model, {**first.save(), "other": torch.zeros(1)}, spec)
    train(second, model, 2, spec)
    assert all(torch.equal(tensor, second.read()[name]) for name, tensor in whole.read().items())


def test_two_learners_of_one_model_do_not_meet(model: torch.nn.Module) -> None:
    spec = TrainSpec(lr=0.01)
    one, other = (Learner(model, loading.read_trained(model), spec) for _ in range(2))
    graph = one.run(lambda: training.loss(model, training.collate(ROWS)))
    train(other, model, 2, spec)
    graph.backward()
    assert any(not torch.equal(tensor, other.read()[name]) for name, tensor in one.read().items())


def test_what_the_model_does_not_train_is_refused(model: torch.nn.Module) -> None:
    with pytest.raises(ModelError, match="is not a trained tensor of"):
        Learner(model, {"lm_head.weight": torch.zeros(2)}, TrainSpec())


def test_a_learner_of_nothing_does_nothing(model: torch.nn.Module) -> None:
    learner = Learner(model, {}, TrainSpec())
    learner.step(1.0)
    assert learner.save() == {}
    assert learner.run(lambda: 3) == 3
