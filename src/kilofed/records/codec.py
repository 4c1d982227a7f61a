"""Frozen dataclasses to JSON and back, strictly, and the JSON Schema that says what their files hold.

A dataclass with a field `sha256` gives files that carry their own digest: an edit by hand is not believed.
"""

import hashlib
import json
from collections.abc import Hashable, Mapping
from dataclasses import asdict, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError

from kilofed.errors import RunError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")
Text = str | bytes

STRICT = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)
"""Every key is a field, and nothing is converted: `"3"` is no number."""
OPEN = ConfigDict(extra="ignore", strict=True, use_attribute_docstrings=True)
"""As STRICT, but for keys that are somebody else's."""
SEAL = "sha256"
"""Field of a dataclass whose files carry their own digest; "" in memory, and in a file of a release that had none."""
DIALECT = "https://json-schema.org/draft/2020-12/schema"

_KINDS = {"missing": "lacks {}", "unexpected_keyword_argument": "has the key {}, which is none of its own"}


class Mismatch(ValueError):
    """A JSON text is not what it should be; says the first thing that is wrong, by its key."""


def to_json(value: "DataclassInstance") -> dict[str, object]:
    """The dataclass and those in it as tables and lists that `json` writes, with its digest where it has a field for it."""
    table = asdict(value)
    return {**table, SEAL: _digest(json.dumps(table))} if SEAL in table else table


def from_text(kind: type[T], text: Text, where: str) -> T:
    """The `kind` that a JSON text holds.

    Args:
        where: file, and line where it has several, for errors.

    Raises:
        RunError: not JSON, or a key that is unknown, missing or of another type, with its path.
    """
    try:
        return parse(kind, text)
    except Mismatch as error:
        raise RunError(
            f"{where} {error}: it was written by another version of kilofed, cut, or edited; run its recipe again"
        ) from error


def parse(kind: type[T], text: Text) -> T:
    """As `from_text`, for a caller that says where and what to do. Raises Mismatch."""
    try:
        found = _adapter(cast(Hashable, kind)).validate_json(text)
    except ValidationError as error:
        raise Mismatch(_said(error)) from error
    if not is_dataclass(found) or isinstance(found, type) or not getattr(found, SEAL, ""):
        return cast(T, found)
    if getattr(found, SEAL) != _digest(text):
        raise Mismatch("does not hold what its sha256 says")
    return cast(T, replace(found, **{SEAL: ""}))


def from_file(kind: type[T], path: Path) -> T:
    """The `kind` that the file holds. Raises RunError: as `from_text`, or it cannot be read."""
    try:
        return from_text(kind, path.read_bytes(), str(path))
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror or error}); check the path") from error


def schema(kind: type[object]) -> dict[str, object]:
    """The JSON Schema, draft 2020-12, of the files that hold a `kind`; descriptions are its docstrings."""
    found = _adapter(cast(Hashable, kind)).json_schema()
    return cast(dict[str, object], _flowing({"$schema": DIALECT, **found}))


@cache
def _adapter(kind: Hashable) -> TypeAdapter[object]:
    return TypeAdapter(cast(type[object], kind))


def _digest(text: Text) -> str:
    """Of a JSON object but for its digest, whatever the order of its keys and the white space."""
    rest = {key: value for key, value in json.loads(text).items() if key != SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _said(error: ValidationError) -> str:
    """The first thing that is wrong."""
    first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        return f"is not JSON ({first['msg']})"
    key = ".".join(map(str, first["loc"]))
    if first["type"] in _KINDS:
        return _KINDS[first["type"]].format(key)
    return f"has another {key or 'content'} than expected ({first['msg']})"


def _flowing(value: object) -> object:
    """A schema whose descriptions are one line each, without the titles that repeat the keys."""
    if isinstance(value, Mapping):
        return {
            key: " ".join(inner.split()) if key == "description" and isinstance(inner, str) else _flowing(inner)
            for key, inner in value.items()
            if not (key == "title" and isinstance(inner, str))
        }
    return [_flowing(inner) for inner in value] if isinstance(value, list) else value
