"""Entries differ in their method and in nothing that would make them incomparable; the page says what each costs."""

import json
from pathlib import Path

import pytest

from kilofed.cli import main
from kilofed.config.fields import Value
from kilofed.config.tables import to_toml
from kilofed.errors import RecipeError, RunError
from kilofed.reports import plots
from kilofed.runs import compare


@pytest.fixture
def source(tiny_recipe, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(to_toml(tiny_recipe), "utf-8")
    return path


def test_entries_share_model_rows_evaluation_and_budget_and_keep_their_own_method(source: Path) -> None:
    chosen, common = compare.entries("fedavg,full=fedavg,fedkseed", {"rounds": 1, "full:adapter.kind": "full"})
    found = compare.recipes(source, chosen, common, 2)
    assert [one.method.name for one in found.values()] == ["fedavg", "fedavg", "fedkseed"]
    for key in ("model", "data", "train", "rounds", "seed", "seeds"):
        assert len({str(getattr(one, key)) for one in found.values()}) == 1
    assert found["fedavg"].adapter.kind == "lora"
    assert found["full"].adapter.kind == found["fedkseed"].adapter.kind == "full"  # The latter as its recipe has it.
    assert found["fedkseed"].method.fields["lr"] == 5e-4
    own = compare.recipes(source, *compare.entries("fedavg,kd", {"kd:train.lr": 0.5}), 1)
    assert [one.train.lr for one in own.values()] == [0.01, 0.5]  # A budget is shared, a learning rate is not.
    assert [bool(one.evaluate.baselines) for one in found.values()] == [True, False, False]


def test_public_rows_that_one_needs_are_set_aside_for_all(source: Path) -> None:
    chosen, common = compare.entries("fedavg,kd", {})
    found = compare.recipes(source, chosen, common, 1)
    assert found["fedavg"].data == found["kd"].data
    assert found["fedavg"].data.public or found["fedavg"].data.public_share


@pytest.mark.parametrize(
    ("names", "words", "said"),
    [
        ("fedavg,fedavg", {}, "none twice"),
        ("", {}, "none twice"),
        ("fedavg", {"fedvag:adapter.kind": "full"}, r"'fedvag', which is not compared \(did you mean fedavg"),
        ("fedavg", {"fedavg:data.max_rows": 3}, "would give fedavg another data"),
        ("fedavg", {"fedavg:train.steps": 3}, "would give fedavg another train"),
        ("fedavg,split", {"method.cut": 2}, "say whose, as in fedavg:method.cut"),
    ],
)
def test_what_cannot_be_compared_is_refused(names: str, words: dict[str, Value], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        compare.entries(names, words)


def test_the_front_holds_what_none_beats_in_both() -> None:
    points = {"a": (1.0, 5.0), "b": (2.0, 4.0), "c": (3.0, 4.5), "d": (9.0, 1.0), "e": (1.0, 6.0)}
    assert plots.pareto(points) == ["a", "b", "d"]


@pytest.mark.slow
def test_a_comparison_runs_goes_on_and_refuses_another_one_in_its_folder(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", str(source), "--methods", "fedavg,kd", "--out", str(tmp_path / "out"), "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["label"]: row for row in found["rows"]}
    assert rows["fedavg"]["secure_sum"]
    assert rows["kd"]["leaves"] == "logits on public rows"
    assert all(row["loss"] > 0 and row["up"] > 0 and row["client_flops"] > 0 for row in rows.values())
    assert set(found["baselines"]) == {"base", "local", "centralized"}
    page = (tmp_path / "out" / "compare.html").read_text("utf-8")
    assert page.count("<svg viewBox") > 3
    assert "http" not in page.replace("http://www.w3.org", "")
    before = (tmp_path / "out" / "kd" / "results.json").stat().st_mtime_ns
    assert main(words) == 0  # Nothing is run again.
    assert (tmp_path / "out" / "kd" / "results.json").stat().st_mtime_ns == before
    assert main([*words, "train.lr=0.1"]) == 1
    assert "holds a run of another recipe" in capsys.readouterr().err


def test_another_run_in_the_folder_is_left_alone(source: Path, tmp_path: Path) -> None:
    chosen, common = compare.entries("fedavg", {})
    (tmp_path / "out" / "fedavg").mkdir(parents=True)
    (tmp_path / "out" / "fedavg" / "run.json").write_text(json.dumps({"recipe": {"name": "mine"}}))
    with pytest.raises(RunError, match="another recipe"):
        compare.compare(source, chosen, common, out=tmp_path / "out")
