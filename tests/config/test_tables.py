"""Recipes: TOML and words to frozen dataclasses and back; what does not fit is refused with the nearest name."""

import math
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kilofed.config.bounds import bounds_of
from kilofed.config.fields import Value, warn_once
from kilofed.config.recipe import Recipe
from kilofed.config.tables import changed, from_table, lay_over, load, parse_words, shipped, text_of, to_table, to_toml
from kilofed.errors import RecipeError
from kilofed.federation.method import load_method

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12)
VALUE = st.recursive(
    TEXT | st.integers(-(2**63), 2**63 - 1) | st.booleans() | st.floats(allow_nan=False),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(TEXT, below, max_size=3),
    max_leaves=6,
)


def of_type(hint: object) -> st.SearchStrategy[object]:
    """Values that a field of type `hint` takes."""
    if is_dataclass(hint):
        assert isinstance(hint, type)
        return table_of(hint).map(lambda table: hint(**table))
    bounds = bounds_of(hint)
    bare = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
    args = typing.get_args(bare)
    origin = typing.get_origin(bare)
    if origin is typing.Literal:
        return st.sampled_from(args)
    if origin is tuple:
        return st.lists(of_type(args[0]), min_size=bounds.min_length, max_size=3).map(tuple)
    if origin is dict:
        return st.dictionaries(TEXT.filter(lambda key: key != "name"), VALUE, max_size=3)
    if bare in (int, float):
        others = [st.just(value) for value in bounds.others]
        return st.one_of(st.from_type(typing.cast(type, hint)).filter(bounds.allow), *others)
    return {str: TEXT, bool: st.booleans()}[typing.cast(type, bare)]


def table_of(cls: type) -> st.SearchStrategy[dict[str, object]]:
    special = {"cohort": st.just(0) | st.integers(8, 10**6), "quorum": st.integers(1, 8)}
    hints = typing.get_type_hints(cls, include_extras=True)
    return st.fixed_dictionaries({f.name: special.get(f.name, of_type(hints[f.name])) for f in fields(cls)})


RECIPES = table_of(Recipe).map(lambda table: Recipe(**table))  # type: ignore[arg-type]


