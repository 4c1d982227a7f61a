"""TOML text as plain values; what a recipe cannot hold is refused by name."""

import tomllib
from collections.abc import Mapping
from datetime import date, datetime, time
from typing import cast

from kilofed.config.fields import Value
from kilofed.errors import RecipeError, shorten

DEEPEST = 32
"""Most lists and tables within one another."""
MOST_BITS = 4096
"""Of a whole number; Python refuses to write much larger ones as text."""


def parse(text: str, source: str) -> dict[str, Value]:
    """The table that TOML text holds.

    Raises:
        RecipeError: it is not TOML, or it has what no recipe has, such as a date.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{source} is not valid TOML: {shorten(str(error))}; correct it there") from error
    except RecursionError as error:
        raise _too_deep(source) from error
    except ValueError as error:  # Python refuses to read a number of more than 4,300 digits.
        raise RecipeError(
            f"{source} has a number that cannot be read ({str(error).partition(';')[0]}); write a shorter one"
        ) from error
    refuse_strange(table, source)
    return cast(dict[str, Value], table)


def refuse_strange(value: object, where: str, depth: int = 0) -> None:
    """Raise RecipeError where `value`, given under `where`, has what no recipe can hold at any depth."""
    if depth > DEEPEST:
        raise _too_deep(where)
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise RecipeError(f"{where} has the key {shorten(repr(key))}; expected text")
            refuse_strange(key, f"a key of {where}", depth)
            refuse_strange(item, f"{shorten(key)} in {where}" if not depth else f"{where}.{shorten(key)}", depth + 1)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            refuse_strange(item, f"{where}[{number}]", depth + 1)
    elif isinstance(value, str):
        _refuse_surrogates(value, where)
    elif isinstance(value, int):
        if value.bit_length() > MOST_BITS:
            raise RecipeError(f"{where} is a whole number of {value.bit_length():,} bits; expected a smaller one")
    elif isinstance(value, date | time | datetime):
        raise RecipeError(
            f"{where} is a date or time, {value}; recipes have none: put quotes around it to make it text"
        )
    elif not isinstance(value, float):
        raise RecipeError(
            f"{where} is of type {type(value).__name__}; expected text, a number, true or false, a list or a table"
        )


def _refuse_surrogates(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecipeError(
            f"{where} is {shorten(ascii(text))}, which is not UTF-8 text at character {error.start}; type it again"
        ) from error


def _too_deep(where: str) -> RecipeError:
    return RecipeError(f"{where} has lists or tables more than {DEEPEST} deep; expected flat settings")
