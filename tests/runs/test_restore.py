"""What a run delivered, read back from its folder by another process."""

from pathlib import Path

import pytest
import torch

import kilofed
from kilofed.config.fields import Value
from kilofed.config.recipe import Recipe
from kilofed.config.tables import changed, from_table
from kilofed.errors import RunError
from kilofed.models import evaluation, loading
from kilofed.payload import Payload
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
    kept = Payload.decode((done.folder / "state.safetensors").read_bytes())
    assert server.round == 2
    assert server.folder == done.folder
    assert all(torch.equal(server.state[name], tensor) for name, tensor in kept.tensors.items())
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
    with pytest.raises(kilofed.KilofedError, match="gone"):
        delivered(tmp_path / "run")
    for name in ("run.json", "recipe.toml"):
        whole = (tmp_path / "run" / name).read_text("utf-8")
        (tmp_path / "run" / name).write_text(whole.replace(missing.model.path, recipe.model.path), "utf-8")
    with pytest.raises(RunError, match="has no state yet: resume it first"):
        delivered(tmp_path / "run")
