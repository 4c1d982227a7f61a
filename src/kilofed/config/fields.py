"""Frozen dataclasses from plain values, and their fields with the texts that stand below them.

A field that was renamed says so in its type, as in `Annotated[int, FormerName("epoch")]`: the former name is accepted
for one release, with a warning that names the present one.
"""

import ast
import dataclasses
import inspect
import json
import logging
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Literal, NamedTuple, TypeVar, cast

from kilofed.config.bounds import bounds_of, refuse_outside
from kilofed.errors import RecipeError, nearest, shorten

Value = str | int | float | bool | list["Value"] | dict[str, "Value"]
"""What TOML can say."""
Table = Mapping[str, Value]
T = TypeVar("T")
log = logging.getLogger("kilofed")


@dataclass(frozen=True)
class FormerName:
    """Marks a field with a name that it had before."""

    name: str


@dataclass(frozen=True)
class FormerValue:
    """Marks a choice with the name that one of its values had before."""

    former: str
    present: str


class Described(NamedTuple):
    """One field, as `kilofed show` explains it."""

    name: str
    kind: str
    """Its type in words."""
    bounds: str
    """What its values must be, in words; empty where anything goes."""
    default: object
    text: str
    """The string below the field in the source."""


@cache
def hints_of(cls: type) -> dict[str, object]:
    """The types of a class's fields, with what they state of bounds and former names."""
    return typing.get_type_hints(cls, include_extras=True)


def build(cls: type[T], table: Table, where: str = "") -> T:
    """A frozen dataclass from plain values; unknown keys, wrong types and values out of bounds are refused.

    Args:
        cls: a dataclass whose fields are scalars, tuples, dicts, literals or dataclasses.
        where: dotted prefix for messages, such as `train.`.

    Raises:
        RecipeError: what was seen, what was expected, the nearest name.
    """
    table = with_present_names(cls, table, where)
    hints = hints_of(cls)  # type: ignore[arg-type]
    known = {item.name for item in dataclasses.fields(cls) if item.init}  # type: ignore[arg-type]
    owner = cls.__name__
    for key in table:
        if key not in known:
            raise RecipeError(f"{where}{key} is not a field of {owner}{nearest(key, known)}")
    return cls(**{key: _convert(hints[key], value, where + key) for key, value in table.items()})


def with_present_names(cls: type, table: Table, where: str = "") -> dict[str, Value]:
    """`table` under the present names of `cls` and of the tables in it; a former one is warned of, once per process.

    Raises:
        RecipeError: a field is given under both names.
    """
    hints = hints_of(cls)
    former = former_names(cls)
    found: dict[str, Value] = {}
    for key, value in table.items():
        name = former.get(key, key)
        if name != key:
            if name in table:
                raise RecipeError(
                    f"{where}{key} is the former name of {where}{name}, and both are given: drop the former"
                )
            warn_once(f"{where}{key} is deprecated and ends with the next release: write {where}{name}")
        found[name] = _with_present_values(hints.get(name), value, where + name)
    return found


def without_earlier_names(cls: type, table: Table) -> dict[str, Value]:
    """`table` without the first of two names of one field, where the later one was laid over it."""
    former = former_names(cls)
    last = {former.get(key, key): key for key in table}
    return {key: value for key, value in table.items() if last[former.get(key, key)] == key}


def former_names(cls: type) -> dict[str, str]:
    """Present names of the fields that had another one before, by the former name."""
    hints = hints_of(cls)
    return {mark.name: name for name, hint in hints.items() for mark in _marks(hint) if isinstance(mark, FormerName)}


def _with_present_values(hint: object, value: Value, where: str) -> Value:
    bare = _bare(hint)
    if dataclasses.is_dataclass(bare) and isinstance(value, dict):
        return with_present_names(cast(type, bare), value, where + ".")
    if typing.get_origin(bare) is tuple and isinstance(value, list):
        return [_with_present_values(typing.get_args(bare)[0], item, where) for item in value]
    if typing.get_origin(bare) is tuple:
        return _with_present_values(typing.get_args(bare)[0], value, where)
    for mark in _marks(hint):
        if isinstance(mark, FormerValue) and value == mark.former:
            warn_once(f"{where}={mark.former} is deprecated and ends with the next release: write {mark.present}")
            return mark.present
    return value


@cache
def warn_once(note: str) -> None:
    """Log a warning that this process has not logged yet."""
    log.warning("%s", note)


def describe(cls: type) -> list[Described]:
    """Each field with its type, bounds, default and text."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        body = cast(ast.ClassDef, ast.parse(inspect.cleandoc("\n" + inspect.getsource(base))).body[0]).body
        for item, after in zip(body, [*body[1:], None], strict=True):
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                texts[item.target.id] = str(after.value.value) if documented else ""  # type: ignore[union-attr]
    hints = hints_of(cls)
    rows = []
    for one in dataclasses.fields(cls):
        hint, factory = hints[one.name], one.default_factory
        default = one.default if isinstance(factory, dataclasses._MISSING_TYPE) else factory()
        words = bounds_of(hint).words
        rows.append(Described(one.name, type_name(hint), words, default, texts.get(one.name, "")))
    return rows


def _convert(hint: object, value: Value, where: str) -> object:
    """`value` as a field of type `hint` holds it, within the bounds that the type states."""
    found = _typed(_bare(hint), value, where)
    refuse_outside(bounds_of(hint), found, where)
    return found


def _typed(hint: object, value: Value, where: str) -> object:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        cls = cast(type, hint)
        if isinstance(value, dict):
            return build(cls, value, where + ".")
        return build(cls, {dataclasses.fields(cls)[0].name: value}, where + ".")
    if origin is Literal:
        if value not in args:
            raise RecipeError(f"{where} is {shorten(repr(value))}; expected one of {', '.join(map(repr, args))}")
        return value
    if origin is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(_convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(items))
    if origin is dict:
        if not isinstance(value, dict):
            raise RecipeError(f"{where} is {shorten(repr(value))}; expected a table")
        return {key: _convert(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return _float(value)
    if isinstance(hint, type) and (type(value) is hint):
        return value
    if isinstance(hint, types.UnionType) or origin is typing.Union or hint is Value:
        return value
    raise RecipeError(f"{where} is {shorten(json.dumps(value))}; expected {type_name(hint)}")


def _float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _bare(hint: object) -> object:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def _marks(hint: object) -> tuple[object, ...]:
    return typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ()


def type_name(hint: object) -> str:
    """A field's type in words."""
    bare = _bare(hint)
    origin, args = typing.get_origin(bare), typing.get_args(bare)
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin is tuple:
        return f"a list of {type_name(args[0])}"
    if origin is dict or dataclasses.is_dataclass(bare):
        return "a table"
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return words.get(cast(type, bare), str(bare))
