"""Runs from recipe to results: what a folder holds, what results say, resuming, repeats, scoring."""

import hashlib
import importlib
import json
import math
import re
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kilofed
from kilofed.config.recipe import Recipe
from kilofed.config.tables import changed, from_table, load
from kilofed.errors import KilofedError, RecipeError, RunError
from kilofed.federation.ledger import Ledger
from kilofed.models import evaluation
from kilofed.payload import Payload
from kilofed.records import codec
from kilofed.records.results import ScoreRows
from kilofed.reports import report
from kilofed.runs import commit
from kilofed.runs.lock import held
from kilofed.runs.loop import Run

SMALL = {"evaluate.generate": 0, "evaluate.baselines": []}


class Told:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.stages: list[str] = []
        self.rounds: list[int] = []

    def begin(self, folder: Path) -> None:
        self.folder = folder

    def stage(self, text: str) -> None:
        self.stages.append(text)

    def round(self, number: int, total: int, metrics: Mapping[str, object]) -> None:
        assert total == 2
        assert {"round", "train_loss", "loss", "accuracy", "failures", "seconds"} <= set(metrics)
        self.rounds.append(number)


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "done" not in request.fixturenames:  # That one run draws its plots.
        monkeypatch.setattr(report, "write", lambda folder: folder)


@pytest.fixture(scope="module")
def recipe(tiny_model: Path, tiny_rows: Path) -> Recipe:
    return from_table(
        {
            "name": "test",
            "rounds": 2,
            "model": {"path": str(tiny_model)},
            "adapter": {"rank": 2},
            "data": {"source": str(tiny_rows), "holdout": 0.2, "max_length": 48},
            "train": {"steps": 2, "batch_size": 4, "lr": 0.01},
            "evaluate": {"generate": 1, "max_new_tokens": 4, "max_local": 2},
        }
    )


@pytest.fixture(scope="module")
def told() -> Told:
    return Told()


