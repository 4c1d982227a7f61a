"""Frozen dataclasses from plain values, and their fields with the texts that stand below them."""

import ast
import dataclasses
import inspect
import json
import types
import typing
from collections.abc import Mapping
from typing import Literal, TypeVar, cast

from kilofed.errors import RecipeError, nearest

Value = str | int | float | bool | list["Value"] | dict[str, "Value"]
"""What TOML can say."""
Table = Mapping[str, Value]
T = TypeVar("T")


def build(cls: type[T], table: Table, where: str = "") -> T:
    """A frozen dataclass from plain values; unknown keys and wrong types are refused.

    Args:
        cls: a dataclass whose fields are scalars, tuples, dicts, literals or dataclasses.
        where: dotted prefix for messages, such as `train.`.

    Raises:
        RecipeError: what was seen, what was expected, the nearest name.
    """
    hints = typing.get_type_hints(cls)
    known = {item.name for item in dataclasses.fields(cls) if item.init}  # type: ignore[arg-type]
    owner = cls.__name__
    for key in table:
        if key not in known:
            raise RecipeError(f"{where}{key} is not a field of {owner}{nearest(key, known)}")
    return cls(**{key: _convert(hints[key], value, where + key) for key, value in table.items()})


def describe(cls: type) -> list[tuple[str, str, object, str]]:
    """(name, type, default, text) of each field; the text is the string below the field in the source."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        body = cast(ast.ClassDef, ast.parse(inspect.cleandoc("\n" + inspect.getsource(base))).body[0]).body
        for item, after in zip(body, [*body[1:], None], strict=True):
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                texts[item.target.id] = str(after.value.value) if documented else ""  # type: ignore[union-attr]
    rows: list[tuple[str, str, object, str]] = []
    for one in dataclasses.fields(cls):
        factory = one.default_factory
        default = one.default if isinstance(factory, dataclasses._MISSING_TYPE) else factory()
        rows.append((one.name, type_name(one.type), default, texts.get(one.name, "")))
    return rows


def _convert(hint: object, value: Value, where: str) -> object:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        cls = cast(type, hint)
        if isinstance(value, dict):
            return build(cls, value, where + ".")
        return build(cls, {dataclasses.fields(cls)[0].name: value}, where + ".")
    if origin is Literal:
        if value not in args:
            raise RecipeError(f"{where} is {value!r}; expected one of {', '.join(map(repr, args))}")
        return value
    if origin is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(_convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(items))
    if origin is dict:
        if not isinstance(value, dict):
            raise RecipeError(f"{where} is {value!r}; expected a table")
        return {key: _convert(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and (type(value) is hint):
        return value
    if isinstance(hint, types.UnionType) or origin is typing.Union or hint is Value:
        return value
    raise RecipeError(f"{where} is {json.dumps(value)}; expected {type_name(hint)}")


def type_name(hint: object) -> str:
    if typing.get_origin(hint) is Literal:
        return " | ".join(map(str, typing.get_args(hint)))
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return words.get(cast(type, hint), str(hint).replace("kilofed.config.recipe.", ""))
