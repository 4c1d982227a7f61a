"""The rows beside the federated one, against each other and against plain transformers."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from kilofed.config.recipe import Recipe
from kilofed.config.tables import changed
from kilofed.models import evaluation, loading
from kilofed.runs import baselines
from kilofed.runs.sites import Sites

ALONE = {"data.partition.kind": "iid", "data.partition.num_clients": 1, "evaluate.generate": 0, "rounds": 2}


def silent(text: str) -> None:
    """Says nothing."""


def test_the_base_row_is_the_plain_model(tiny_recipe: Recipe) -> None:
    sites = Sites(tiny_recipe)
    plain = AutoModelForCausalLM.from_pretrained(tiny_recipe.model.path)
    found = baselines.base(sites, [0, 2])
    for client, score in zip([0, 2], found, strict=True):
        assert score == evaluation.score_all(
            plain, sites.corpus.tokenizer, sites.corpus.test_examples(client), tiny_recipe.evaluate
        )


def test_the_base_row_is_the_same_after_training(tiny_recipe: Recipe) -> None:
    sites = Sites(tiny_recipe)
    before = baselines.base(sites, [0])
    model = sites.store.model(tiny_recipe.model)
    loading.write_trained(model, {n: torch.ones_like(t) for n, t in loading.read_trained(model).items()})
    assert baselines.base(sites, [0]) == before


def test_with_one_client_local_only_is_centralized_bit_for_bit(tiny_recipe: Recipe) -> None:
    sites = Sites(changed(tiny_recipe, ALONE))
    assert baselines.local(sites, [0], silent) == baselines.centralized(sites, [0])


def test_with_one_client_and_one_round_local_only_is_federated(tiny_recipe: Recipe) -> None:
    recipe = changed(tiny_recipe, {**ALONE, "rounds": 1})
    sites = Sites(recipe)
    local = baselines.local(sites, [0], silent)
    model = sites.store.model(recipe.model)
    owner = sites.site(0).client
    owner.round = 1
    from kilofed.payload import Payload

    sites.method.fit(owner, Payload(loading.read_trained(model)))
    assert baselines.score_clients(sites, model, [0]) == local


def test_baselines_leave_the_model_as_it_began(tiny_recipe: Recipe) -> None:
    sites = Sites(changed(tiny_recipe, {"evaluate.generate": 0}))
    start = loading.read_trained(sites.store.model(tiny_recipe.model))
    for measure in (lambda: baselines.local(sites, [1], silent), lambda: baselines.centralized(sites, [1])):
        measure()
        end = loading.read_trained(sites.store.model(tiny_recipe.model))
        assert all(torch.equal(end[name], start[name]) for name in start)


def test_a_client_alone_does_not_depend_on_who_else_is_measured(tiny_recipe: Recipe) -> None:
    sites = Sites(changed(tiny_recipe, {"evaluate.generate": 0}))
    both = baselines.local(sites, [1, 3], silent)
    assert baselines.local(sites, [3], silent) == both[1:]
    assert both[0] != both[1]


def test_centralized_training_sees_as_many_examples_as_the_federation(tiny_recipe: Recipe, monkeypatch) -> None:
    sites = Sites(changed(tiny_recipe, {"evaluate.generate": 0}))
    seen = []
    fit_round = baselines.training.fit_round

    def watched(*words, **more):
        seen.append(fit_round(*words, **more))
        return seen[-1]

    monkeypatch.setattr(baselines.training, "fit_round", watched)
    baselines.centralized(sites, [0])
    recipe = tiny_recipe
    assert seen[0].num_steps == recipe.rounds * recipe.train.steps
    rows = sum(len(sites.corpus.train_examples(client)) for client in sites.client_ids())
    assert seen[0].num_examples >= recipe.rounds * recipe.train.steps * min(4 * recipe.train.batch_size, rows) - rows


def test_training_alone_lowers_the_loss_on_its_own_rows(tiny_recipe: Recipe) -> None:
    sites = Sites(changed(tiny_recipe, {"evaluate.generate": 0, "train.steps": 10}))
    base, local = baselines.base(sites, [0]), baselines.local(sites, [0], silent)
    assert local[0].loss < base[0].loss


@pytest.mark.parametrize(("cohort", "together"), [(0, 3), (2, 2)])
def test_a_central_batch_is_those_of_the_clients_of_one_round(
    uneven: Recipe, monkeypatch: pytest.MonkeyPatch, cohort: int, together: int
) -> None:
    recipe = changed(uneven, {"evaluate.generate": 0, "cohort": cohort, "rounds": 1})
    found = []
    fit_round = baselines.training.fit_round

    def watched(*words, **more):
        found.append(fit_round(*words, **more))
        return found[-1]

    monkeypatch.setattr(baselines.training, "fit_round", watched)
    baselines.centralized(Sites(recipe), [2])
    assert found[0].num_steps == recipe.train.steps
    assert found[0].num_examples == recipe.train.steps * together * recipe.train.batch_size
