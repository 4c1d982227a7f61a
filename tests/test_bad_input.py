"""Bad input, as a stranger types it: exit status 1, one sentence that says what to do, nothing lost, no traceback."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from kilofed.cli import main
from kilofed.config.fields import Value
from kilofed.config.tables import from_table
from kilofed.federation.sealed import SEAL, seal
from kilofed.models import training
from kilofed.models.training import Batch
from kilofed.payload import Payload
from kilofed.runs.loop import run

Refused = Callable[..., str]
QUICK = ("evaluate.generate=0", "evaluate.baselines=[]", "rounds=1", "train.steps=1")


@pytest.fixture
def recipe(tiny_table: dict[str, Value], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny recipe as a file; the working directory is an empty one."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(tiny_table), "utf-8")
    return path


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must be refused and gives the one message of stderr."""

    def command(*words: object) -> str:
        assert main([str(word) for word in words]) == 1
        said = capsys.readouterr()
        return message(said.out, said.err)

    return command


def message(out: str, err: str) -> str:
    """The one message of `err`, after checking that there is one and that nothing came out."""
    assert out == ""
    assert "Traceback" not in err
    lines = err.splitlines()
    starts = [number for number, line in enumerate(lines) if line.split(":")[0].endswith(("Error", "Loss", "Replies"))]
    assert len(starts) == 1, err
    return "\n".join(lines[starts[0] :])


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("train.lrr=1", "RecipeError: train.lrr is not a field of TrainSpec (did you mean lr?)"),
        ("trian.lr=1", "RecipeError: trian is not a field of Recipe (did you mean train?)"),
        ("train.steps=many", 'RecipeError: train.steps is "many"; expected a whole number'),
        ("train.steps=1.5", "RecipeError: train.steps is 1.5; expected a whole number"),
        ("engine.name=cloud", "RecipeError: engine.name is 'cloud'; expected one of 'inprocess', 'pool', "),
        ("rounds=0", "RecipeError: rounds is 0; expected at least 1"),
        ("method=fedavgg", "RecipeError: method 'fedavgg' does not exist (did you mean fedavg?)"),
        (
            "method.client_wieghting=uniform",
            "RecipeError: method.client_wieghting is not a field of FedAvg (did you mean client_weighting?)",
        ),
        ("cohort=9", "RecipeError: cohort is 9, but there are 4 clients"),
        ("quorum=9", "RecipeError: quorum is 9, but there are 4 clients"),
        ("data=./none.jsonl", "DataError: file or folder ./none.jsonl does not exist"),
        ("data.test=./none.jsonl", "DataError: file or folder ./none.jsonl does not exist"),
        ("data.columns.response=answer", "DataError: data.columns.response is 'answer', which no row has"),
        ("data.partition.column=owner", "DataError: data.partition.column is 'owner', which row 1 does not have"),
        ("data.partition.min_rows=11", "DataError: client site 0 has 10 training rows; expected at least 11"),
        ("data.template=alpca", "DataError: data.template is 'alpca' (did you mean alpaca?)"),
        ("data.options.train_rows=5", "DataError: data.options has train_rows"),
        ("model=./none", "ModelError: model directory ./none does not exist"),
        ("model=builtin:huge", "ModelError: builtin:huge does not exist"),
        ("model.device=abacus", "ModelError: model.device=abacus is not a device"),
        (
            'adapter.targets=["q_prj"]',
            "ModelError: adapter.targets has q_prj, which match no module; choose from down_proj",
        ),
        ("privacy.noise_key=x", "PrivacyError: privacy.noise_key is not 32 lower-case hex digits"),
    ],
)
def test_a_wrong_word_is_answered_in_one_sentence(refused: Refused, recipe: Path, word: str, said: str) -> None:
    if word.startswith("privacy"):
        assert refused("run", recipe, "privacy.kind=central", word).startswith(said)
    else:
        assert refused("run", recipe, word).startswith(said)


def test_more_clients_than_rows_are_answered_with_both_numbers(refused: Refused, recipe: Path) -> None:
    words = ("data.partition.kind=iid", "data.partition.num_clients=41")
    assert "num_clients is 41, but there are 40 training rows" in refused("run", recipe, *words)


