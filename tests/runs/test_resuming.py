"""A run goes on from what it committed, or says which file speaks against it."""

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from itertools import islice
from pathlib import Path

import pytest
import torch

from kilofed.config.recipe import Recipe
from kilofed.config.tables import changed
from kilofed.errors import RunError
from kilofed.federation.ledger import Tally
from kilofed.federation.states import States
from kilofed.files import append_line
from kilofed.runs import commit
from kilofed.runs.commit import Lines
from kilofed.runs.resuming import checked, cut_back
from kilofed.runs.rounds import run_rounds
from kilofed.runs.sites import Sites

SIZES = (3, 10, 41)
NONE = Lines(0, "")


def of_line(row: object) -> bytes:
    return json.dumps(row).encode()


def lines(path: Path) -> list[str]:
    return path.read_text("utf-8").splitlines()


def written(path: Path, *rounds: int) -> Path:
    for number in rounds:
        append_line(path, {"round": number})
    return path


def test_whole_rounds_after_the_committed_one_are_cut_and_no_line_before(tmp_path: Path) -> None:
    path = written(tmp_path / "lines", 1, 1, 2)
    tally = cut_back(path, of_line, NONE, 0)
    assert (lines(path), tally.num) == ([], 0)
    whole = written(path, 1, 1, 2).read_bytes()
    three = cut_back(shutil.copy(path, tmp_path / "three"), of_line, Lines(3, _tally(path, 3)), 2)
    assert three.num == 3
    written(path, 3, 3, 4)
    cut_back(path, of_line, Lines(3, three.sha256), 2)
    assert path.read_bytes() == whole
    before = path.stat().st_mtime_ns
    cut_back(path, of_line, Lines(3, three.sha256), 2)
    assert path.stat().st_mtime_ns == before


def _tally(path: Path, num: int) -> str:
    tally = Tally()
    for line in lines(path)[:num]:
        tally.add(of_line(json.loads(line)))
    return tally.sha256


@pytest.mark.parametrize("kept", range(1, len('{"round":3}\n')))
def test_a_last_line_cut_anywhere_goes(tmp_path: Path, kept: int) -> None:
    path = written(tmp_path / "lines", 1, 2)
    committed = Lines(2, _tally(path, 2))
    with path.open("a", encoding="utf-8") as file:
        file.write('{"round":3}\n'[:kept])
    cut_back(path, of_line, committed, 2)
    assert lines(path) == ['{"round":1}', '{"round":2}']


def test_a_committed_line_without_its_end_is_refused(tmp_path: Path) -> None:
    # It reads as it was, but the next line would be glued to it.
    path = written(tmp_path / "lines", 1, 2)
    committed = Lines(2, _tally(path, 2))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RunError, match=r"line 2 is damaged \(it is cut\)"):
        cut_back(path, of_line, committed, 2)


def test_a_last_line_cut_inside_a_character_goes(tmp_path: Path) -> None:
    path = written(tmp_path / "lines", 1)
    committed = Lines(1, _tally(path, 1))
    with path.open("ab") as file:
        file.write('{"round":2,"text":"ä'.encode()[:-1])
    cut_back(path, of_line, committed, 1)
    assert lines(path) == ['{"round":1}']


