"""Every shipped recipe loads, and one round of it runs on a tiny model and tiny data."""

from pathlib import Path

import pytest

import kilofed
from kilofed.config.tables import from_table, load, shipped, to_table
from kilofed.federation.method import load_method
from kilofed.reports import report


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_recipe_loads_and_says_what_it_is_for(name: str) -> None:
    recipe = load(name)
    assert recipe.name == name
    assert recipe.about
    load_method(recipe.method)
    assert from_table(to_table(recipe)) == recipe


@pytest.mark.parametrize("name", shipped())
def test_one_round_of_a_shipped_recipe_runs(
    name: str, tiny_model: Path, tiny_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "write", lambda folder: folder)
    small = {
        "model": str(tiny_model),
        "data": str(tiny_rows),
        "data.max_length": 48,
        "rounds": 1,
        "cohort": 0,
        "train.epochs": 0,
        "train.steps": 1,
        "train.batch_size": 2,
        "evaluate.baselines": [],
        "evaluate.generate": 0,
    }
    if load(name).data.task == "classify":
        small |= {"data.columns.text": "instruction", "data.columns.label": "client", "data.partition.min_rows": 1}
    if load(name).method.name == "fedpt":
        small |= {"method.large": str(tiny_model), "data.public_share": 0.2}
    done = kilofed.run(name, small, out=tmp_path / "run")
    assert done.rows["federated"].loss > 0
