"""Replay: records are a checkpoint, to the bit; what was changed, missing or foreign is said in one sentence."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
import torch

from kilofed import cli
from kilofed.config.fields import Value
from kilofed.config.recipe import Recipe
from kilofed.config.tables import changed
from kilofed.errors import RunError
from kilofed.models import loading
from kilofed.runs import commit
from kilofed.runs.loop import run
from kilofed.runs.replay import replay
from kilofed.runs.restore import delivered
from kilofed.zeroth import seed_log
from kilofed.zeroth.pools import check_name, log_name

NO_WORDS: Mapping[str, Value] = MappingProxyType({})
SIZES = (3, 10, 41)
FIELDS: dict[str, Value] = {
    "method": "fedkseed", "method.num_seeds": 64, "method.steps": 3, "method.lr": 1e-3, "method.rounds_per_pool": 2,
    "method.sampling": "pro", "adapter.kind": "full", "rounds": 5,
    "evaluate.baselines": [], "evaluate.generate": 0, "evaluate.every": 5,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders() -> dict[str, Path]:
    return {}


def ran(
    recipe: Recipe,
    folders: dict[str, Path],
    factory: pytest.TempPathFactory,
    words: Mapping[str, Value] = MappingProxyType({}),
) -> Path:
    """A run of five rounds of 3, 10 and 41 rows, whose pool rolls after the second and the fourth; made once."""
    key = str(sorted(words.items()))
    if key not in folders:
        folder = factory.mktemp("runs")
        rows = [
            {"client": f"site {client}", "instruction": f"add {n} and {client}", "response": f"is {n + client}"}
            for client, size in enumerate(SIZES)
            for n in range(size)
        ]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        words = {**FIELDS, "data.source": str(folder / "rows.jsonl"), **words}
        folders[key] = run(changed(recipe, words), out=folder / "run").folder
    return folders[key]


@pytest.fixture
def finished(tiny_recipe: Recipe, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ran(tiny_recipe, folders, tmp_path_factory)


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    found = commit.read(folder)
    assert found
    return dict(found.state)


def edited(finished: Path, folder: Path, state: dict[str, torch.Tensor]) -> Path:
    """The run with another state, as whole as a file can be."""
    folder.mkdir()
    for name in ("run.json", "recipe.toml"):
        (folder / name).write_bytes((finished / name).read_bytes())
    found = commit.read(finished)
    assert found
    commit.write(folder, replace(found, state=state))
    return folder


def test_replay_of_the_last_round_is_the_runs_state_and_model(finished: Path) -> None:
    found, kept = replay(finished, round=5), state_of(finished)
    for name in [n for n in kept if n.startswith(("state.", "sums", "versions"))]:
        assert torch.equal(found.state[name], kept[name])
    model, _ = delivered(finished)
    theirs = loading.read_trained(model)
    assert all(torch.equal(t, theirs[name]) for name, t in loading.read_trained(found.model).items())


def test_replay_of_round_two_is_what_round_three_began_with(finished: Path, tmp_path: Path) -> None:
    replay(finished, round=2)  # Raises unless the hash that the run noted comes out.
    state = state_of(finished)
    state["digest.000003"][0] ^= 1
    with pytest.raises(RunError, match=r"the weights after round 2 hash to .*state\.safetensors.* was changed"):
        replay(edited(finished, tmp_path / "run", state), round=2)


def test_a_gap_and_a_foreign_base_are_named(finished: Path, tmp_path: Path) -> None:
    state = state_of(finished)
    del state["log.000002"]
    with pytest.raises(
        RunError,
        match=r"the record of round 2 is missing in .*: the model of round 1 can be replayed",
    ):
        replay(edited(finished, tmp_path / "gap", state), round=3)
    state = state_of(finished)
    state["base"][0] ^= 1
    with pytest.raises(RunError, match="is not the model with which"):
        replay(edited(finished, tmp_path / "base", state), round=1)
    with pytest.raises(RunError, match="there is no round 6"):
        replay(finished, round=6)


def report_edited(state: dict[str, torch.Tensor], round: int, client: int) -> None:
    """One bit of one client's loss."""
    replies = seed_log.unpack_reports(state[log_name(round)])
    body = bytearray(replies[client])
    body[6] ^= 1
    state[log_name(round)] = seed_log.pack_reports({**replies, client: bytes(body)})


def weight_changed(state: dict[str, torch.Tensor], round: int, client: int) -> None:
    """One row more than the client said that it holds, and the digest of its report with it."""
    replies = seed_log.unpack_reports(state[log_name(round)])
    body = bytearray(replies[client])
    body[0] += 1
    state[log_name(round)] = seed_log.pack_reports({**replies, client: bytes(body)})
    state[check_name(round)] = seed_log.record_digests(round, state[log_name(round)])


