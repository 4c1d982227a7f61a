"""What a recipe cannot hold is refused by its name, in one sentence."""

import math
from datetime import date

import pytest

from kilofed.config import values
from kilofed.config.tables import from_table, load, parse_words
from kilofed.errors import RecipeError


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rounds = \n", r"mine\.toml is not valid TOML: .*line 1"),
        (f"rounds = {'9' * 5000}", r"mine\.toml has a number that cannot be read \(Exceeds the limit \(4300 digits\)"),
        (f"rounds = 0x{'f' * 5000}", r"rounds in mine\.toml is a whole number of 20,000 bits; expected a smaller one"),
        (f"x = {'[' * 5000}{']' * 5000}", r"mine\.toml has lists or tables more than 32 deep"),
        (
            f"x = {'[' * 40}{']' * 40}",
            r"^x in mine\.toml(\[0\])+ has lists or tables more than 32 deep; expected flat",
        ),
        ("begun = 1979-05-27", r"begun in mine\.toml is a date or time, 1979-05-27; recipes have none: put quotes"),
        ("[data.options]\nat = [1979-05-27T07:32:00Z]", r"data in mine\.toml\.options\.at\[0\] is a date or time"),
        ("[data.options]\nat = 07:32:00", r"is a date or time, 07:32:00; recipes have none"),
    ],
)
def test_text_that_no_recipe_has_is_refused(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        values.parse(text, "mine.toml")


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"rounds": None}, "rounds in the recipe is of type NoneType; expected text, a number"),
        ({"name": "\ud800"}, r"name in the recipe is '\\ud800', which is not UTF-8 text at character 0"),
        ({"\ud800": 1}, r"a key of the recipe is '\\ud800', which is not UTF-8 text"),
        ({"data": {"options": {"x": [date(1979, 5, 27)]}}}, r"data in the recipe\.options\.x\[0\] is a date or time"),
        ({"data": {"options": {"x": {1: 2}}}}, "has the key 1; expected text"),
        ({"data": {"options": {"x": b"bytes"}}}, "is of type bytes; expected"),
    ],
)
def test_a_table_made_in_python_is_held_to_the_same(table: dict, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        from_table(table)


def test_what_a_recipe_can_say_passes() -> None:
    deep: object = 1
    for _ in range(values.DEEPEST - 1):
        deep = [deep]
    found = {"a": deep, "b": {"c": math.inf, "d": True, "e": "ü"}, "f": 10**400, "g": math.nan}
    values.refuse_strange(found, "here")


@pytest.mark.parametrize("word", ["name=1979-05-27", "name=07:32:00", "name=a\nb", "name=1\nrounds = 2"])
def test_a_word_that_is_no_value_of_a_recipe_is_text(word: str) -> None:
    assert parse_words([word]) == {"name": word.partition("=")[2]}
    assert load("tiny", parse_words([word])).name == word.partition("=")[2]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (f"rounds={'9' * 5000}", "rounds has a number that cannot be read"),
        (f"rounds={'[' * 5000}", "rounds has lists or tables more than 32 deep"),
        (f"rounds={'9' * 4000}", r"rounds is a whole number of 13,288 bits"),
        ("a..b=1", "a is not a field of Recipe"),
        ("rounds.=1", "rounds takes a table"),
        (".rounds=1", " is not a field of Recipe"),
        ("data=[{a=1979-05-27}]", r"data\[0\].a is a date"),
        ("name=\udcff", "is not UTF-8 text"),
        ("\udcff=1", "is not UTF-8 text"),
        ("rounds=1e400", "rounds is Infinity; expected a whole number"),
        ("train.steps=" + "9" * 400, None),
        ("train=3", "train.steps"),
        ("method=[1]", r"method.name is \[1\]; expected text"),
    ],
)
def test_a_word_that_cannot_be_taken_is_refused_by_its_key(word: str, said: str | None) -> None:
    if said is None or word == "train=3":
        load("tiny", parse_words([word]))  # A table given as one word sets its first field.
        return
    with pytest.raises(RecipeError, match=said):
        load("tiny", parse_words([word]))


@pytest.mark.parametrize("source", ["a\0.toml", "x" * 5000 + ".toml", "\udcff.toml", "\udcff", "", "x" * 5000])
def test_a_source_that_no_file_can_have_is_refused(source: str) -> None:
    with pytest.raises(RecipeError) as refused:
        load(source)
    assert len(str(refused.value)) < 2000
    str(refused.value).encode()
