"""Bounds of every setting: what lies on them is taken, what lies beyond is refused in one wording, by any way in."""

import dataclasses
import importlib
import math
import pkgutil
import typing
from dataclasses import dataclass, replace
from typing import Annotated

import pytest
from annotated_types import Ge, Gt, Interval, IsFinite, Le, Lt, MinLen, Predicate

import kilofed
from kilofed.config.bounds import Bounds, Or, Settings, bounds_of, power_of_two
from kilofed.config.fields import Value, build
from kilofed.config.recipe import DataSpec, Recipe, TrainSpec
from kilofed.config.tables import changed, from_table, load
from kilofed.errors import RecipeError
from kilofed.federation.method import find_method, load_method, method_names
from kilofed.methods.fedavg import FedAvg


def settings() -> dict[str, type[Settings]]:
    """Every class of settings that kilofed has, by name."""
    for package in ("config", "methods", "models", "proxy"):
        folder = importlib.import_module(f"kilofed.{package}")
        for item in pkgutil.iter_modules(folder.__path__, f"kilofed.{package}."):
            importlib.import_module(item.name)
    found, new = dict[str, type[Settings]](), Settings.__subclasses__()
    while new:
        cls = new.pop()
        new += cls.__subclasses__()
        if cls.__module__.startswith(f"{kilofed.__name__}."):
            found[cls.__name__] = cls
    return found


SETTINGS = settings()
BOUNDED = [
    (name, item.name, hint, bounds_of(hint))
    for name, cls in SETTINGS.items()
    for item in dataclasses.fields(cls)
    if bounds_of(hint := typing.get_type_hints(cls, include_extras=True)[item.name]) != Bounds()
]


def kind_of(hint: object) -> object:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def edges(hint: object, bounds: Bounds) -> tuple[list[float], list[float]]:
    """(values that just fit, values that just do not)."""
    whole = kind_of(hint) is int
    fits: list[float] = list(bounds.others)
    beyond: list[float] = [] if whole else [math.nan, -math.inf]
    for bound, way in ((bounds.lowest, -math.inf), (bounds.highest, math.inf)):
        match bound:
            case Ge(at) | Le(at):
                fits.append(at)
                beyond.append(at + int(math.copysign(1, way)) if whole else math.nextafter(at, way))
            case Gt(at) | Lt(at):
                fits.append(at - int(math.copysign(1, way)) if whole else math.nextafter(at, -way))
                beyond.append(at)
    if not whole and math.inf not in bounds.others:
        beyond.append(math.inf)
    return fits, beyond


def test_all_classes_of_settings_are_found() -> None:
    recipe = {cls.__name__ for cls in typing.get_type_hints(Recipe).values() if dataclasses.is_dataclass(cls)}
    assert recipe | {"Recipe", "PartitionSpec", "LargeSpec", "FedKSeed", "KD", "Split"} <= SETTINGS.keys()
    for name in method_names():
        assert find_method(name) in SETTINGS.values()


@pytest.mark.parametrize("name", SETTINGS)
def test_no_number_is_without_bounds(name: str) -> None:
    hints = typing.get_type_hints(SETTINGS[name], include_extras=True)
    numbers = {key: hint for key, hint in hints.items() if kind_of(hint) in (int, float)}
    bounded = {key for key, hint in numbers.items() if bounds_of(hint).lowest or bounds_of(hint).highest}
    assert numbers.keys() - bounded == {key for key, hint in numbers.items() if IsFinite in typing.get_args(hint)}


