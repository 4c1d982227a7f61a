"""A run folder: made without harm to what lies there, and read back or refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from kilofed.config.fields import Value
from kilofed.config.recipe import Recipe
from kilofed.config.tables import changed, to_table, to_toml
from kilofed.errors import RunError
from kilofed.runs import folder as run_folder


def write(folder: Path, recipe: Recipe) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    run_folder.write_json(folder / "run.json", {"recipe": to_table(recipe)})
    (folder / "recipe.toml").write_text(to_toml(recipe), "utf-8")
    return folder


def test_a_folder_that_was_never_begun_is_taken_and_its_parts_go(tiny_recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / ".results.json.part").write_text("{", "utf-8")
    (tmp_path / ".adapter.part").mkdir()
    (tmp_path / ".adapter.part" / ".inner.part").write_text("{", "utf-8")
    (tmp_path / "run.json").write_text("{}", "utf-8")
    assert run_folder.new_folder(tiny_recipe, tmp_path) == tmp_path
    run_folder.begin(tmp_path, tiny_recipe)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.toml", "run.json"]
    assert run_folder.recipe_of(tmp_path) == tiny_recipe


def test_a_run_that_began_meanwhile_is_not_begun_again(tiny_recipe: Recipe, tmp_path: Path) -> None:
    assert run_folder.new_folder(tiny_recipe, tmp_path) == tmp_path
    (tmp_path / "run.json").write_text("{}", "utf-8")
    (tmp_path / "metrics.jsonl").write_text("", "utf-8")
    with pytest.raises(RunError, match=r"already exists and `kilofed resume .*` goes on with it"):
        run_folder.begin(tmp_path, tiny_recipe)
    assert (tmp_path / "run.json").read_text("utf-8") == "{}"


def test_a_repeat_is_begun_once_and_then_is_of_its_recipe(
    tiny_recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "seed-0").mkdir()
    run_folder.begin_repeat(tmp_path / "seed-0", tiny_recipe)
    before = (tmp_path / "seed-0" / "run.json").read_bytes()
    (tmp_path / "seed-0" / "metrics.jsonl").write_text("", "utf-8")
    run_folder.begin_repeat(tmp_path / "seed-0", tiny_recipe)
    assert (tmp_path / "seed-0" / "run.json").read_bytes() == before
    (tmp_path / "seed-0" / "recipe.toml").unlink()
    run_folder.begin_repeat(tmp_path / "seed-0", tiny_recipe)
    assert "recipe.toml was missing and is written again" in caplog.text
    with pytest.raises(RunError, match=r"seed-0 holds a run of another recipe than .*recipe\.toml says for that seed"):
        run_folder.begin_repeat(tmp_path / "seed-0", changed(tiny_recipe, {"train.lr": 0.5}))
    (tmp_path / "seed-0" / "run.json").unlink()
    with pytest.raises(RunError, match=r"it has no run\.json"):
        run_folder.begin_repeat(tmp_path / "seed-0", tiny_recipe)


@pytest.mark.parametrize(
    ("names", "why"),
    [(["run.json", "ledger.jsonl"], "goes on with it"), (["letter.txt"], "it holds other files")],
)
def test_a_folder_that_holds_more_is_left_as_it_is(
    tiny_recipe: Recipe, tmp_path: Path, names: list[str], why: str
) -> None:
    for name in names:
        (tmp_path / name).write_text("kept", "utf-8")
    with pytest.raises(RunError, match=f"already exists and .*{why}; choose another --out"):
        run_folder.new_folder(tiny_recipe, tmp_path)
    assert {path.name: path.read_text("utf-8") for path in tmp_path.iterdir()} == dict.fromkeys(names, "kept")


def test_a_file_is_no_folder(tiny_recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("", "utf-8")
    with pytest.raises(RunError, match="already exists"):
        run_folder.new_folder(tiny_recipe, tmp_path / "run")


def test_folders_are_numbered_and_gaps_are_filled(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in (1, 3):
        (tmp_path / "runs" / f"test-{number}").mkdir(parents=True)
    assert run_folder.new_folder(tiny_recipe, None) == Path("runs/test-2")
    assert run_folder.new_folder(tiny_recipe, None) == Path("runs/test-4")


def test_the_recipe_comes_back_and_an_edit_is_named(tiny_recipe: Recipe, tmp_path: Path) -> None:
    folder = write(tmp_path / "run", tiny_recipe)
    assert run_folder.recipe_of(folder) == tiny_recipe
    (folder / "recipe.toml").write_text(to_toml(changed(tiny_recipe, {"rounds": 3, "train.lr": 0.5})), "utf-8")
    with pytest.raises(RunError, match=r"was edited after the run began \(rounds, train\.lr\): undo that"):
        run_folder.recipe_of(folder)
    (folder / "recipe.toml").unlink()  # A copy for the reader.
    assert run_folder.recipe_of(folder) == tiny_recipe


@pytest.mark.parametrize("text", ["", "{", '{"recipe": {"name": "x"}, "colour": 1}', '{"recipe": {}, "sha256": "ab"}'])
def test_a_damaged_copy_of_the_recipe_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(RunError, match=r"is not a run folder \(it has no run\.json\)"):
        run_folder.recipe_of(tmp_path)
    (tmp_path / "run.json").write_text(text, "utf-8")
    with pytest.raises(RunError, match=rf"{tmp_path}/run\.json "):
        run_folder.recipe_of(tmp_path)


@pytest.mark.parametrize("content", [b"rounds = ", b"\xff\xfe", b"a = " + b"[" * 5000])
def test_a_damaged_recipe_for_the_reader_is_named(tiny_recipe: Recipe, tmp_path: Path, content: bytes) -> None:
    write(tmp_path, tiny_recipe)
    (tmp_path / "recipe.toml").write_bytes(content)
    with pytest.raises(RunError, match=r"recipe\.toml cannot be read .*: delete it, which is a copy"):
        run_folder.recipe_of(tmp_path)


def test_a_run_is_known_by_what_changes_its_numbers_and_by_nothing_else(tiny_recipe: Recipe) -> None:
    own = run_folder.run_identity(tiny_recipe, "")
    assert len(own) == 16
    assert int(own, 16) >= 0
    same: dict[str, Value] = {
        "name": "other",
        "about": "words",
        "seeds": 3,
        "engine.name": "pool",
        "engine.workers": 4,
    }
    assert all(run_folder.run_identity(changed(tiny_recipe, {k: v}), "") == own for k, v in same.items())
    other: dict[str, Value] = {
        "seed": 1,
        "rounds": 3,
        "train.lr": 0.5,
        "method": "fedprox",
        "data.holdout": 0.3,
        "privacy.clip": 0.5,
    }
    found = {run_folder.run_identity(changed(tiny_recipe, {key: value}), "") for key, value in other.items()}
    found |= {run_folder.run_identity(tiny_recipe, key) for key in ("ab" * 16, "ac" * 16)}
    assert len(found | {own}) == len(other) + 3


def test_of_repeats_the_first_seed_is_taken(tmp_path: Path) -> None:
    assert run_folder.first_seed(tmp_path) == tmp_path
    for seed in (5, 4):
        (tmp_path / f"seed-{seed}").mkdir()
    assert run_folder.first_seed(tmp_path) == tmp_path / "seed-4"
    (tmp_path / "state.safetensors").write_bytes(b"")
    assert run_folder.first_seed(tmp_path) == tmp_path


def test_a_secret_key_is_drawn_once_for_its_owner(tiny_recipe: Recipe, tmp_path: Path) -> None:
    private = changed(tiny_recipe, {"privacy.kind": "central"})
    key = run_folder.noise_key(private, tmp_path)
    assert len(key) == 32
    (tmp_path / "noise.key").chmod(0o644)  # As a copy may leave it.
    assert run_folder.noise_key(private, tmp_path) == key
    assert (tmp_path / "noise.key").stat().st_mode & 0o777 == 0o600
    state = tmp_path / "state.safetensors"
    state.write_bytes(b"")
    for damage in ("", key[:-1], key[:-1] + "g", "ä" * 16):
        (tmp_path / "noise.key").write_text(damage, "utf-8")
        with pytest.raises(RunError, match=r"noise\.key is damaged \(not 32 hex digits\)"):
            run_folder.noise_key(private, tmp_path)
    (tmp_path / "noise.key").unlink()
    with pytest.raises(RunError, match=r"noise\.key is missing, the secret of this run's noise"):
        run_folder.noise_key(private, tmp_path)
    state.unlink()
    assert run_folder.noise_key(private, tmp_path) != key
    stated = replace(private, privacy=replace(private.privacy, noise_key="ab" * 16))
    keys = [run_folder.noise_key(replace(stated, seed=seed), tmp_path) for seed in (0, 1, 0)]
    assert keys[0] == keys[2] != keys[1]
    assert len(keys[0]) == len(keys[1]) == 32


@pytest.mark.parametrize("kind", ["none", "rows"])
def test_without_central_noise_there_is_no_key_file(tiny_recipe: Recipe, tmp_path: Path, kind: str) -> None:
    assert run_folder.noise_key(changed(tiny_recipe, {"privacy.kind": kind}), tmp_path) == ""
    assert list(tmp_path.iterdir()) == []