def swapped(state: dict[str, torch.Tensor], one: int, other: int) -> None:
    for name in (log_name, check_name):
        state[name(one)], state[name(other)] = state[name(other)], state[name(one)]


@pytest.mark.parametrize("words", [{}, {"method.check_every": 0}, {"method.check_every": 3}], ids=str)
def test_an_edited_report_is_refused_with_round_and_client(
    tiny_recipe: Recipe, folders: dict[str, Path], tmp_path_factory, tmp_path: Path, words: dict[str, Value]
) -> None:
    finished = ran(tiny_recipe, folders, tmp_path_factory, words)
    for round in range(6):
        replay(finished, round=round)
    assert same_coefficients(replay(finished, round=5).state, state_of(finished))
    report_edited(state := state_of(finished), 2, 1)
    spoilt = edited(finished, tmp_path / "run", state)
    for round in range(2, 6):
        with pytest.raises(
            RunError, match=r"the record of round 2 in .*state\.safetensors was changed \(of client 1\)"
        ):
            replay(spoilt, round=round)
        with pytest.raises(RunError, match=r"the record of round 2 in"):
            replay(spoilt, round=round, without=0)


@pytest.mark.parametrize("words", [{}, {"method.check_every": 0}, {"method.check_every": 3}], ids=str)
@pytest.mark.parametrize("round", [2, 5])
def test_a_changed_weight_is_refused_though_the_reports_digest_was_changed_too(
    tiny_recipe: Recipe,
    folders: dict[str, Path],
    tmp_path_factory,
    tmp_path: Path,
    words: dict[str, Value],
    round: int,
) -> None:
    finished = ran(tiny_recipe, folders, tmp_path_factory, words)
    weight_changed(state := state_of(finished), round, 0)
    spoilt = edited(finished, tmp_path / "run", state)
    said = rf"weights after round {round} hash to|a record since the last digest"
    for asked in range(round, 6):
        with pytest.raises(RunError, match=said):
            replay(spoilt, round=asked)


@pytest.mark.parametrize("words", [{}, {"method.check_every": 0}], ids=str)
def test_swapped_rounds_are_refused(
    tiny_recipe: Recipe, folders: dict[str, Path], tmp_path_factory, tmp_path: Path, words: dict[str, Value]
) -> None:
    finished = ran(tiny_recipe, folders, tmp_path_factory, words)
    swapped(state := state_of(finished), 3, 4)
    with pytest.raises(RunError, match=r"the record of round 3 in .*state\.safetensors was changed"):
        replay(edited(finished, tmp_path / "run", state), round=5)


def test_the_end_has_a_digest_of_its_own(finished: Path, tmp_path: Path) -> None:
    state = state_of(finished)
    assert [name for name in sorted(state) if name.startswith("digest.")][-1] == "digest.000006"
    state["digest.000006"][0] ^= 1
    with pytest.raises(RunError, match=r"the weights after round 5 hash to"):
        replay(edited(finished, tmp_path / "run", state), round=5)


def test_sums_are_held_against_their_digest(
    tiny_recipe: Recipe, folders: dict[str, Path], tmp_path_factory, tmp_path: Path
) -> None:
    finished = ran(tiny_recipe, folders, tmp_path_factory, {"method.disclose": "sums"})
    replay(finished, round=5)
    state = state_of(finished)
    state[log_name(2)] = state[log_name(2)] * (1 + 1e-12)
    with pytest.raises(RunError, match=r"the record of round 2 in .*state\.safetensors was changed: put"):
        replay(edited(finished, tmp_path / "run", state), round=5)
    with pytest.raises(RunError, match="the run disclosed sums only"):
        replay(finished, round=5, without=1)


def test_a_client_that_reported_in_no_round_cannot_be_left_out(finished: Path) -> None:
    for client in (99, -1):
        with pytest.raises(RunError, match=rf"client {client} is in no record of rounds 1 to 3: there is nothing"):
            replay(finished, round=3, without=client)


def same_coefficients(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    names = [name for name in other if name.startswith(("state.", "sums", "versions"))]
    return bool(names) and all(torch.equal(one[name], other[name]) for name in names)


def test_leaving_a_client_out_says_what_it_means(finished: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "model"
    assert cli.main(["replay", str(finished), "--round", "5", "--out", str(out), "--without", "2"]) == 0
    printed = capsys.readouterr().out
    assert "Client 2 is left out of rounds 1, 2, 3, 4, 5" in printed
    assert "not unlearning" in printed
    assert (out / "model.safetensors").exists()
    assert (out / "tokenizer.json").exists()
    assert not torch.equal(replay(finished, round=5, without=2).state["state.000"], state_of(finished)["state.000"])
    assert cli.main(["replay", str(finished), "--round", "5", "--out", str(out)]) == 1
    assert "already exists" in capsys.readouterr().err