@pytest.mark.parametrize(
    ("damaged", "said"),
    [
        ('{"round":1}\ngarbage\n{"round":2}\n{"round":2}\n', r"lines line 2 is damaged"),
        ('{"round":1}\n{"round":1}\n{"round":2}\n{"rou', r"lines line 4 is damaged"),
        (
            '{"round":1}\n{"round":1}\n{"round":2}\n',
            r"lines has 3 whole lines; when round 2 ended it had 4: put a copy",
        ),
        ("", r"lines has 0 whole lines"),
        ('{"round":1}\n{"round":2}\n{"round":1}\n{"round":2}\n', r"lines is not as it was when round 2 ended"),
        ('{"round":1}\n{"round":1}\n{"round":2}\n{"round":2,"x":1}\n', r"lines is not as it was when round 2 ended"),
        ('{"round":1}\n{"round":1}\n{"round":2}\n{"round":2}\n{"round":2}\n', r"line 5 is of round 2, but round 2"),
        ('{"round":1}\n{"round":1}\n{"round":2}\n{"round":2}\ngarbage\n{"round":3}\n', r"lines line 5 is damaged"),
        ('{"round":1}\n{"round":1}\n{"round":2}\n{"round":2}\n[3]\n', r"line 5 is damaged \(it is no JSON object\)"),
        ('{"round":1}\n{"round":1}\n{"round":2}\n{"round":2}\n{"r":3}\n', r"line 5 is of round None"),
        ("[" * 9999 + '\n{"round":1}\n{"round":2}\n{"round":2}\n', r"line 1 is damaged \(it is nested too deeply\)"),
    ],
)
def test_other_damage_is_refused_by_file_and_line_and_left_as_it_is(tmp_path: Path, damaged: str, said: str) -> None:
    path = written(tmp_path / "lines", 1, 1, 2, 2)
    committed = Lines(4, _tally(path, 4))
    path.write_text(damaged, "utf-8")
    with pytest.raises(RunError, match=said):
        cut_back(path, of_line, committed, 2)
    assert path.read_text("utf-8") == damaged


def test_a_file_that_is_gone_is_missed(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"lines has 0 whole lines; when round 1 ended it had 2"):
        cut_back(tmp_path / "lines", of_line, Lines(2, "ab"), 1)
    assert cut_back(tmp_path / "lines", of_line, NONE, -1).num == 0


