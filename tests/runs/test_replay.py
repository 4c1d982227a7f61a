"""Replay: records are a checkpoint, to the bit; what was changed, missing or foreign is said in one sentence."""

from pathlib import Path

import pytest
import torch

from kilofed import cli
from kilofed.config.recipe import Recipe
from kilofed.config.tables import changed
from kilofed.errors import RunError
from kilofed.models import loading
from kilofed.payload import Payload
from kilofed.runs.loop import run
from kilofed.runs.replay import replay
from kilofed.runs.restore import delivered

FIELDS = {
    "method": "fedkseed", "method.num_seeds": 64, "method.steps": 3, "method.lr": 1e-3, "method.rounds_per_pool": 2,
    "method.sampling": "pro", "adapter.kind": "full", "rounds": 3,
    "evaluate.baselines": [], "evaluate.generate": 0, "evaluate.every": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders() -> dict[str, Path]:
    return {}


@pytest.fixture
def finished(tiny_recipe: Recipe, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three rounds, whose pool rolls after the second."""
    if "run" not in folders:
        folders["run"] = tmp_path_factory.mktemp("runs") / "run"
        run(changed(tiny_recipe, FIELDS), out=folders["run"])
    return folders["run"]


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(Payload.decode((folder / "state.safetensors").read_bytes()).tensors)


def edited(finished: Path, folder: Path, state: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    for name in ("run.json", "recipe.toml"):
        (folder / name).write_bytes((finished / name).read_bytes())
    (folder / "state.safetensors").write_bytes(Payload(state, {"round": 3}).encode())
    return folder


def test_replay_of_the_last_round_is_the_runs_state_and_model(finished: Path) -> None:
    found, kept = replay(finished, round=3), state_of(finished)
    for name in [n for n in kept if n.startswith(("state.", "sums", "versions"))]:
        assert torch.equal(found.state[name], kept[name])
    model, _ = delivered(finished)
    theirs = loading.read_trained(model)
    assert all(torch.equal(t, theirs[name]) for name, t in loading.read_trained(found.model).items())


def test_replay_of_round_two_is_what_round_three_began_with(finished: Path, tmp_path: Path) -> None:
    replay(finished, round=2)  # Raises unless the hash that the run noted comes out.
    state = state_of(finished)
    state["digest.000003"][0] ^= 1
    with pytest.raises(RunError, match=r"the weights of round 2 hash to .* the records were changed"):
        replay(edited(finished, tmp_path / "run", state), round=2)


def test_a_gap_and_a_foreign_base_are_named(finished: Path, tmp_path: Path) -> None:
    state = state_of(finished)
    del state["log.000002"]
    with pytest.raises(RunError, match="the record of round 2 is missing: the model of round 1 can be replayed"):
        replay(edited(finished, tmp_path / "gap", state), round=3)
    state = state_of(finished)
    state["base"][0] ^= 1
    with pytest.raises(RunError, match="is not the model that"):
        replay(edited(finished, tmp_path / "base", state), round=1)
    with pytest.raises(RunError, match="there is no round 4"):
        replay(finished, round=4)


def test_leaving_a_client_out_says_what_it_means(finished: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "model"
    assert cli.main(["replay", str(finished), "--round", "3", "--out", str(out), "--without", "2"]) == 0
    printed = capsys.readouterr().out
    assert "Client 2 is left out of rounds 1, 2, 3" in printed
    assert "not unlearning" in printed
    assert (out / "model.safetensors").exists()
    assert (out / "tokenizer.json").exists()
    assert not torch.equal(replay(finished, round=3, without=2).state["state.000"], state_of(finished)["state.000"])
    assert cli.main(["replay", str(finished), "--round", "3", "--out", str(out)]) == 1
    assert "already exists" in capsys.readouterr().err
