"""results.json: read as it was written, described by the schema in the docs, and refused where it is another's."""

import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from tests.made_results import MADE, client, made, row

import kilofed
from kilofed.config.recipe import Recipe
from kilofed.config.tables import changed
from kilofed.errors import RunError
from kilofed.records import codec, results
from kilofed.records.results import Chart, Costs, PartyCost, PrivacySpent, Results, SeedRows

SCHEMA = Path(__file__).parents[2] / "docs" / "results.schema.json"
COST = PartyCost(1e9, 0.5, 1.5, 1_000)
FULL = made(
    costs=Costs(COST, replace(COST, flops=0.0)),
    privacy=PrivacySpent("central", 3.2, 1e-5, 6),
    per_seed=(SeedRows(0, {"federated": row(3.0, clients=(client(2, 3.0),))}), SeedRows(1, {})),
    charts=(Chart("t", "w", "x", "y", {"a": ((0.0, 1.0), (2.0, 3.0)), "empty": ()}),),
)


def validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text("utf-8")))


@pytest.mark.parametrize("whole", [MADE, FULL])
def test_results_come_back_as_they_were_written(whole: Results) -> None:
    text = json.dumps(whole.to_json())
    assert Results.from_json(text) == whole
    assert json.loads(text).keys() == vars(whole).keys()
    validator().validate(json.loads(text))


def test_the_schema_in_the_docs_is_that_of_the_dataclasses() -> None:
    assert json.loads(SCHEMA.read_text("utf-8")) == codec.schema(Results), "run scripts/write_schema.py"


def test_a_run_writes_what_the_schema_says(tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = changed(tiny_recipe, {"rounds": 1, "seeds": 2, "evaluate.costs": True, "evaluate.generate": 1})
    done = kilofed.run(recipe, out=tmp_path / "run")
    for path in (done.folder, done.folder / f"seed-{recipe.seed}"):
        validator().validate(json.loads((path / "results.json").read_text("utf-8")))
    assert results.read(done.folder) == done.results
    assert done.results.per_seed[0].rows["federated"].clients
    assert done.results.costs
    assert done.results.costs.client.flops > 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"verdict": None}, "has another verdict than expected"),
        ({"more": 1}, "has the key more, which is none of its own"),
        ({"bytes": {"up": 1.0}}, r"lacks bytes\.down"),
    ],
)
def test_a_file_of_another_version_is_refused_in_one_sentence(
    tmp_path: Path, change: dict[str, object], said: str
) -> None:
    (tmp_path / "results.json").write_text(json.dumps({**MADE.to_json(), **change}), "utf-8")
    with pytest.raises(RunError, match=rf"results\.json {said}.*; run its recipe again$"):
        results.read(tmp_path)


def test_an_unfinished_run_has_none(tmp_path: Path) -> None:
    assert results.read(tmp_path) is None


def test_the_usual_rows_come_first_and_by_their_titles() -> None:
    rows = {name: row(1.0) for name in ("large base", "centralized", "local", "federated", "base")}
    assert list(results.in_order(rows)) == ["base", "local-only", "federated", "centralized", "large base"]