@pytest.fixture
def recipe(tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Three rounds of three clients with 3, 10 and 41 rows, whose state is kept; noise with a secret key."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    monkeypatch.setenv("KILOFED_TRUST", "fixtures.stateful_method")
    rows = [
        {"client": f"site {client}", "instruction": f"add {n} and {client}", "response": f"is {n + client}"}
        for client, size in enumerate(SIZES)
        for n in range(size)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return changed(
        tiny_recipe,
        {
            "data.source": str(tmp_path / "rows.jsonl"),
            "rounds": 3,
            "method": "fixtures.stateful_method",
            "privacy.kind": "central",
            "evaluate.every": 9,
        },
    )


@pytest.fixture
def folder(recipe: Recipe, tmp_path: Path) -> Path:
    """A run after two of three rounds."""
    return run(recipe, tmp_path / "run", 2)


def run(recipe: Recipe, folder: Path, most: int | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    sites = Sites(recipe, folder / "clients")
    with closing(run_rounds(sites, sites.server(folder=folder), sites.policy, folder)) as rounds:
        for _ in islice(rounds, most):
            pass
    return folder


def newest(folder: Path, client: int) -> Path:
    return max((folder / "clients" / str(client)).glob("round-*"))


def test_a_whole_folder_goes_on_where_it_was(recipe: Recipe, folder: Path) -> None:
    begun = checked(folder, recipe)
    assert begun.commit
    assert (begun.commit.round, begun.metrics.num, len(begun.commit.clients)) == (2, 3, 3)
    assert begun.run == begun.commit.run
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert checked(folder, recipe).run == begun.run
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    path.write_bytes(content)


def swap_states(folder: Path) -> None:
    one, other = newest(folder, 0), newest(folder, 1)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def older(folder: Path) -> None:
    newest(folder, 2).unlink()


def renamed(folder: Path) -> None:
    first, second = sorted((folder / "clients" / "1").glob("round-*"))
    first.replace(second)


def rewritten(folder: Path) -> None:
    """A whole state of the right name with other numbers."""
    found = commit.read(folder)
    assert found
    States(folder / "clients" / "0", 0).keep(found.clients[0].when, {"seen": torch.tensor([9.0])}, found.run)


def reordered(folder: Path) -> None:
    path = folder / "ledger.jsonl"
    first, second, *rest = path.read_text("utf-8").splitlines(keepends=True)
    path.write_text("".join([second, first, *rest]), "utf-8")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit of the state": (lambda f: flip(f / commit.FILE), r"state\.safetensors is not a whole state"),
    "no state": (lambda f: (f / commit.FILE).unlink(), r"state\.safetensors is missing, but ledger\.jsonl holds round 2"),
    "no key": (lambda f: (f / "noise.key").unlink(), r"noise\.key is missing"),
    "another key": (lambda f: (f / "noise.key").write_text("ab" * 16), r"state\.safetensors and .*noise\.key.* of one run"),
    "no ledger": (lambda f: (f / "ledger.jsonl").unlink(), r"ledger\.jsonl has 0 whole lines"),
    "rows in another order": (reordered, r"ledger\.jsonl is not as it was when round 2 ended"),
    "no metrics": (lambda f: (f / "metrics.jsonl").unlink(), r"metrics\.jsonl has 0 whole lines"),
    "states of two clients swapped": (swap_states, r"clients/0/round-.* holds another client state \(client 1, expected 0"),
    "a client's newest state gone": (older, r"clients/2/round-000002-.*is missing, with which round 2 ended"),
    "all of a client gone": (lambda f: shutil.rmtree(f / "clients" / "1"), r"clients/1/round-000002-.* is missing"),
    "an older state in its place": (renamed, r"clients/1/round-000002-.* holds another client state \(round 1, expected 2"),
    "a bit of a client's state": (lambda f: flip(newest(f, 0)), r"clients/0/round-000002-.* is damaged"),
    "another state of that name": (rewritten, r"clients/0/round-000002-.* is not the one with which round 2 ended"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_refused_by_the_files_name(recipe: Recipe, folder: Path, kind: str) -> None:
    damage, said = DAMAGES[kind]
    damage(folder)
    with pytest.raises(RunError, match=said) as found:
        checked(folder, recipe)
    assert "put a copy" in str(found.value)


def test_another_runs_state_and_another_recipe_are_refused(recipe: Recipe, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"state\.safetensors is not of a run of the recipe beside it"):
        checked(folder, changed(recipe, {"train.lr": 0.5}))
    other = run(recipe, tmp_path / "other", 2)  # The same but for its secret.
    shutil.copy(other / commit.FILE, folder)
    with pytest.raises(
        RunError, match=r"state\.safetensors and .*noise\.key, the secret of the noise, are not of one run"
    ):
        checked(folder, recipe)
    assert checked(other, changed(recipe, {"engine.name": "pool", "name": "mine"})).commit


def test_a_state_of_another_run_is_refused(recipe: Recipe, folder: Path, tmp_path: Path) -> None:
    other = run(recipe, tmp_path / "other", 2)
    shutil.copy(newest(other, 2), newest(folder, 2))
    with pytest.raises(
        RunError, match=r"clients/2/round-000002-0000\.safetensors holds another client state \(run \w+, expected"
    ):
        checked(folder, recipe)


def test_newer_states_of_a_killed_round_are_no_damage(recipe: Recipe, folder: Path, tmp_path: Path) -> None:
    found = commit.read(folder)
    assert found
    States(folder / "clients" / "1", 1).keep((3, 0), {"x": torch.ones(2)}, found.run)
    assert checked(folder, recipe).commit


def test_without_a_commit_it_begins_with_round_one_and_says_so(
    recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = run(recipe, tmp_path / "run", 1)
    (folder / commit.FILE).unlink()
    begun = checked(folder, recipe)
    assert begun.commit is None
    assert (lines(folder / "metrics.jsonl"), lines(folder / "ledger.jsonl")) == ([], [])
    assert "no round of" in caplog.text
    assert "begins again with round 1" in caplog.text