@pytest.mark.parametrize("name", ["tinny", "none.toml"])
def test_an_unknown_recipe_is_refused(refused: Refused, name: str) -> None:
    said = refused("run", name)
    assert said.startswith("RecipeError: ")
    assert name in said


def test_a_recipe_that_is_no_toml_is_refused(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text("rounds = \n", "utf-8")
    assert refused("run", path).startswith(f"RecipeError: {path} is not valid TOML")
    path.write_bytes(b'name = "caf\xe9"\n')
    assert refused("run", path).startswith(f"RecipeError: {path} cannot be read as UTF-8 text")


def test_a_word_without_a_key_is_refused(refused: Refused, recipe: Path) -> None:
    assert "is not key=value" in refused("run", recipe, "=3")
    assert "2 recipes are named" in refused("run", recipe, "tiny")


def test_a_broken_line_is_named(refused: Refused, recipe: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"\n', "utf-8")
    assert refused("run", recipe, f"data={path}").startswith(f"DataError: {path} line 2 is not JSON")


def test_a_client_whose_rows_have_no_answer_is_named(refused: Refused, recipe: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"client": f"site {i % 2}", "instruction": f"say {i}", "response": "x" * (i % 2)} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    said = refused("run", recipe, f"data={path}", *QUICK)
    assert "client site 0: no row has an answer" in said


def test_a_data_set_of_the_hub_without_network_is_answered(
    refused: Refused, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = refused("run", recipe, "data=nobody/nothing")
    assert said.startswith("DataError: nobody/nothing is not an embedded source")
    assert "check the name and the network" in said


def test_a_model_of_the_hub_without_network_is_answered(
    refused: Refused, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = refused("run", recipe, "model=nobody/nothing")
    assert said.startswith("ModelError: cannot load the ")
    assert "or a hub id with a network connection or the model in the cache" in said


def test_a_loss_that_is_not_finite_stops_the_run_and_names_client_and_round(
    refused: Refused, recipe: Path, tmp_path: Path
) -> None:
    words = ("train.lr=1e30", "train.optimizer=sgd", "train.steps=4", "evaluate.generate=0", "evaluate.baselines=[]")
    said = refused("run", recipe, *words, "--out", tmp_path / "run")
    assert said.startswith("ClientError: round 1: client 0: the loss is ")
    assert "the state of round 0 is kept" in said
    assert "train.lr" in said


def poison(monkeypatch: pytest.MonkeyPatch, word: int) -> None:
    """Makes the loss of every batch with that token NaN."""
    sound = training.loss

    def loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return sound(model, batch) * (float("nan") if bool((batch.input_ids == word).any()) else 1.0)

    monkeypatch.setattr(training, "loss", loss)


def rows_of_one_poisoned_client(path: Path) -> Path:
    rows = [
        {"client": f"site {i % 3}", "instruction": f"say {'~' if i % 3 == 1 else ''}{i}", "response": "yes"}
        for i in range(30)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture
def tilde(tiny_model: Path) -> int:
    (token,) = AutoTokenizer.from_pretrained(tiny_model).encode("~", add_special_tokens=False)
    return int(token)


def test_a_loss_that_is_not_finite_skips_the_client_if_asked_to(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tilde: int
) -> None:
    poison(monkeypatch, tilde)
    source, out = rows_of_one_poisoned_client(tmp_path / "rows.jsonl"), tmp_path / "run"
    assert main(["run", str(recipe), f"data={source}", "on_failure=skip", *QUICK, "--out", str(out)]) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    (failed,) = [line["failures"] for line in lines if line["round"] == 1]
    assert list(failed) == ["1"]
    assert "the loss is nan" in failed["1"]


def test_too_few_clients_left_after_skipping_stop_the_run(
    refused: Refused, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tilde: int
) -> None:
    poison(monkeypatch, tilde)
    source = rows_of_one_poisoned_client(tmp_path / "rows.jsonl")
    said = refused("run", recipe, f"data={source}", "on_failure=skip", "quorum=3", *QUICK)
    assert said.startswith("TooFewReplies: round 1: 2 of 3 clients are left after 'fit', quorum is 3")


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tiny_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    words = {
        "name": "test", "rounds": 1, "model": str(tiny_model), "data": {"source": str(tiny_rows), "max_length": 48},
        "train": {"steps": 1, "lr": 0.01}, "evaluate": {"generate": 0, "baselines": []},
    }  # fmt: skip
    run(from_table(words), out=folder)
    return folder


@pytest.fixture
def done(finished: Path, tmp_path: Path) -> Path:
    """A copy of the folder of a finished run, to be spoilt."""
    return Path(shutil.copytree(finished, tmp_path / "done"))


def test_a_run_folder_that_exists_is_left_alone(refused: Refused, recipe: Path, done: Path) -> None:
    before = {path: path.read_bytes() for path in done.rglob("*") if path.is_file()}
    said = refused("run", recipe, "--out", done)
    assert said.startswith(f"RunError: {done} already exists and `kilofed resume {done}` goes on with it")
    assert {path: path.read_bytes() for path in done.rglob("*") if path.is_file()} == before


def test_a_folder_with_other_files_is_left_alone(refused: Refused, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear", "utf-8")
    assert "it holds other files" in refused("run", recipe, "--out", tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("command", ["resume", "eval", "report", "export", "chat"])
def test_a_folder_that_is_no_run_is_refused(refused: Refused, tmp_path: Path, command: str) -> None:
    words = ["--adapter", str(tmp_path / "out")] if command == "export" else []
    for folder in (tmp_path, tmp_path / "none"):
        said = refused(command, folder, *words)
        assert said.startswith(f"RunError: {folder}")


def test_a_resumed_run_whose_recipe_was_edited_names_the_key(refused: Refused, done: Path) -> None:
    path = done / "recipe.toml"
    path.write_text(path.read_text("utf-8").replace("lr = 0.01", "lr = 0.02"), "utf-8")
    said = refused("resume", done)
    assert said.startswith(f"RunError: {done}/recipe.toml was edited after the run began (train.lr)")
    assert "undo that to resume" in said


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_state_is_refused_by_name_and_kept(refused: Refused, done: Path, share: float) -> None:
    (done / "results.json").unlink()
    path = done / "state.safetensors"
    content = path.read_bytes()[: int(share * path.stat().st_size)]
    path.write_bytes(content)
    for command in ("resume", "eval"):
        assert refused(command, done).startswith(f"RunError: {path} is not a whole state of a run")
    assert path.read_bytes() == content


def test_a_foreign_state_is_refused_by_name(refused: Refused, done: Path) -> None:
    (done / "results.json").unlink()
    path = done / "state.safetensors"
    save_file({"weight": torch.ones(2)}, path)
    for command in ("resume", "eval"):
        assert refused(command, done).startswith(f"RunError: {path} is not a whole state of a run")


def test_a_state_of_another_model_is_refused_with_both_shapes(refused: Refused, done: Path) -> None:
    (done / "results.json").unlink()
    path = done / "state.safetensors"
    state = Payload.decode(path.read_bytes())
    scalars = {name: value for name, value in state.scalars.items() if name != SEAL}
    path.write_bytes(seal({name: t[:1] for name, t in state.tensors.items()}, scalars))
    for command in ("resume", "eval"):
        assert refused(command, done).startswith("ModelError: model.layers.0")


def test_an_edit_of_run_json_is_answered(refused: Refused, done: Path) -> None:
    (done / "run.json").write_text("{", "utf-8")
    assert refused("resume", done).startswith(f"RunError: {done}/run.json is not JSON")


def test_a_real_process_ends_with_status_1_and_one_sentence(recipe: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-m", "kilofed", "run", recipe, "data=nobody/nothing", "--out", tmp_path / "run"],
        capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300, check=False,
    )  # fmt: skip
    assert ended.returncode == 1
    assert message(ended.stdout, ended.stderr).startswith("DataError: nobody/nothing is not an embedded source")


@pytest.mark.parametrize(("kind", "number"), [("recipe", 150), ("file", 60)])
def test_drawn_bad_input_is_refused_in_a_sentence(kind: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of benchmarks/robustness/inputs.py, which draws 120,000."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks" / "robustness")
    inputs = importlib.import_module("inputs")
    kept: dict[str, object] = {}
    said = [inputs.outcome(kind, case, 1, kept) for case in range(number)]
    assert [text for name, text in said if name == "WRONG"] == []
    assert 5 < sum(name == "taken" for name, _ in said) < number / 2  # Neither all sound nor all refused at the door.
