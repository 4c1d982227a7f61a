"""Every part of the preflight is looked at, once, and nothing is written."""

import json
from pathlib import Path

import pytest
import tomli_w

from kilofed.cli import main
from kilofed.config.fields import Value
from kilofed.config.recipe import Recipe
from kilofed.config.tables import changed
from kilofed.runs import check as module
from kilofed.runs.check import check


def test_a_sound_recipe_has_only_good_findings_one_of_each(tiny_recipe: Recipe) -> None:
    findings = check(tiny_recipe)
    assert {finding.level for finding in findings} == {"good"}
    # FedAvg has nothing of its own to say, and its clients all have the recipe's model.
    expected = {*module.PARTS, "columns"} - {"method", "models"}
    assert {finding.name for finding in findings} | {"columns"} == expected


def test_a_method_says_what_it_expects_of_the_rows(tiny_recipe: Recipe, tiny_large: Path) -> None:
    words: dict[str, Value] = {"method": "fedpt", "method.large": str(tiny_large), "data.public_share": 0.2}
    (said,) = [one for one in check(changed(tiny_recipe, words)) if one.name == "method"]
    assert "held-out loss: steered large" in said.text
    assert said.level == ("warn" if "NOT likely" in said.text or "adds nothing" in said.text else "good")


def test_every_finding_is_one_line_of_its_own(tiny_recipe: Recipe) -> None:
    texts = [finding.text for finding in check(changed(tiny_recipe, {"adapter.targets": ["nothing"]}))]
    assert len(set(texts)) == len(texts)
    assert all(text and "\n" not in text for text in texts)


def test_nothing_is_written_and_nothing_is_printed(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    check(tiny_recipe)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_several_faults_are_all_found_at_once_and_each_once(tiny_recipe: Recipe) -> None:
    wrong: dict[str, Value] = {
        "method.name": "fedavgg", "privacy.kind": "central", "privacy.noise_key": "x", "model.device": "abacus",
        "data.template": "alpca", "adapter.targets": ["nothing"], "cohort": 9,
    }  # fmt: skip
    bad = [finding.text for finding in check(changed(tiny_recipe, wrong)) if finding.level == "bad"]
    for said in ("fedavgg", "noise_key", "abacus", "cohort is 9"):
        assert sum(said in text for text in bad) == 1, said


@pytest.mark.parametrize(("key", "value"), [("data.source", "./no.jsonl"), ("model.path", "./no-model")])
def test_what_is_missing_is_one_bad_finding(tiny_recipe: Recipe, key: str, value: str) -> None:
    bad = [finding.text for finding in check(changed(tiny_recipe, {key: value})) if finding.level == "bad"]
    assert len(bad) == 1
    assert value in bad[0]


@pytest.mark.parametrize(("key", "value"), [("cohort", 5), ("quorum", 5)])
def test_more_clients_per_round_than_there_are_is_bad(tiny_recipe: Recipe, key: str, value: int) -> None:
    bad = [finding.text for finding in check(changed(tiny_recipe, {key: value})) if finding.level == "bad"]
    assert len(bad) == 1
    assert f"{key} is 5, but there are 4 clients" in bad[0]


def test_the_command_says_each_finding_and_fails_when_one_is_bad(
    tiny_table: dict[str, Value], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(tiny_table), "utf-8")
    assert main(["check", str(path)]) == 0
    good = capsys.readouterr()
    assert all(line.startswith("good  ") for line in good.out.splitlines())
    assert main(["check", str(path), "cohort=7", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in found if one["level"] == "bad"] == ["clients"]
