"""Many sites in one process: shared corpus and models, states apart, and the server that belongs to them."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from kilofed.config.fields import Value
from kilofed.config.recipe import ModelSpec, Recipe
from kilofed.config.tables import changed, to_table
from kilofed.costs.measurement import FILE
from kilofed.errors import DataError, RecipeError
from kilofed.federation.address import Address
from kilofed.models import loading
from kilofed.payload import Payload
from kilofed.runs.sites import Sites, drawn, open_handler

KD: dict[str, Value] = {
    "method": "kd",
    "method.steps": 2,
    "method.client_distill_steps": 1,
    "method.batch_size": 4,
    "method.top_k": 8,
    "data.public_share": 0.2,
}


def fit(sites: Sites, round: int = 1) -> bytes:
    return Payload(sites.store.start(sites.recipe.model), Address("fit", "mean", round, 0).scalars).encode()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"cohort": 5}, "cohort is 5, but there are 4 clients: take fewer per round, or 0 for all"),
        ({"quorum": 5}, "quorum is 5, but there are 4 clients: take a smaller one"),
    ],
)
def test_more_clients_than_there_are_cannot_be_asked_for(
    tiny_recipe: Recipe, words: dict[str, Value], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        Sites(changed(tiny_recipe, words)).client_ids()
    assert Sites(changed(tiny_recipe, dict.fromkeys(words, 4))).client_ids() == [0, 1, 2, 3]


def test_a_site_reads_no_rows_before_it_is_asked(tiny_recipe: Recipe, tmp_path: Path) -> None:
    sites = Sites(changed(tiny_recipe, {"data.source": str(tmp_path / "gone.jsonl")}))
    client = sites.site(3).client
    assert client.id == 3
    for rows in (client.data, client.public):
        with pytest.raises(DataError, match=r"gone\.jsonl"):
            len(rows)


def test_a_clients_rows_are_those_of_the_corpus(tiny_recipe: Recipe) -> None:
    sites = Sites(changed(tiny_recipe, KD))
    data, examples = sites.site(1).client.data, sites.corpus.train_examples(1)
    assert list(data) == examples
    assert (data[0], data[-1], data[1:3]) == (examples[0], examples[-1], examples[1:3])
    assert list(sites.site(1).client.public) == sites.corpus.public_examples()


def test_sites_share_models_and_keep_their_states_apart(tiny_recipe: Recipe, tmp_path: Path) -> None:
    sites = Sites(tiny_recipe, tmp_path)
    assert sites.site(0) is sites.site(0)
    assert sites.site(0).client.model is sites.site(1).client.model is sites.server().model
    for number in (0, 2):
        sites.site(number).client.states.keep((1, 0), {"own": torch.full((2,), float(number))})
    assert sorted(path.parent.name for path in tmp_path.rglob("*.safetensors")) == ["0", "2"]
    again = Sites(tiny_recipe, tmp_path)
    assert again.site(2).client.states.before((2, 0))["own"].tolist() == [2.0, 2.0]
    assert again.site(1).client.states.before((2, 0)) == {}


def test_the_server_has_its_model_and_the_public_rows(tiny_recipe: Recipe, tmp_path: Path) -> None:
    sites = Sites(changed(tiny_recipe, {**KD, "seed": 7}))
    server = sites.server(folder=tmp_path)
    assert (server.seed, server.num_rounds, server.train) == (7, 2, sites.recipe.train)
    assert (server.spec, server.folder, server.round, server.state) == (sites.recipe.model, tmp_path, 0, {})
    assert server.public == sites.corpus.public_examples()
    assert len(server.public) == 8
    assert sites.server().folder is None


def test_a_server_on_an_outline_loads_no_weights(tiny_recipe: Recipe) -> None:
    sites, asked = Sites(tiny_recipe), []

    def outline(spec: ModelSpec) -> nn.Module:
        asked.append(spec)
        return loading.outline(spec, tiny_recipe.adapter)

    assert {p.device.type for p in sites.server(model_of=outline).model.parameters()} == {"meta"}
    assert asked == [tiny_recipe.model]
    assert len(sites.store) == 0


@pytest.mark.parametrize("costs", [False, True])
def test_a_handler_opened_from_text_answers_as_the_sites_do(tiny_recipe: Recipe, tmp_path: Path, costs: bool) -> None:
    recipe = changed(tiny_recipe, {"evaluate.costs": costs})
    sites = Sites(recipe)
    opened = open_handler(json.dumps(to_table(recipe)), str(tmp_path))
    for round in (1, 2):
        for number in (2, 0):
            reply, own = (Payload.decode(one(number, fit(sites, round))) for one in (opened, sites.handle))
            assert reply.scalars.keys() == own.scalars.keys()
            for name, tensor in own.tensors.items():  # Counting changes last bits.
                torch.testing.assert_close(reply.tensors[name], tensor, rtol=1e-2, atol=1e-4)
    assert sorted(path.parent.name for path in tmp_path.rglob(FILE)) == (["0", "2"] if costs else [])


def test_a_cohort_is_drawn_anew_each_round_and_alike_in_each_process(tiny_recipe: Recipe) -> None:
    recipe = changed(tiny_recipe, {"cohort": 3})
    rounds = [drawn(list(range(41)), recipe, number) for number in range(1, 20)]
    assert rounds == [drawn(list(range(41)), recipe, number) for number in range(1, 20)]
    assert all(len(set(ids)) == 3 and ids == sorted(ids) for ids in rounds)
    assert len({tuple(ids) for ids in rounds}) > 15
    assert drawn([3, 5], recipe, 1) == [3, 5]
    assert drawn([3, 5, 9, 11], changed(recipe, {"cohort": 0}), 1) == [3, 5, 9, 11]
