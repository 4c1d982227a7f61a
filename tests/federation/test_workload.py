"""Batches that are told before a run are those that training takes; shapes are those of what is collated."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kilofed.config.recipe import ModelSpec, Recipe, TrainSpec
from kilofed.data.examples import IGNORED, Example
from kilofed.federation.parties import Server, generator
from kilofed.federation.workload import (
    WHOLE,
    Costs,
    LocalTraining,
    Pass,
    RunPreview,
    TwoPointSteps,
    Work,
    logits,
    shape,
    shapes,
)
from kilofed.models import loading, training

NUM_ROWS = {0: 3, 1: 10, 2: 41}


def rows(client: int) -> list[Example]:
    """Rows of unequal lengths with two or three positions to learn."""
    found = []
    for at in range(NUM_ROWS[client]):
        ids = [1 + (at + client + n) % 200 for n in range(5 + at % 4)]
        found.append(Example(ids, [IGNORED] * 3 + ids[3:], ids[:3], []))
    return found


def preview(spec: TrainSpec, model: torch.nn.Module | None = None) -> RunPreview:
    recipe = Recipe(train=spec, rounds=3, seed=4)
    server = Server(recipe.seed, recipe.rounds, spec, model or torch.nn.Linear(2, 3))
    return RunPreview(recipe, server, rows, lambda _: [], ids=(0, 1, 2))


def taken(spec: TrainSpec, client: int, number: int) -> list[list[Example]]:
    """The batches that local training takes in round `number`, written anew."""
    steps = training.num_steps(spec, NUM_ROWS[client])
    every = list(
        training.batches(
            rows(client), spec, first=0, count=steps * 3, order=lambda name: generator(4, 0, client, name)
        )
    )
    return every[(number - 1) * steps : number * steps]


@pytest.mark.parametrize("spec", [TrainSpec(steps=3, batch_size=4), TrainSpec(epochs=1, batch_size=4)])
@pytest.mark.parametrize("client", NUM_ROWS)
def test_batches_of_a_round_are_those_that_training_takes_in_it(spec: TrainSpec, client: int) -> None:
    told = preview(spec)
    for number in (1, 2, 3):
        told.round = number
        assert list(told.batches(client, spec)) == taken(spec, client, number)
        assert told.local_training(client) == [replace(shape(b), learns=True) for b in taken(spec, client, number)]


def test_accumulation_cuts_a_batch_into_parts_and_loses_no_row() -> None:
    whole, parts = (preview(TrainSpec(steps=2, batch_size=7, accumulation=n)).local_training(2) for n in (1, 3))
    assert [one.rows for one in whole] == [7, 7]
    assert [one.rows for one in parts] == [3, 3, 1, 3, 3, 1]


def test_every_client_of_a_round_gets_the_same_messages() -> None:
    assert preview(TrainSpec()).alike() == {0: (), 1: (), 2: ()}


def test_nobody_can_tell_by_default() -> None:
    told = preview(TrainSpec())
    assert Costs().client(told, 0) is None
    assert Costs().server(told) is None


def test_the_server_of_local_training_computes_nothing() -> None:
    told = preview(TrainSpec(steps=2, batch_size=4))
    assert LocalTraining().server(told) == Work()
    assert len(LocalTraining().client(told, 1).passes) == 2


def test_a_two_point_step_is_two_forwards_and_room_for_the_largest_module() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 11))
    model[0].requires_grad_(False)
    work = TwoPointSteps(steps=6, batch_size=4).client(preview(TrainSpec(accumulation=2), model), 2)
    assert len(work.passes) == 6
    assert {(one.times, one.learns, one.rows) for one in work.passes} == {(2.0, False, 4)}
    assert work.scratch == (5 * 11 + 11) * 4


def test_a_shape_has_the_longest_row_and_the_positions_that_are_learnt() -> None:
    batch = [Example([1] * 5, [IGNORED] * 3 + [1, 1], [1] * 3, []), Example([1] * 9, [IGNORED] * 8 + [1], [1], [])]
    collated = training.collate(batch)
    assert shape(batch) == Pass(2, 9, len(collated.positions_K))
    assert collated.input_ids.shape == (2, 9)


def test_shapes_cover_all_rows_and_in_order_pad_less() -> None:
    some = rows(2)
    as_they_come, ordered = shapes(some, 4), shapes(some, 4, ordered=True)
    assert sum(one.rows for one in as_they_come) == sum(one.rows for one in ordered) == 41
    assert [one.rows for one in ordered][-1] == 1
    assert sum(one.rows * one.width for one in ordered) < sum(one.rows * one.width for one in as_they_come)
    assert [one.width for one in ordered] == sorted(one.width for one in ordered)


@pytest.fixture
def model(tiny_model: Path) -> torch.nn.Module:
    return loading.load_base(ModelSpec(str(tiny_model)))


@pytest.mark.parametrize("kept", [1, 4])
def test_logits_are_those_of_the_kept_positions(model: torch.nn.Module, kept: int) -> None:
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    found = logits(model, ids, torch.ones_like(ids), kept)
    assert found.shape == (2, kept, 259)
    torch.testing.assert_close(found, model(input_ids=ids).logits[:, :kept])


def test_a_prepared_pass_runs_and_its_loss_has_a_backward(model: torch.nn.Module) -> None:
    one = Pass(2, 6, 3, learns=True)
    sent: Sequence[object] = WHOLE.prepare(model, one)().shape
    assert list(sent) == [2, 3, 259]
    loss = WHOLE.loss(WHOLE.prepare(model, one)(), one)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.shape == ()
    assert all(p.grad is not None for p in model.parameters())
