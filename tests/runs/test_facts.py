"""What run.json says before the first round is what the rows, the model and the ledger then show."""

import json
from dataclasses import replace
from pathlib import Path

import kilofed
from kilofed.config.recipe import Recipe
from kilofed.config.tables import changed
from kilofed.federation import ledger

COUNTS = {"north": 3, "south": 10, "east": 41}


def test_the_facts_of_an_unequal_run_are_what_its_ledger_shows(tiny_recipe: Recipe, tmp_path: Path) -> None:
    rows = [
        {"site": site, "instruction": f"add {number}", "response": f"is {number % 7}"}
        for site, count in COUNTS.items()
        for number in range(count)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    recipe = changed(tiny_recipe, {"data.source": str(path), "data.partition.column": "site", "data.holdout": 0.2})
    recipe = replace(recipe, rounds=2, evaluate=replace(recipe.evaluate, generate=0))
    done = kilofed.run(recipe, out=tmp_path / "run")
    facts = json.loads((done.folder / "run.json").read_text("utf-8"))
    assert {one["name"]: one["train_rows"] + one["test_rows"] for one in facts["clients"]} == COUNTS
    assert [one["id"] for one in facts["clients"]] == [0, 1, 2]
    assert 0 < facts["num_trained"] < facts["num_parameters"]
    (fit,) = facts["forecast"]
    sent = [row for row in ledger.read(done.folder / "ledger.jsonl") if row.action == fit["action"] == "fit"]
    assert {row.round for row in sent} == {1, 2}
    for direction in ("down", "up"):
        sizes = {row.bytes for row in sent if row.direction == direction}
        assert fit[direction] == [min(sizes), max(sizes)]
    assert fit["exchanges"] == [1, 1]
