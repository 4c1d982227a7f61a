"""What a run delivered, read back from its folder by another process."""

import shutil
from pathlib import Path

import pytest
import torch

import kilofed
from kilofed.config.fields import Value
from kilofed.config.recipe import Recipe
from kilofed.config.tables import changed, from_table, to_table, to_toml
from kilofed.errors import RunError
from kilofed.models import evaluation, loading
from kilofed.payload import Payload
from kilofed.records.codec import to_json
from kilofed.records.facts import RunFacts
from kilofed.runs import commit
from kilofed.runs.folder import recipe_of, write_json
from kilofed.runs.loop import Run
from kilofed.runs.restore import delivered, restored, score
from kilofed.runs.sites import Sites


@pytest.fixture(scope="module")
def recipe(tiny_model: Path, tiny_rows: Path) -> Recipe:
    table: dict[str, Value] = {
        "rounds": 2,
        "model": {"path": str(tiny_model)},
        "adapter": {"rank": 2},
        "data": {"source": str(tiny_rows), "holdout": 0.2, "max_length": 48},
        "train": {"steps": 2, "batch_size": 4, "lr": 0.01},
        "evaluate": {"generate": 1, "max_new_tokens": 4, "baselines": []},
    }
    return from_table(table)


@pytest.fixture(scope="module")
def done(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return kilofed.run(recipe, out=tmp_path_factory.mktemp("done") / "run")


def test_the_server_is_that_of_the_newest_round(done: Run) -> None:
    server, sites = restored(done.folder)
    kept = commit.read(done.folder)
    assert kept
    assert server.round == 2
    assert server.folder == done.folder
    assert all(torch.equal(server.state[name], tensor) for name, tensor in kept.state.items())
    model = sites.method.deliver(server)
    assert all(torch.equal(tensor, server.state[name]) for name, tensor in loading.read_trained(model).items())


def test_the_delivered_model_has_the_federated_score(done: Run, recipe: Recipe) -> None:
    model, tokenizer = delivered(done.folder)
    assert not model.training
    assert tokenizer.pad_token_id == 0
    corpus = Sites(recipe).corpus
    losses = [evaluation.score(model, corpus.test_examples(client), 32).loss for client in range(4)]
    assert sum(losses) / 4 == pytest.approx(done.rows["federated"].loss, rel=1e-9)


def test_scoring_a_run_again_gives_the_federated_row(done: Run) -> None:
    assert score(done.folder, {}) == done.rows["federated"]
    assert score(done.folder, {"evaluate.generate": 0}).rouge_l is None


def test_other_held_out_rows_give_other_scores(done: Run) -> None:
    found = score(done.folder, {"data.max_test_rows": 1, "evaluate.generate": 0})
    assert len(found.clients) == 4
    assert found.loss != done.rows["federated"].loss


def test_a_run_without_a_state_delivers_nothing(recipe: Recipe, tmp_path: Path) -> None:
    missing = changed(recipe, {"model.path": str(tmp_path / "gone")})
    with pytest.raises(kilofed.KilofedError, match="gone"):
        kilofed.run(missing, out=tmp_path / "run")
    with pytest.raises(RunError, match="has no state yet: resume it first"):
        delivered(tmp_path / "run")


def test_a_state_of_another_recipe_or_of_an_earlier_release_is_told(
    done: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(done.folder, tmp_path / "run"))
    state, _ = restored(folder)
    (folder / "state.safetensors").write_bytes(Payload(state.state, {"round": 2}).encode())
    again, _ = restored(folder)
    assert "was written by an earlier kilofed and is not checked" in caplog.text
    assert all(torch.equal(again.state[name], tensor) for name, tensor in state.state.items())
    with pytest.raises(RunError, match=r"state\.safetensors was written by an earlier kilofed, which noted nothing"):
        kilofed.resume(folder)
    shutil.copy(done.folder / "state.safetensors", folder)
    other = changed(recipe_of(folder), {"train.lr": 0.5})
    write_json(folder / "run.json", to_json(RunFacts(to_table(other))))
    (folder / "recipe.toml").write_text(to_toml(other), "utf-8")
    for command in (delivered, kilofed.resume):
        with pytest.raises(RunError, match=r"state\.safetensors is not of a run of the recipe beside it"):
            command(folder)
