"""Commands that run recipes: what goes to stdout and stderr, and how a stopped run continues."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kilofed.cli import main

Words = Callable[..., list[str]]


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

        patch.setattr("kilofed.commands.progress.Progress.round", stop)
        assert main(words("run", "--out", str(tmp_path / "run"))) == 130
    out, err = capsys.readouterr()
    assert not out
    assert err.endswith(f"stopped. Finished rounds are saved: kilofed resume {tmp_path}/run\n")
    assert main(["resume", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["exchanges"] == 2
