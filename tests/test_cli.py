"""The command line: what goes to stdout, what to stderr, and exit statuses."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from kilofed.cli import main
from kilofed.config.tables import shipped
from kilofed.federation.method import method_names
from kilofed.models import loading
from kilofed.reports import report
from kilofed.runs.restore import delivered

IDS = torch.arange(3, 23).reshape(2, 10)
Words = Callable[..., list[str]]


@pytest.fixture(scope="module")
def words(tiny_model: Path, tiny_rows: Path) -> Words:
    """`words("run", "rounds=1")`: a command on tiny things."""
    small = {
        "model": tiny_model,
        "data": tiny_rows,
        "data.max_length": 48,
        "data.holdout": 0.2,
        "rounds": 2,
        "adapter.rank": 2,
        "train.steps": 1,
        "train.lr": 0.05,
        "evaluate.generate": 0,
        "evaluate.controls": '["base"]',
    }
    return lambda command, *more: [command, "tiny", *(f"{key}={value}" for key, value in small.items()), *more]


@pytest.fixture(scope="module")
def folder(words: Words, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("cli") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write", lambda folder: folder / "report.html")
        assert main(words("run", "--out", str(out))) == 0
    return out


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "write", lambda folder: folder / "report.html")


def logits(model: object) -> torch.Tensor:
    with torch.inference_mode():
        return torch.as_tensor(model(input_ids=IDS).logits)  # type: ignore[operator]


def test_run_json_prints_one_object(words: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words("run", "--json", "--out", str(tmp_path / "run"))) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert set(found["rows"]) == {"base", "federated"}
    assert {"loss", "interval", "accuracy", "perplexity"} <= set(found["rows"]["federated"])
    assert found["bytes"]["up"] > 0
    assert found["bytes"]["down"] > 0
    assert found["run"] == str(tmp_path / "run")
    assert len(found["state_sha256"]) == 64
    assert {"exchanges", "seconds", "peak_memory_bytes"} <= set(found)
    assert "round 1/2" in err
    assert "round 2/2" in err


def test_run_prints_a_table_and_where_the_report_is(
    words: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words("run", "rounds=1", "--out", str(tmp_path / "run"))) == 0
    out, err = capsys.readouterr()
    assert "federated" in out
    assert "base" in out
    assert f"report: {tmp_path}/run/report.html" in out
    assert f"run folder: {tmp_path}/run" in err


def test_resume_prints_the_results_of_a_finished_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resume", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((folder / "results.json").read_text("utf-8"))


def test_ctrl_c_says_how_to_resume(
    words: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr("kilofed.cli._Progress.round", stop)
        assert main(words("run", "--out", str(tmp_path / "run"))) == 130
    out, err = capsys.readouterr()
    assert not out
    assert err.endswith(f"stopped. What was finished is safe: kilofed resume {tmp_path}/run\n")
    assert main(["resume", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["exchanges"] == 2


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["run", "tiny", "ruonds=3"], "RecipeError: ruonds is not a field of Recipe (did you mean rounds?)\n"),
        (["run", "tinny"], "RecipeError: tinny is neither a shipped recipe nor a .toml file (did you mean tiny?)\n"),
        (["run", "tiny", "full"], "RecipeError: 2 recipes are named (tiny, full); expected one, then key=value\n"),
        (["resume", "nowhere"], "RunError: nowhere is not a run folder (no readable run.json and recipe.toml)"),
        (["show", "fedagv"], "RecipeError: fedagv is no method, recipe or table of a recipe (did you mean fedavg?)\n"),
        (["export", "nowhere"], "RunError: say what to export: --merged DIR or --adapter DIR\n"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_a_refusal_is_one_sentence_on_stderr(
    command: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith(message)


@pytest.mark.parametrize(
    "command",
    [
        ["run", "tiny", "--json", "ruonds=3"],
        ["run", "--out", "there", "tiny", "ruonds=3"],
        ["run", "tiny", "--out", "there", "ruonds=3", "--json"],
        ["check", "tiny", "--json", "ruonds=3"],
    ],
    ids=" ".join,
)
def test_options_may_stand_between_the_words(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 1
    assert "ruonds is not a field" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["ls", "--jsno"], ["resume", "run", "more"], ["run", "tiny", "--ot", "x"]])
def test_what_a_command_does_not_take_is_refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for command in ("run", "resume", "check", "ls", "show", "eval", "report", "export", "chat", "serve"):
        assert f"\n    {command} " in text


def test_ls_lists_methods_recipes_data_and_runs(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "runs" / "done-1")
    shutil.copytree(folder, tmp_path / "runs" / "half-1")
    (tmp_path / "runs" / "half-1" / "results.json").unlink()
    assert main(["ls", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["methods", "recipes", "data", "runs"]
    assert sorted(found["methods"]) == method_names()
    assert sorted(found["recipes"]) == sorted(shipped())
    assert {"pydocs", "gazetteer"} <= set(found["data"])
    assert found["runs"]["runs/done-1"].startswith("finished, held-out loss ")
    assert found["runs"]["runs/half-1"] == "not finished: kilofed resume runs/half-1"
    assert all(text for kind in found.values() for text in kind.values())


def test_ls_of_one_kind_prints_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", "methods"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == method_names()


def test_show_explains_fields_with_types_defaults_and_texts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "fedprox", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "method"
    assert found["text"].startswith("FedProx: ")
    fields = {field["name"]: field for field in found["fields"]}
    assert set(fields) == {"mu", "weights", "wire"}
    assert fields["mu"]["default"] == 0.01
    assert fields["mu"]["text"].startswith("Strength of the pull")
    assert main(["show", "train"]) == 0
    assert "lr = 0.001  (a number, at least 0)\n    Peak learning rate." in capsys.readouterr().out
    assert main(["show", "tiny"]) == 0
    assert 'source = "pydocs"' in capsys.readouterr().out


def test_eval_scores_a_run_on_other_rows(folder: Path, tiny_rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((folder / "results.json").read_text("utf-8"))["rows"]["federated"]
    assert main(["eval", str(folder), "--json", f"data.test={tiny_rows}"]) == 0
    other = json.loads(capsys.readouterr().out)
    assert other["loss"] != found["loss"]
    assert sum(c["num_tokens"] for c in other["clients"]) > sum(c["num_tokens"] for c in found["clients"])


def test_an_exported_adapter_loads_with_peft(
    folder: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(folder), "--adapter", str(tmp_path / "adapter")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/adapter\n"
    with loading.quiet():
        base = AutoModelForCausalLM.from_pretrained(tiny_model)
        tuned = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    assert torch.equal(logits(tuned), logits(delivered(folder)[0]))


def test_an_exported_model_loads_with_plain_transformers(
    folder: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(folder), "--merged", str(tmp_path / "merged")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/merged\n"
    with loading.quiet():
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        base = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    torch.testing.assert_close(logits(plain), logits(delivered(folder)[0]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(plain), logits(base), rtol=1e-4, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").encode("a") == [
        *AutoTokenizer.from_pretrained(tiny_model).encode("a")
    ]


def test_export_refuses_to_overwrite_and_to_give_half_a_result(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(folder), "--adapter", str(tmp_path)]) == 1
    assert "already exists; choose another folder" in capsys.readouterr().err
    half = tmp_path / "half"
    shutil.copytree(folder, half)
    (half / "results.json").unlink()
    assert main(["export", str(half), "--adapter", str(tmp_path / "adapter")]) == 1
    assert "has no adapter yet: finish it with `kilofed resume" in capsys.readouterr().err


def test_chat_answers_piped_lines_until_an_empty_one(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("add 1 and 2\nadd 3 and 3\n\nnever asked\n"))
    assert main(["chat", str(folder), "--max-new-tokens", "5"]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") >= 2
    assert ">" not in err
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["chat", str(folder)]) == 0
    assert capsys.readouterr().out == ""