@pytest.mark.parametrize(("cls", "field", "hint", "bounds"), BOUNDED, ids=[f"{row[0]}.{row[1]}" for row in BOUNDED])
def test_a_bound_is_taken_and_what_lies_beyond_is_refused(cls: str, field: str, hint: object, bounds: Bounds) -> None:
    if bounds.min_length:
        fits, beyond = [("a",) * bounds.min_length], [("a",) * (bounds.min_length - 1)]
    else:
        fits, beyond = edges(hint, bounds)
        assert beyond
    for value in fits:
        plain = list(value) if isinstance(value, tuple) else value
        made = build(SETTINGS[cls], {field: plain}, "table.")
        assert made == SETTINGS[cls](**{field: value})
        assert getattr(made, field) == value
    for value in beyond:
        plain = list(value) if isinstance(value, tuple) else value
        with pytest.raises(RecipeError, match=rf"^table\.{field} (is|has) .*; expected "):
            build(SETTINGS[cls], {field: plain}, "table.")
        with pytest.raises(RecipeError, match=rf"^{cls}\.{field} (is|has) .*; expected "):
            SETTINGS[cls](**{field: value})


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int, ""),
        (float, ""),
        (Annotated[float, IsFinite], ""),
        (Annotated[int, Ge(1)], "at least 1"),
        (Annotated[float, Gt(0)], "above 0"),
        (Annotated[float, Le(2)], "at most 2"),
        (Annotated[float, Lt(2)], "below 2"),
        (Annotated[float, Interval(ge=0, le=1)], "from 0 to 1"),
        (Annotated[float, Interval(ge=0, lt=1)], "from 0 to below 1"),
        (Annotated[float, Interval(gt=0, le=1)], "above 0 and at most 1"),
        (Annotated[float, Interval(gt=0, lt=1)], "above 0 and below 1"),
        (Annotated[float, Gt(0), Or(math.inf)], "above 0, or inf"),
        (Annotated[int, Interval(ge=2, le=16), Or(32)], "from 2 to 16, or 32"),
        (Annotated[int, Predicate(power_of_two), Ge(64)], "a power of two, at least 64"),
        (Annotated[tuple[str, ...], MinLen(1)], "at least 1 of them"),
    ],
)
def test_bounds_are_told_in_words(hint: object, words: str) -> None:
    assert bounds_of(hint).words == words


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("train.steps", 0, "train.steps is 0; expected at least 1"),
        ("data.holdout", 1.2, "data.holdout is 1.2; expected from 0 to below 1"),
        ("data.partition.alpha", 0.0, "data.partition.alpha is 0.0; expected above 0"),
        ("evaluate.batch_size", 0, "evaluate.batch_size is 0; expected at least 1"),
        ("privacy.delta", 7, "privacy.delta is 7.0; expected above 0 and below 1"),
        ("adapter.dropout", 2, "adapter.dropout is 2.0; expected from 0 to below 1"),
        ("train.warmup", 5, "train.warmup is 5.0; expected from 0 to 1"),
        ("engine.threads", -4, "engine.threads is -4; expected at least 0"),
        ("train.lr", 10**400, "train.lr is inf; expected a finite number, at least 0"),
        ("privacy.clip", math.nan, "privacy.clip is nan; expected a finite number, above 0, or inf"),
        ("adapter.targets", [], "adapter.targets has 0 items; expected at least 1"),
    ],
)
def test_a_key_beyond_its_bounds_is_refused_in_one_wording(key: str, value: Value, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load("tiny", {key: value})
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"name": "fedadam", "tau": 0}, "method.tau is 0.0; expected above 0"),
        (
            {"name": "fedkseed", "num_seeds": 100},
            "method.num_seeds is 100; expected a power of two, from 64 to 1048576",
        ),
        ({"name": "fedkseed", "bits_up": 31}, "method.bits_up is 31; expected from 2 to 16, or 32"),
        ({"name": "fedpt", "large": {"top_k": 0}}, "method.large.top_k is 0; expected at least 1"),
    ],
)
def test_a_field_of_a_method_is_refused_in_the_same_wording(method: dict[str, Value], said: str) -> None:
    spec = from_table({"method": method}).method
    with pytest.raises(RecipeError) as caught:
        load_method(spec)
    assert str(caught.value) == said


def test_infinity_is_a_clip_and_no_learning_rate() -> None:
    assert load("tiny", {"privacy.clip": math.inf}).privacy.clip == math.inf
    with pytest.raises(RecipeError, match=r"train\.lr is inf; expected a finite number, at least 0"):
        load("tiny", {"train.lr": math.inf})


def test_a_copy_made_in_python_is_checked() -> None:
    with pytest.raises(RecipeError, match=r"^TrainSpec\.steps is 0; expected at least 1$"):
        replace(TrainSpec(), steps=0)
    with pytest.raises(RecipeError, match=r"^DataSpec\.holdout is 1\.2; expected from 0 to below 1$"):
        DataSpec(holdout=1.2)
    with pytest.raises(RecipeError, match="quorum is 4 but only 3 clients are drawn per round"):
        replace(changed(Recipe(), {"cohort": 3}), quorum=4)


def test_a_method_of_somebody_else_is_checked_by_its_bounds() -> None:
    @dataclass(frozen=True)
    class Mine(FedAvg):
        pull: Annotated[float, Interval(ge=0, le=2)] = 1.0
        free: float = 0.0

    assert Mine(pull=2.0, free=-1e9).pull == 2.0
    for wrong, said in (
        ({"pull": 2.5}, r"Mine\.pull is 2\.5; expected from 0 to 2"),
        ({"free": math.nan}, "a finite"),
    ):
        with pytest.raises(RecipeError, match=said):
            Mine(**wrong)


@pytest.mark.parametrize(
    ("value", "whether"), [(0, False), (1, True), (3, False), (64, True), (96, False), (-4, False)]
)
def test_powers_of_two_are_known(value: int, whether: bool) -> None:
    assert power_of_two(value) is whether
