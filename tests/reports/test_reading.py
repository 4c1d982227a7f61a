"""A run folder is read to the row, and a broken line is named by its number."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from kilofed.errors import RunError
from kilofed.federation.ledger import Ledger, Row
from kilofed.reports.reading import measure, merge, read

ROWS = [
    Row(1, 0, "fit", "mean", "down", 0, 100, 0.0),
    Row(1, 0, "fit", "mean", "down", 7, 100, 0.0),
    Row(1, 0, "fit", "mean", "up", 7, 30, 0.5),
    Row(1, 1, "ask", "call", "up", 0, 9, 0.5),
    Row(2, 0, "fit", "mean", "down", 0, 101, 0.0),
    Row(2, 1, "fit", "mean", "down", 0, 50, 0.0),
    Row(2, 1, "fit", "mean", "up", 0, 31, 0.5),
]


def make(folder: Path, rows: list[Row] = ROWS) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text("{}", "utf-8")
    (folder / "ledger.jsonl").write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), "utf-8")
    return folder


def test_sums_equal_those_of_the_ledger(tmp_path: Path) -> None:
    traffic = read(make(tmp_path)).traffic
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for way in ("down", "up"):
        assert traffic.total(way) == ledger.total(way)
        assert {client: traffic.by_client[client, way] for client in (0, 7)} == ledger.per_client(way)
    assert traffic.num_exchanges.total() == ledger.num_exchanges == 4
    ledger.close()


def test_spans_are_per_client_and_round() -> None:
    spans = measure(ROWS).spans
    assert spans["fit", "down"] == (100, 151), "client 0 gets 101 + 50 in round 2"
    assert spans["fit", "up"] == (30, 31)
    assert spans["fit", "exchanges"] == (1, 2)
    assert spans["ask", "exchanges"] == (1, 1)


def test_merged_sums_are_those_of_all_parts() -> None:
    whole = merge([measure(ROWS), measure(ROWS[:3]), measure([])])
    assert (whole.total("down"), whole.total("up")) == (351 + 200, 70 + 30)
    assert whole.num_exchanges.total() == 5
    assert whole.spans == measure(ROWS).spans
    assert whole.num_messages["fit", "mean", "up"] == 3


def test_repeats_come_in_the_order_of_their_seeds(tmp_path: Path) -> None:
    make(tmp_path, [])
    for seed in (10, 9, 0):
        make(tmp_path / f"seed-{seed}")
    reading = read(tmp_path)
    assert [seed.folder.name for seed in reading.seeds] == ["seed-0", "seed-9", "seed-10"]
    assert reading.traffic.total("up") == 3 * 70


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    make(tmp_path)
    with (tmp_path / "ledger.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"round": 4, "exch')
    with pytest.raises(RunError, match=r"ledger\.jsonl line 8 is not a ledger row .*resume the run to mend it"):
        read(tmp_path)
    (tmp_path / "ledger.jsonl").write_text('{"round": 4, "bites": 3}\n', "utf-8")
    with pytest.raises(RunError, match=r"ledger\.jsonl line 1 is not a ledger row .*bites"):
        read(tmp_path)
    (tmp_path / "ledger.jsonl").unlink()
    (tmp_path / "metrics.jsonl").write_text('{"round": 0}\n{"loss": 3}\n', "utf-8")
    with pytest.raises(RunError, match=r"metrics\.jsonl line 2 is not a round's metrics"):
        read(tmp_path)


@pytest.mark.parametrize(("text", "said"), [("[]", "has another content than expected"), ("{", "is not JSON")])
def test_a_broken_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    (make(tmp_path) / "results.json").write_text(text, "utf-8")
    with pytest.raises(RunError, match=rf"results\.json {said}"):
        read(tmp_path)


def test_a_folder_that_is_no_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"is not a run folder \(it has no run\.json\)"):
        read(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_copy_of_the_recipe_that_is_no_text_is_named(tmp_path: Path) -> None:
    make(tmp_path)
    assert read(tmp_path).recipe_text == ""
    (tmp_path / "recipe.toml").write_bytes(b"name = '\xa0'")
    with pytest.raises(RunError, match=r"recipe\.toml cannot be read .*: delete it"):
        read(tmp_path)