@given(RECIPES)
@settings(max_examples=40, deadline=None)
def test_any_recipe_survives_toml(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_text(to_toml(recipe), "utf-8", newline="")
    assert load(path) == recipe


@given(RECIPES)
@settings(max_examples=20, deadline=None)
def test_any_recipe_survives_a_table(recipe: Recipe) -> None:
    assert from_table(to_table(recipe)) == recipe


@given(st.integers(1, 10**9), st.floats(0, 1e9), st.booleans())
def test_words_are_read_as_toml_values(rounds: int, rate: float, flag: bool) -> None:
    words = [f"rounds={rounds}", f"train.lr={rate}", f"x={str(flag).lower()}"]
    assert parse_words(words) == {"rounds": rounds, "train.lr": rate, "x": flag}


def test_a_word_that_is_no_toml_value_is_text() -> None:
    assert parse_words(["model=some/dir", "data=a=b.jsonl", "name="]) == {
        "model": "some/dir",
        "data": "a=b.jsonl",
        "name": "",
    }


@pytest.mark.parametrize("word", ["rounds", "=3"])
def test_a_word_without_key_or_value_is_refused(word: str) -> None:
    with pytest.raises(RecipeError, match=rf"'{word}' is not key=value, such as"):
        parse_words([word])


def test_overrides_lie_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('rounds = 3\nmodel = "one"\n[train]\nlr = 0.5\nsteps = 4\n', "utf-8")
    recipe = load(path, {"train.lr": 0.25, "model.dtype": "bfloat16", "data": "rows.jsonl", "method": "fedprox"})
    assert (recipe.rounds, recipe.train.lr, recipe.train.steps) == (3, 0.25, 4)
    assert (recipe.model.path, recipe.model.dtype) == ("one", "bfloat16")
    assert (recipe.data.source, recipe.method.name) == ("rows.jsonl", "fedprox")


def test_one_word_for_a_table_keeps_its_other_fields(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[model]\npath = "one"\ndtype = "bfloat16"\n[method]\nname = "fedprox"\nmu = 0.5\n', "utf-8")
    recipe = load(path, {"model": "two", "method.mu": 0.25})
    assert (recipe.model.path, recipe.model.dtype) == ("two", "bfloat16")
    assert recipe.method.fields == {"mu": 0.25}


def test_another_source_does_not_inherit_the_options_of_the_first(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[data]\nsource = "pydocs"\nmax_length = 99\n[data.options]\ntrain_rows = 7\n', "utf-8")
    assert load(path, {"data.max_rows": 5}).data.options == {"train_rows": 7}
    for key in ("data", "data.source"):
        moved = load(path, {key: "rows.jsonl"}).data
        assert (moved.source, moved.max_length, moved.options) == ("rows.jsonl", 99, {})
    assert load(path, {"data": "gazetteer", "data.options.seed": 3}).data.options == {"seed": 3}


def test_changed_changes_nothing_else() -> None:
    recipe = changed(Recipe(), {"train.steps": 7, "method.mu": 0.5})
    assert recipe.train.steps == 7
    assert changed(recipe, {"train.steps": 10}).method.fields == {"mu": 0.5}
    assert changed(changed(recipe, {"train.steps": 10}), {}) == changed(Recipe(), {"method.mu": 0.5})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("ruonds", 3, r"ruonds is not a field of Recipe \(did you mean rounds\?\)"),
        ("train.stpes", 3, r"train\.stpes is not a field of TrainSpec \(did you mean steps\?\)"),
        ("trian.steps", 3, r"trian is not a field of Recipe \(did you mean train\?\)"),
        ("rounds.deep", 3, r"rounds takes a table"),
        ("data.columns.respnse", "a", r"data\.columns\.respnse .*\(did you mean response\?\)"),
        ("rounds", "many", r'rounds is "many"; expected a whole number'),
        ("rounds", 0, r"rounds is 0; expected at least 1"),
        ("train.lr", math.nan, r"train\.lr is nan; expected a finite number, at least 0"),
        ("train.lr", -1.0, r"train\.lr is -1\.0; expected at least 0"),
        ("data.holdout", 1.0, r"data\.holdout is 1\.0; expected from 0 to below 1"),
        (
            "evaluate.baselines",
            ["base", "locale"],
            r"evaluate\.baselines\[1\] is 'locale'; expected one of 'base', 'local', 'centralized'",
        ),
        ("adapter.kind", "dora", r"adapter\.kind is 'dora'; expected one of 'lora', 'full'"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(key: str, value: Value, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load("tiny", {key: value})


def test_an_unknown_recipe_offers_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"tinny is neither .* \(did you mean tiny\?\)"):
        load("tinny")


def test_a_missing_recipe_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"there is no recipe file .*none\.toml"):
        load(tmp_path / "none.toml")


def test_broken_toml_says_where(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text("rounds = \n", "utf-8")
    with pytest.raises(RecipeError, match=r"broken\.toml is not valid TOML: .*line 1"):
        load(path)


def test_shipped_recipes_say_what_they_are_for() -> None:
    assert all(shipped().values())
    assert 'source = "pydocs"' in text_of("tiny")


def test_a_table_of_a_method_takes_its_fields_one_by_one_or_a_word_for_all() -> None:
    assert load("fedpt", {"method.large.top_k": 5}).method.fields["large"] == {"path": "builtin:large", "top_k": 5}
    word = load("fedpt", {"method.large": "models/big"})
    assert word.method.fields["large"] == "models/big"
    with pytest.raises(
        RecipeError, match=r"method\.large is a single word here: give it as a table, \[method\.large\]"
    ):
        changed(word, {"method.large.top_k": 5})


def test_a_method_that_is_one_word_takes_fields_on_top() -> None:
    table: dict[str, Value] = {"method": "fedprox"}
    lay_over(table, {"method.mu": 0.5})
    assert from_table(table).method.fields == {"mu": 0.5}
    assert from_table(table).method.name == "fedprox"


OLD = """
[privacy]
kind = "rows"
[evaluate]
controls = ["base", "central"]
"""


def test_a_recipe_under_former_names_is_read_and_written_under_present_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    warn_once.cache_clear()
    path = tmp_path / "old.toml"
    path.write_text(OLD, "utf-8")
    recipe = load(path)
    assert recipe.evaluate.baselines == ("base", "centralized")
    assert recipe.privacy.kind == "activations"
    assert [message.split(" is ")[0] for message in caplog.messages] == [
        "privacy.kind=rows",
        "evaluate.controls",
        "evaluate.baselines=central",
    ]
    assert from_table(to_table(recipe)) == recipe
    assert not {"controls", '"central"', '"rows"'} & set(to_toml(recipe).replace("[", " ").replace("]", " ").split())


@pytest.mark.parametrize("key", ["evaluate.controls", "evaluate.baselines"])
@pytest.mark.parametrize("written", ["controls", "baselines"])
def test_a_key_lies_over_the_file_under_either_name(key: str, written: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'[evaluate]\n{written} = ["base", "local"]\n', "utf-8")
    assert load(path, {key: ["base"]}).evaluate.baselines == ("base",)
    assert changed(load(path), {key: []}).evaluate.baselines == ()
    assert load(path, {"evaluate": {key.partition(".")[2]: []}}).evaluate.baselines == ()


def test_a_key_over_the_file_under_both_names_is_refused() -> None:
    with pytest.raises(
        RecipeError, match=r"^evaluate\.baselines is given twice, once under its former name: drop that"
    ):
        load("tiny", {"evaluate.controls": [], "evaluate.baselines": ["base"]})


def test_a_former_value_for_a_whole_table_is_taken() -> None:
    assert load("tiny", {"privacy": "rows"}).privacy.kind == "activations"


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_use_present_names(name: str, caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()
    load_method(load(name).method)
    assert not caplog.messages