@pytest.fixture(scope="module")
def done(recipe: Recipe, told: Told, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return kilofed.run(recipe, out=tmp_path_factory.mktemp("done") / "run", watch=told)


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_run_folder_holds_everything(done: Run) -> None:
    names = {path.name for path in done.folder.iterdir()}
    assert names >= {
        "recipe.toml",
        "run.json",
        "ledger.jsonl",
        "metrics.jsonl",
        "state.safetensors",
        "results.json",
        "baselines.json",
        "report.html",
        "adapter",
    }
    assert not list(done.folder.rglob("*.part"))


def test_the_recipe_in_the_folder_is_the_whole_recipe(done: Run, recipe: Recipe) -> None:
    assert load(done.folder / "recipe.toml") == recipe


def test_results_have_the_rows_and_the_costs(done: Run) -> None:
    found = json.loads((done.folder / "results.json").read_text("utf-8"))
    assert found == json.loads(json.dumps(done.results.to_json()))
    assert list(found["rows"]) == ["base", "federated", "local", "centralized"]
    for name, row in found["rows"].items():
        assert {"loss", "interval", "accuracy", "perplexity", "rouge_l", "exact_match", "macro_f1", "clients"} == set(
            row
        )
        assert len(row["clients"]) == (2 if name == "local" else 4)
        assert row["loss"] == pytest.approx(sum(c["loss"] for c in row["clients"]) / len(row["clients"]))
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        assert row["interval"][0] < row["loss"] < row["interval"][1]
    assert found["exchanges"] == 2
    assert found["seconds"] > 0
    assert found["peak_memory_bytes"] > 50e6
    assert found["run"] == str(done.folder)
    assert found["seeds"] == [0]


def test_the_digest_is_that_of_the_state(done: Run) -> None:
    kept = commit.read(done.folder)
    assert kept
    assert done.results.state_sha256 == hashlib.sha256(Payload(kept.state, {"round": 2}).encode()).hexdigest()


def test_bytes_are_the_sums_of_the_ledgers_rows(done: Run) -> None:
    with closing(Ledger(done.folder / "ledger.jsonl")) as ledger:
        rows = list(ledger.rows())
    assert len(rows) == 2 * 2 * 4
    for way in ("up", "down"):
        total = sum(row.bytes for row in rows if row.direction == way)
        assert getattr(done.results.bytes, way) == total / 4
        assert getattr(done.results.bytes_total, way) == total


def test_the_forecast_in_the_folder_is_what_each_round_took(done: Run) -> None:
    (forecast,) = json.loads((done.folder / "run.json").read_text("utf-8"))["forecast"]
    with closing(Ledger(done.folder / "ledger.jsonl")) as ledger:
        for way in ("up", "down"):
            low, high = forecast[way]
            assert {row.bytes for row in ledger.rows() if row.direction == way} == {low} == {high}


def test_metrics_have_a_line_per_round_and_one_before_the_first(done: Run) -> None:
    rounds = lines(done.folder / "metrics.jsonl")
    assert [line["round"] for line in rounds] == [0, 1, 2]
    base, last = done.rows["base"].loss, done.rows["federated"].loss
    assert rounds[0]["loss"] == pytest.approx(base, rel=1e-9)
    assert rounds[2]["loss"] == pytest.approx(last, rel=1e-9)


def test_the_watch_is_told_of_every_round(done: Run, told: Told) -> None:
    assert told.folder == done.folder
    assert told.rounds == [1, 2]
    assert {"base model", "federated model", "centralized", "local-only 1/2", "local-only 2/2"} <= set(told.stages)


def test_a_run_gives_the_model_that_it_delivered(done: Run) -> None:
    model, tokenizer = done.model()
    assert isinstance(model, torch.nn.Module)
    assert tokenizer.pad_token_id == 0


def test_resuming_a_finished_run_reads_it_again(done: Run) -> None:
    before = (done.folder / "state.safetensors").stat().st_mtime_ns
    again = kilofed.resume(done.folder)
    assert again.results == done.results
    assert (done.folder / "state.safetensors").stat().st_mtime_ns == before


def test_the_same_recipe_ends_in_the_same_state(done: Run, recipe: Recipe, tmp_path: Path) -> None:
    again = kilofed.run(changed(recipe, SMALL), out=tmp_path / "again")
    assert again.results.state_sha256 == done.results.state_sha256
    other = kilofed.run(changed(recipe, {**SMALL, "seed": 1}), out=tmp_path / "other")
    assert other.results.state_sha256 != done.results.state_sha256


def test_a_folder_of_an_older_kilofed_is_refused_in_one_sentence(recipe: Recipe, tmp_path: Path) -> None:
    folder = kilofed.run(changed(recipe, SMALL), out=tmp_path / "run").folder
    (folder / "results.json").unlink()
    (folder / "controls.json").write_text("{}")
    with pytest.raises(
        RunError, match=r"begun by an older kilofed \(it holds controls\.json.*run its recipe\.toml anew"
    ):
        kilofed.resume(folder)


def test_rows_that_were_scored_are_not_scored_again(recipe: Recipe, tmp_path: Path) -> None:
    folder = kilofed.run(changed(recipe, {**SMALL, "evaluate.baselines": ["base"]}), out=tmp_path / "run").folder
    (folder / "results.json").unlink()
    found = codec.from_file(ScoreRows, folder / "baselines.json")
    rows = {**found.rows, "base": replace(found.rows["base"], loss=7.5)}
    (folder / "baselines.json").write_text(json.dumps(codec.to_json(replace(found, rows=rows))))
    assert kilofed.resume(folder).rows["base"].loss == 7.5


def test_an_edited_recipe_is_not_resumed(recipe: Recipe, tmp_path: Path) -> None:
    folder = kilofed.run(changed(recipe, SMALL), out=tmp_path / "run").folder
    text = (folder / "recipe.toml").read_text("utf-8")
    (folder / "recipe.toml").write_text(text.replace("rounds = 2", "rounds = 3").replace("lr = 0.01", "lr = 0.02"))
    with pytest.raises(
        RunError, match=r"recipe\.toml was edited after the run began \(rounds, train\.lr\): undo that"
    ):
        kilofed.resume(folder)
    (folder / "recipe.toml").write_text(text)
    assert kilofed.resume(folder).rows["federated"].loss > 0


def test_a_folder_that_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a run folder"):
        kilofed.resume(tmp_path)


def test_a_run_does_not_write_into_an_existing_folder(done: Run, recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"already exists and `kilofed resume .*` goes on with it"):
        kilofed.run(recipe, out=done.folder)
    (tmp_path / "letter.txt").write_text("dear", "utf-8")
    with pytest.raises(RunError, match="already exists and it holds other files"):
        kilofed.run(recipe, out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_wrong_recipe_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean fedavg"):
        kilofed.run("tiny", {"method": "fedavgg"}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("inner", [".", "seed-1"])
def test_a_folder_that_is_in_use_is_left_alone(recipe: Recipe, tmp_path: Path, inner: str) -> None:
    two = changed(recipe, {**SMALL, "rounds": 1, "seeds": 2, "evaluate.baselines": []})
    folder = kilofed.run(two, out=tmp_path / "run").folder
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with held(folder / inner), pytest.raises(RunError, match=r"is in use by this process since .* UTC: wait for it"):
        kilofed.resume(folder)
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {path for path in before if path.suffix != ".html" and before[path] != after[path]} == set()
    assert kilofed.resume(folder).results.seeds == (0, 1)


def test_while_it_runs_nobody_else_does(recipe: Recipe, tmp_path: Path) -> None:
    class Rival(Told):
        def round(self, number: int, total: int, metrics: Mapping[str, object]) -> None:
            super().round(number, total, metrics)
            with pytest.raises(RunError, match="is in use by this process"):
                kilofed.resume(tmp_path / "run")
            with pytest.raises(RunError, match="already exists"):
                kilofed.run(recipe, out=tmp_path / "run")

    watch = Rival()
    kilofed.run(changed(recipe, SMALL), out=tmp_path / "run", watch=watch)
    assert watch.rounds == [1, 2]
    assert not (tmp_path / "run" / "run.lock").exists()


def test_folders_are_numbered_when_none_is_named(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    quick = changed(recipe, {**SMALL, "rounds": 1, "name": "mine"})
    assert [kilofed.run(quick).folder for _ in range(2)] == [Path("runs/mine-1"), Path("runs/mine-2")]


def test_stopped_between_rounds_and_resumed_equals_uninterrupted(done: Run, recipe: Recipe, tmp_path: Path) -> None:
    class Impatient(Told):
        def round(self, number: int, total: int, metrics: Mapping[str, object]) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kilofed.run(changed(recipe, SMALL), out=tmp_path / "run", watch=Impatient())
    state = Payload.decode((tmp_path / "run" / "state.safetensors").read_bytes())
    assert state.scalars["round"] == 1
    again = kilofed.resume(tmp_path / "run")
    assert again.results.state_sha256 == done.results.state_sha256
    assert again.results.exchanges == 2


def test_a_first_line_of_metrics_that_was_cut_is_written_again(recipe: Recipe, tmp_path: Path) -> None:
    folder = kilofed.run(changed(recipe, SMALL), out=tmp_path / "run").folder
    whole = lines(folder / "metrics.jsonl")
    for name in ("results.json", "state.safetensors", "ledger.jsonl"):
        (folder / name).unlink()
    (folder / "metrics.jsonl").write_text('{"round":0,"lo', "utf-8")
    kilofed.resume(folder)
    assert [line["loss"] for line in lines(folder / "metrics.jsonl")] == [line["loss"] for line in whole]


@pytest.mark.parametrize(
    ("on_failure", "message"),
    [
        ("stop", r"round 1: client 0: the (loss is|weights are) .*; the state of round 0 is kept"),
        ("skip", "round 1: 0 of 4 clients are left after 'fit', quorum is 1; client 0: the loss is nan"),
    ],
)
def test_clients_whose_loss_is_not_finite_stop_or_are_skipped(
    recipe: Recipe, tmp_path: Path, on_failure: str, message: str
) -> None:
    bad = changed(recipe, {**SMALL, "on_failure": on_failure, "train.lr": 1e30, "train.optimizer": "sgd"})
    with pytest.raises(kilofed.KilofedError, match=message):
        kilofed.run(bad, out=tmp_path / "run")


def test_a_cohort_is_drawn_anew_each_round(recipe: Recipe, tmp_path: Path) -> None:
    folder = kilofed.run(changed(recipe, {**SMALL, "rounds": 6, "cohort": 2}), out=tmp_path / "run").folder
    with closing(Ledger(folder / "ledger.jsonl")) as ledger:
        drawn: dict[int, list[int]] = {}
        for row in ledger.rows():
            if row.direction == "down":
                drawn.setdefault(row.round, []).append(row.client)
    assert {len(ids) for ids in drawn.values()} == {2}
    assert all(ids == sorted(set(ids)) for ids in drawn.values())
    assert len({tuple(ids) for ids in drawn.values()}) > 1


def test_repeats_have_a_folder_each_and_one_table(recipe: Recipe, tmp_path: Path) -> None:
    two = changed(recipe, {"evaluate.generate": 0, "evaluate.baselines": ["base"], "rounds": 1, "seeds": 2, "seed": 4})
    done = kilofed.run(two, out=tmp_path / "run")
    assert done.results.seeds == (4, 5)
    parts = [json.loads((done.folder / f"seed-{seed}" / "results.json").read_text("utf-8")) for seed in (4, 5)]
    losses = [part["rows"]["federated"]["loss"] for part in parts]
    assert losses[0] != losses[1]
    assert done.rows["federated"].loss == pytest.approx(sum(losses) / 2)
    assert done.rows["federated"].interval == evaluation.interval(losses)
    single = kilofed.run(replace(two, seeds=1, seed=5), out=tmp_path / "single")
    assert single.results.state_sha256 == parts[1]["state_sha256"]
    assert kilofed.resume(done.folder).results == done.results
    model, _ = done.model()
    assert isinstance(model, torch.nn.Module)


def test_former_names_are_kept_under_present_ones_and_old_folders_resumed(recipe: Recipe, tmp_path: Path) -> None:
    words = {
        "evaluate.generate": 0,
        "evaluate.baselines": ["base"],
        "method.weights": "uniform",
        "rounds": 1,
        "seeds": 2,
    }
    done = kilofed.run(changed(recipe, words), out=tmp_path / "run")  # type: ignore[arg-type]
    folders = [done.folder, done.folder / "seed-0", done.folder / "seed-1"]
    for path in [folder / name for folder in folders for name in ("recipe.toml", "run.json")]:
        text = path.read_text("utf-8")
        assert "client_weighting" in text
        assert "baselines" in text
        # As a release before the present names wrote it.
        text = text.replace("client_weighting", "weights").replace("baselines", "controls")
        path.write_text(re.sub(r',\s*"sha256": "\w+"', "", text), "utf-8")
    for folder in folders:
        (folder / "results.json").unlink()
    (folders[2] / "state.safetensors").unlink()
    again = kilofed.resume(done.folder)
    assert again.rows["federated"].loss == done.rows["federated"].loss
    assert isinstance(again.model()[0], torch.nn.Module)
    text = (done.folder / "recipe.toml").read_text("utf-8")
    (done.folder / "recipe.toml").write_text(text.replace('weights = "uniform"', 'weights = "examples"'), "utf-8")
    with pytest.raises(RunError, match=r"edited after the run began \(method\.client_weighting\): undo"):
        kilofed.resume(done.folder)


def test_private_noise_has_a_secret_key_and_a_price(recipe: Recipe, tmp_path: Path) -> None:
    private = changed(recipe, {**SMALL, "privacy.kind": "central"})
    done = kilofed.run(private, out=tmp_path / "run")
    key = done.folder / "noise.key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert done.results.privacy.epsilon == pytest.approx(6.573, abs=0.001)
    assert done.results.privacy.num_means == 2
    text = "".join(p.read_text("utf-8", "replace") for p in done.folder.rglob("*") if p.is_file() and p != key)
    assert key.read_text("utf-8") not in text
    other = kilofed.run(private, out=tmp_path / "other")
    assert other.results.state_sha256 != done.results.state_sha256


def test_a_method_outside_the_package_runs_by_name(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    importlib.import_module("fixtures.outside_method")  # By this program's own will: nobody is asked.
    done = kilofed.run(changed(recipe, {**SMALL, "method": "fixtures.outside_method"}), out=tmp_path / "run")
    state = Payload.decode((done.folder / "state.safetensors").read_bytes())
    assert torch.equal(state.tensors["x"], torch.full((2, 3), 3.0))  # Two rounds of the mean of 0, 1, 2, 3.


def test_a_run_that_never_began_does_not_block_its_folder(done: Run, recipe: Recipe, tmp_path: Path) -> None:
    missing = replace(recipe, data=replace(recipe.data, source=str(tmp_path / "rows.jsonl")))
    with pytest.raises(KilofedError, match=r"rows\.jsonl"):
        kilofed.run(missing, out=tmp_path / "run")
    assert kilofed.run(recipe, out=tmp_path / "run").results.state_sha256 == done.results.state_sha256
