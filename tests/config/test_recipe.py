"""The recipe's tables: every field is explained, and settings that hang together are checked together."""

import typing
from dataclasses import is_dataclass

import pytest

from kilofed.config.fields import describe
from kilofed.config.recipe import Recipe
from kilofed.config.tables import load
from kilofed.errors import RecipeError


def test_a_quorum_above_the_cohort_is_refused() -> None:
    with pytest.raises(RecipeError, match="quorum is 4 but only 3 clients are drawn per round"):
        load("tiny", {"cohort": 3, "quorum": 4})


@pytest.mark.parametrize("cls", [h for h in typing.get_type_hints(Recipe).values() if is_dataclass(h)])
def test_every_field_of_a_table_has_a_text(cls: type) -> None:
    if cls.__name__ == "ColumnsSpec":
        return
    speechless = {one.name for one in describe(cls) if not one.text and not is_dataclass(one.default)}
    assert speechless <= {"fields"}


def test_a_quorum_of_the_whole_cohort_is_a_recipe() -> None:
    assert load("tiny", {"cohort": 3, "quorum": 3}).quorum == 3
