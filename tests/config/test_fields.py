"""Plain values into frozen dataclasses, refusals with the nearest name, and fields with their texts."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
from annotated_types import Gt, Interval

from kilofed.config.fields import FormerName, FormerValue, Value, build, describe, warn_once
from kilofed.errors import RecipeError


@dataclass(frozen=True)
class Inner:
    path: str = "here"
    """Where it is."""
    depth: int = 1


@dataclass(frozen=True)
class Outer:
    rate: Annotated[float, Gt(0)] = 0.5
    """Speed,
    in metres."""
    kind: Literal["slow", "fast"] = "slow"
    on: bool = False
    names: tuple[str, ...] = ("a",)
    inner: Inner = field(default_factory=Inner)
    """The inner one."""
    extra: dict[str, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class Derived(Outer):
    rate: float = 2.0
    """Another speed."""


def test_an_empty_table_gives_the_defaults() -> None:
    assert build(Outer, {}) == Outer()


def test_every_kind_of_field_is_filled() -> None:
    table: dict[str, Value] = {
        "rate": 0.25,
        "kind": "fast",
        "on": True,
        "names": ["b", "c"],
        "inner": {"path": "there", "depth": 3},
        "extra": {"x": [1, "two"], "y": {"z": 1.5}},
    }
    expected = Outer(0.25, "fast", True, ("b", "c"), Inner("there", 3), {"x": [1, "two"], "y": {"z": 1.5}})
    assert build(Outer, table) == expected


def test_a_whole_number_is_a_number() -> None:
    rate = build(Outer, {"rate": 2}).rate
    assert rate == 2.0
    assert isinstance(rate, float)


def test_one_word_is_a_tuple_of_one() -> None:
    assert build(Outer, {"names": "b"}).names == ("b",)


def test_one_word_for_a_table_sets_its_first_field() -> None:
    assert build(Outer, {"inner": "there"}).inner == Inner("there")


def test_an_unknown_key_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(RecipeError, match=r"^raet is not a field of Outer \(did you mean rate\?\)$"):
        build(Outer, {"raet": 1.0})


def test_an_unknown_key_far_from_any_lists_what_exists() -> None:
    with pytest.raises(RecipeError, match=r"inner\.zzz is not a field of Inner \(there is: depth, path\)"):
        build(Outer, {"inner": {"zzz": 1}})


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"rate": "quick"}, r'rate is "quick"; expected a number'),
        ({"rate": True}, r"rate is true; expected a number"),
        ({"on": 1}, r"on is 1; expected true or false"),
        ({"names": [1]}, r"names\[0\] is 1; expected text"),
        ({"kind": "medium"}, r"kind is 'medium'; expected one of 'slow', 'fast'"),
        ({"kind": ["slow"]}, r"kind is \['slow'\]; expected one of"),
        ({"extra": 3}, r"extra is 3; expected a table"),
        ({"inner": {"depth": 1.5}}, r"inner\.depth is 1\.5; expected a whole number"),
        ({"inner": {"depth": True}}, r"inner\.depth is true; expected a whole number"),
    ],
)
def test_a_wrong_type_says_what_was_seen_and_expected(table: dict[str, Value], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build(Outer, table)


def test_texts_stand_below_their_fields() -> None:
    rows = {one.name: (one.kind, one.default, one.text) for one in describe(Outer)}
    assert list(rows) == ["rate", "kind", "on", "names", "inner", "extra"]
    assert rows["rate"] == ("a number", 0.5, "Speed,\n    in metres.")
    assert rows["kind"] == ("slow | fast", "slow", "")
    assert rows["inner"][1:] == (Inner(), "The inner one.")
    assert rows["on"][:2] == ("true or false", False)


def test_lists_and_tables_are_named_as_such_and_bounds_are_told() -> None:
    rows = {one.name: (one.kind, one.bounds) for one in describe(Outer)}
    assert rows["names"] == ("a list of text", "")
    assert rows["inner"] == rows["extra"] == ("a table", "")
    assert rows["rate"] == ("a number", "above 0")


def test_items_of_a_list_are_checked_one_by_one() -> None:
    @dataclass(frozen=True)
    class Shares:
        shares: tuple[Annotated[float, Interval(ge=0, le=1)], ...] = ()

    assert build(Shares, {"shares": [0, 1]}).shares == (0.0, 1.0)
    with pytest.raises(RecipeError, match=r"^shares\[1\] is 1\.5; expected from 0 to 1$"):
        build(Shares, {"shares": [0.5, 1.5]})


def test_a_base_class_gives_texts_and_the_derived_one_wins() -> None:
    rows = {one.name: (one.default, one.text) for one in describe(Derived)}
    assert rows["rate"] == (2.0, "Another speed.")
    assert rows["inner"][1] == "The inner one."


@dataclass(frozen=True)
class Renamed:
    rounds_per_pool: Annotated[int, FormerName("epoch")] = 0
    kind: Annotated[Literal["mean", "sum"], FormerValue("total", "sum")] = "mean"
    kinds: tuple[Annotated[Literal["mean", "sum"], FormerValue("total", "sum")], ...] = ()


@dataclass(frozen=True)
class Holder:
    table: Annotated[Renamed, FormerName("section")] = field(default_factory=Renamed)


@pytest.mark.parametrize(
    ("table", "expected", "said"),
    [
        ({"epoch": 3}, Renamed(3), "x.epoch is deprecated and ends with the next release: write x.rounds_per_pool"),
        (
            {"kind": "total"},
            Renamed(kind="sum"),
            "x.kind=total is deprecated and ends with the next release: write sum",
        ),
        ({"kinds": ["mean", "total"]}, Renamed(kinds=("mean", "sum")), "x.kinds=total is deprecated"),
        ({"kinds": "total"}, Renamed(kinds=("sum",)), "x.kinds=total is deprecated"),
        ({"rounds_per_pool": 3, "kind": "sum"}, Renamed(3, "sum"), ""),
    ],
)
def test_a_former_name_is_taken_with_one_warning(
    table: dict[str, Value], expected: Renamed, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    warn_once.cache_clear()
    assert build(Renamed, table, "x.") == build(Renamed, table, "x.") == expected
    assert len(caplog.messages) == bool(said)
    assert "".join(caplog.messages).startswith(said)


def test_former_names_within_tables_are_taken(caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()
    assert build(Holder, {"section": {"epoch": 2, "kind": "total"}}).table == Renamed(2, "sum")
    assert [message.split()[0] for message in caplog.messages] == ["section", "table.epoch", "table.kind=total"]
    assert build(Holder, {"table": 4}).table == Renamed(4)


def test_a_field_under_both_names_is_refused() -> None:
    said = r"^x\.epoch is the former name of x\.rounds_per_pool, and both are given: drop the former$"
    for table in ({"epoch": 3, "rounds_per_pool": 3}, {"rounds_per_pool": 3, "epoch": 4}):
        with pytest.raises(RecipeError, match=said):
            build(Renamed, table, "x.")


def test_a_former_name_is_held_to_the_bounds_under_its_present_one() -> None:
    with pytest.raises(RecipeError, match=r"^rounds_per_pool is \"many\"; expected a whole number$"):
        build(Renamed, {"epoch": "many"})


def test_only_present_names_are_described() -> None:
    assert [one.name for one in describe(Renamed)] == ["rounds_per_pool", "kind", "kinds"]
    assert describe(Renamed)[1].kind == "mean | sum"
