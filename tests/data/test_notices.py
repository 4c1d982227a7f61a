"""What is skipped while rows are read is told to whoever asks, and to the log of a run otherwise."""

import json
from pathlib import Path

import pytest
from tests.conftest import byte_tokenizer, uneven_rows

from kilofed.config.recipe import Recipe
from kilofed.config.tables import changed
from kilofed.data.corpus import Corpus
from kilofed.data.notices import Warn, log_warning


@pytest.fixture
def recipe(tiny_recipe: Recipe, tmp_path: Path) -> Recipe:
    """Clients of 3, 10 and 41 rows; a column that nothing uses, a client without held-out rows, rows without answer."""
    rows = uneven_rows(lambda n: {"instruction": f"say {n}", "response": "" if n % 5 == 4 else "yes", "note": "x"})
    held_out = [row for row in rows if row["client"] != "few"][:6]
    for name, some in (("train", rows), ("test", held_out)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), "utf-8")
    return changed(
        tiny_recipe, {"data.source": str(tmp_path / "train.jsonl"), "data.test": str(tmp_path / "test.jsonl")}
    )


def read_all(recipe: Recipe, warn: Warn) -> None:
    corpus = Corpus(recipe, lambda _: byte_tokenizer(), warn=warn)
    corpus.tokenize()


def test_every_stage_of_reading_tells_whoever_is_told(recipe: Recipe, caplog: pytest.LogCaptureFixture) -> None:
    told: list[str] = []
    read_all(recipe, told.append)
    starts = (
        "unused columns: note",
        "clients without held-out rows are trained but not evaluated: few",
        "8 of 41 rows have no answer",
    )
    assert [text[: len(start)] for text, start in zip(told, starts, strict=True)] == list(starts)
    assert not caplog.records


def test_a_run_tells_its_log(recipe: Recipe, caplog: pytest.LogCaptureFixture) -> None:
    told: list[str] = []
    read_all(recipe, told.append)
    read_all(recipe, log_warning)
    assert [record.getMessage() for record in caplog.records] == told
    assert {record.levelname for record in caplog.records} == {"WARNING"}
