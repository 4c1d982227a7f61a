"""Dataclasses come back from JSON as they were, and nothing else comes back."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jsonschema
import pytest

from kilofed.errors import RunError
from kilofed.records import codec


@dataclass(frozen=True)
class Inner:
    """One of
    several."""

    loss: float | None
    """Nats,
    per token."""


@dataclass(frozen=True)
class Outer:
    """A file."""

    __pydantic_config__ = codec.STRICT

    inner: Mapping[str, Inner]
    pair: tuple[float, float] | None
    count: int


WHOLE = Outer({"a": Inner(0.1), "b": Inner(None)}, (1.5, 2.0), 3)


def test_what_is_written_is_read() -> None:
    assert codec.from_text(Outer, json.dumps(codec.to_json(WHOLE)), "it") == WHOLE


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"inner": {}, "pair": null}', "f.json lacks count: it was written by another version"),
        ('{"inner": {"a": {}}, "pair": null, "count": 3}', r"f.json lacks inner\.a\.loss: "),
        (
            '{"inner": {"a": {"loss": 1, "x": 2}}, "pair": null, "count": 3}',
            r"has the key inner\.a\.x, which is none of its own",
        ),
        ('{"inner": {}, "pair": [1], "count": 3}', r"f.json lacks pair\.1: "),
        (
            '{"inner": {}, "pair": null, "count": "3"}',
            r"has another count than expected \(Input should be a valid integer\).*run its recipe again",
        ),
        ('{"inner": {}, "pair": null, "count": true}', "another count than expected"),
        ("[]", "f.json has another content than expected"),
        ('{"inner": ', "f.json is not JSON"),
    ],
)
def test_what_is_wrong_is_named_by_file_and_key(text: str, said: str) -> None:
    with pytest.raises(RunError, match=said):
        codec.from_text(Outer, text, "f.json")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"none\.json cannot be read \(No such file"):
        codec.from_file(Outer, tmp_path / "none.json")


def test_the_schema_takes_what_is_written_and_nothing_more() -> None:
    found = codec.schema(Outer)
    jsonschema.Draft202012Validator.check_schema(found)
    valid = jsonschema.Draft202012Validator(found).is_valid
    table = json.loads(json.dumps(codec.to_json(WHOLE)))
    assert valid(table)
    assert not valid({**table, "more": 1})
    assert not valid({name: value for name, value in table.items() if name != "pair"})
    assert not valid({**table, "pair": [1.0, 2.0, 3.0]})


def test_descriptions_are_the_docstrings_in_one_line() -> None:
    inner = codec.schema(Outer)["$defs"]["Inner"]  # type: ignore[index]
    assert inner["description"] == "One of several."
    assert inner["properties"]["loss"]["description"] == "Nats, per token."


@dataclass(frozen=True)
class Sealed:
    """A file that carries its digest."""

    __pydantic_config__ = codec.STRICT

    losses: Mapping[int, float]
    inner: Inner | None
    sha256: str = ""


SEALED = Sealed({10: 1, 9: 0.1, 2: -0.0}, Inner(1e-300))


def test_a_sealed_file_comes_back_whatever_its_order_and_white_space() -> None:
    table = codec.to_json(SEALED)
    assert len(str(table["sha256"])) == 64
    assert codec.from_text(Sealed, json.dumps(table, indent=3), "it") == SEALED
    assert codec.from_text(Sealed, json.dumps(dict(reversed(table.items()))), "it") == SEALED
    assert codec.to_json(codec.from_text(Sealed, json.dumps(table), "it")).keys() == table.keys()


@pytest.mark.parametrize(
    "change",
    [{"losses": {10: 1, 9: 0.2, 2: 0.0}}, {"losses": {10: 1, 9: 0.1}}, {"inner": None}, {"sha256": "0" * 64}],
)
def test_an_edited_file_is_not_believed(change: dict[str, object]) -> None:
    text = json.dumps({**codec.to_json(SEALED), **change})
    with pytest.raises(RunError, match=r"f\.json does not hold what its sha256 says"):
        codec.from_text(Sealed, text, "f.json")


def test_a_file_of_a_release_without_digests_is_read() -> None:
    table = {key: value for key, value in codec.to_json(SEALED).items() if key != "sha256"}
    assert codec.from_text(Sealed, json.dumps(table), "it") == SEALED
