"""Recipes from TOML and `key=value` words, and back; the shipped recipes."""

import dataclasses
import tomllib
import typing
from collections.abc import Mapping, Sequence
from datetime import date, time
from importlib import resources
from pathlib import Path
from typing import cast

import tomli_w

from kilofed.config import values
from kilofed.config.fields import Table, Value, build, with_present_names
from kilofed.config.recipe import Recipe
from kilofed.errors import RecipeError, nearest, readable, shorten


def load(source: str | Path, overrides: Mapping[str, Value] | None = None) -> Recipe:
    """The recipe named or stored at `source`, with `overrides` such as {"train.lr": 1e-3} laid over it.

    Args:
        source: name of a shipped recipe, or path of a TOML file.
        overrides: dotted keys; a table given as one word sets its first field (`model=DIR`, `data=FILE`).

    Raises:
        RecipeError: no such recipe, unknown key, wrong type, value out of range.
    """
    table = read_table(source)
    lay_over(table, overrides or {})
    return from_table(table)


def from_table(table: Table) -> Recipe:
    """The recipe that `table` (nested, as TOML gives it) describes; raises RecipeError."""
    values.refuse_strange(table, "the recipe")
    return build(Recipe, _method_fields(table))


def changed(recipe: Recipe, overrides: Mapping[str, Value]) -> Recipe:
    """`recipe` with `overrides` laid over it; raises RecipeError."""
    table = to_table(recipe)
    lay_over(table, overrides)
    return from_table(table)


def to_table(recipe: Recipe) -> dict[str, Value]:
    """Every field as plain nested values; `from_table` gives the same recipe back."""
    table = cast(dict[str, Value], _plain(recipe))
    method = cast(dict[str, Value], table["method"])
    table["method"] = {"name": method["name"], **cast(dict[str, Value], method["fields"])}
    return table


def to_toml(recipe: Recipe) -> str:
    """The whole recipe as TOML text."""
    return tomli_w.dumps(to_table(recipe))


def parse_words(words: Sequence[str]) -> dict[str, Value]:
    """`key=value` words as overrides; a value that is no TOML value is text. Raises RecipeError."""
    overrides: dict[str, Value] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise RecipeError(f"{word!r} is not key=value, such as train.lr=0.001")
        overrides[key] = _value(text, key)
    return overrides


def _value(text: str, key: str) -> Value:
    if len(text.splitlines()) > 1:  # More than one line of TOML would say more than one value.
        return text
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    except (RecursionError, ValueError):
        value = values.parse(f"value = {text}", key)["value"]  # Says in a sentence why it cannot be read.
    return text if isinstance(value, date | time) else cast(Value, value)


def shipped() -> dict[str, str]:
    """Names of the shipped recipes and their sentence."""
    folder = resources.files("kilofed") / "recipes"
    found = sorted(item.name for item in folder.iterdir() if item.name.endswith(".toml"))
    tables = {name[:-5]: tomllib.loads((folder / name).read_text("utf-8")) for name in found}
    return {name: str(table.get("about", "")) for name, table in tables.items()}


def text_of(source: str | Path) -> str:
    """The TOML text of a shipped recipe or a recipe file. Raises RecipeError: there is none."""
    path, name = Path(source), shorten(readable(str(source)), longest=1000)
    if path.suffix == ".toml":
        try:
            if not path.is_file():
                raise RecipeError(f"there is no recipe file {name}; check the path, or see `kilofed ls recipes`")
            return path.read_text("utf-8")
        except (OSError, UnicodeError) as error:
            raise RecipeError(
                f"{name} cannot be read as UTF-8 text ({getattr(error, 'strerror', None) or error})"
            ) from error
    if str(source) not in shipped():
        raise RecipeError(f"{name} is neither a shipped recipe nor a .toml file{nearest(str(source), shipped())}")
    return (resources.files("kilofed") / "recipes" / f"{source}.toml").read_text("utf-8")


def read_table(source: str | Path) -> dict[str, Value]:
    """A recipe as its file has it, nested, under present names; raises RecipeError: there is none, or it is not TOML."""
    return with_present_names(Recipe, values.parse(text_of(source), str(source)))


def lay_over(table: dict[str, Value], overrides: Mapping[str, Value]) -> None:
    """Write dotted keys and their values into `table`; raises RecipeError: no such key, or one under two names."""
    for key, value in overrides.items():
        values.refuse_strange(key, "the key of an override")
        values.refuse_strange(value, key)
    overrides = _under_present_names(overrides)
    data = table.get("data")
    if isinstance(data, dict) and overrides.keys() & {"data", "data.source"}:
        data.pop("options", None)  # They were those of the source that is laid over.
    for key, value in overrides.items():
        _lay_over(table, key, value)


def _under_present_names(overrides: Mapping[str, Value]) -> dict[str, Value]:
    """Overrides by their present keys; only a method knows the former names of its own fields."""
    found: dict[str, Value] = {}
    for key, value in overrides.items():
        names, nested = key.split("."), value
        for name in reversed(names):
            nested = {name: nested}
        nested = with_present_names(Recipe, cast(Table, nested))
        path = []
        for _ in names:
            ((name, nested),) = cast(Table, nested).items()
            path.append(name)
        if (present := ".".join(path)) in found:
            raise RecipeError(f"{present} is given twice, once under its former name: drop that one")
        found[present] = nested
    return found


def _lay_over(table: dict[str, Value], key: str, value: Value) -> None:
    *path, last = key.split(".")
    here = table
    below: Value | None
    for name in path:
        below = here.setdefault(name, {})
        if not isinstance(below, dict):  # `model = "x"` in the file, `model.dtype=...` on top
            below = here[name] = {_first_field(key.split(".")[: path.index(name) + 1]): below}
        here = below
    below = here.get(last)
    if isinstance(below, dict) and not isinstance(value, dict) and path != ["method"]:
        below[_first_field(key.split("."))] = value
    else:
        here[last] = value


def _first_field(path: Sequence[str]) -> str:
    if path[0] == "method" and len(path) > 1:  # Its tables are known to the method alone.
        raise RecipeError(
            f"{'.'.join(path)} is a single word here: give it as a table, [{'.'.join(path)}], in a recipe"
        )
    cls: object = Recipe
    for name in path:
        hints = typing.get_type_hints(cls)
        if name not in hints:
            raise RecipeError(f"{'.'.join(path)} is not a key of a recipe{nearest(name, hints)}")
        cls = hints[name]
    if not dataclasses.is_dataclass(cls):
        raise RecipeError(f"{'.'.join(path)} takes a table, such as {path[-1]}.name=value")
    return dataclasses.fields(cls)[0].name


def _method_fields(table: Table) -> Table:
    method = table.get("method")
    if not isinstance(method, dict):
        return table
    fields = {key: value for key, value in method.items() if key != "name"}
    return {**table, "method": {"name": method.get("name", "fedavg"), "fields": fields}}


def _plain(value: object) -> Value:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    assert isinstance(value, str | int | float | bool)
    return value
