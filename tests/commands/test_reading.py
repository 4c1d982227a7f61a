"""ls and show: every method, recipe, source and run, and every field with its text."""

import json
import shutil
from pathlib import Path

import pytest

from kilofed.cli import main
from kilofed.config.tables import shipped
from kilofed.federation.method import method_names


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
    assert set(fields) == {"mu", "client_weighting", "wire"}
    assert fields["mu"]["default"] == 0.01
    assert fields["mu"]["text"].startswith("Strength of the pull")
    assert main(["show", "train"]) == 0
    assert "lr = 0.001  (a number, at least 0)\n    Peak learning rate." in capsys.readouterr().out
    assert main(["show", "tiny"]) == 0
    assert 'source = "pydocs"' in capsys.readouterr().out
