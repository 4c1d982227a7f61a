"""What a preflight looks at: a sample over all clients, rendered as asked, and what fits into memory."""

import pytest
from tests.conftest import SIZES, uneven_rows
from tests.findings import asked

from kilofed.config.recipe import Recipe
from kilofed.config.tables import changed
from kilofed.costs import environment
from kilofed.runs import look as module
from kilofed.runs.look import Look, some


@pytest.fixture
def uneven(tiny_recipe: Recipe, rows) -> Recipe:
    """Three clients of 3, 10 and 41 rows."""
    return changed(tiny_recipe, {"data.source": rows(uneven_rows(asked)), "data.max_length": 10})


def test_the_sample_has_rows_of_every_client_and_is_bounded(uneven: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLE", 12)
    sample = Look(uneven).sample
    assert [sum(row["client"] == name for row in sample) for name in SIZES] == [2, 4, 4]


def test_whole_examples_are_not_cut(uneven: Recipe) -> None:
    look = Look(uneven)
    assert max(len(example.input_ids) for example in look.examples(uneven.data)) == 10
    assert max(len(example.input_ids) for example in look.whole) > 10


def test_what_needs_more_than_is_free_does_not_fit(uneven: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    look = Look(uneven)
    assert look.needed
    assert look.fits
    monkeypatch.setattr(environment, "free_memory", lambda _: look.needed - 1)
    assert not Look(uneven).fits


def test_a_long_list_of_names_is_cut_to_five() -> None:
    assert some(["a", "b"]) == "a, b"
    assert some(list("abcdefg")) == "a, b, c, d, e and 2 more"
