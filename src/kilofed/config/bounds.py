"""What a setting may be: bounds that stand in a field's type, one check of them and one wording.

A field says its bounds with annotated-types, as in `steps: Annotated[int, Ge(1)] = 10`. Numbers are finite, unless `Or`
names infinity; `IsFinite` says that any other number will do. A class of settings inherits from `Settings`, which checks
each instance however it was made.
"""

import dataclasses
import math
import typing
from collections.abc import Callable, Sized
from dataclasses import dataclass
from functools import cache
from typing import Annotated

from annotated_types import Ge, GroupedMetadata, Gt, Le, Lt, MinLen, Predicate

from kilofed.errors import RecipeError, shorten


@dataclass(frozen=True)
class Or:
    """Marks a value that a field takes besides those within its bounds, such as 32 or math.inf."""

    value: float


@dataclass(frozen=True)
class Bounds:
    """The bounds of one field."""

    finite: bool = False
    """Whether infinity and NaN are refused, as they are for every number that is not whole."""
    lowest: Ge | Gt | None = None
    highest: Le | Lt | None = None
    rules: tuple[Callable[[float], bool], ...] = ()
    """Functions whose names say what a number must be, such as `power_of_two`."""
    others: tuple[float, ...] = ()
    """Values that are allowed besides."""
    min_length: int = 0
    """Fewest items of a list."""

    def allow(self, value: object) -> bool:
        """Whether a field may have `value`; its type is checked elsewhere."""
        if isinstance(value, tuple):
            return len(value) >= self.min_length
        if isinstance(value, bool) or not isinstance(value, int | float):
            return True
        finite = isinstance(value, int) or math.isfinite(value)  # A whole number may be too large for a float.
        return value in self.others or ((finite or not self.finite) and self._within(value))

    def _within(self, value: float) -> bool:
        low, high = self.lowest, self.highest
        above = low is None or (value >= low.ge if isinstance(low, Ge) else value > low.gt)  # type: ignore[operator]
        below = high is None or (value <= high.le if isinstance(high, Le) else value < high.lt)  # type: ignore[operator]
        return above and below and all(rule(value) for rule in self.rules)

    @property
    def words(self) -> str:
        """The bounds in words, such as `from 0 to below 1`; empty without any."""
        if self.min_length:
            return f"at least {self.min_length} of them"
        parts = [f"a {rule.__name__.replace('_', ' ')}" for rule in self.rules]
        if span := self._span():
            parts.append(span)
        return ", or ".join(filter(None, (", ".join(parts), *map(str, self.others))))

    def _span(self) -> str:
        low = _words(self.lowest)
        high = _words(self.highest)
        if isinstance(self.lowest, Ge) and high:
            end = high.removeprefix("at most ")
            return f"from {self.lowest.ge} to {end}"
        return " and ".join(filter(None, (low, high)))


def _words(bound: Ge | Gt | Le | Lt | None) -> str:
    match bound:
        case Ge(ge):
            return f"at least {ge}"
        case Gt(gt):
            return f"above {gt}"
        case Le(le):
            return f"at most {le}"
        case Lt(lt):
            return f"below {lt}"
    return ""


def bounds_of(hint: object) -> Bounds:
    """The bounds that a type states."""
    bare, *stated = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
    marks: list[object] = []
    for mark in stated:
        marks += mark if isinstance(mark, GroupedMetadata) else [mark]
    return Bounds(
        finite=bare is float,
        lowest=next((mark for mark in marks if isinstance(mark, Ge | Gt)), None),
        highest=next((mark for mark in marks if isinstance(mark, Le | Lt)), None),
        rules=tuple(mark.func for mark in marks if isinstance(mark, Predicate) and mark.func is not math.isfinite),
        others=tuple(mark.value for mark in marks if isinstance(mark, Or)),
        min_length=next((mark.min_length for mark in marks if isinstance(mark, MinLen)), 0),
    )


def refuse_outside(bounds: Bounds, value: object, key: str) -> None:
    """Raise RecipeError where `value`, given under `key`, is not within `bounds`."""
    if bounds.allow(value):
        return
    if isinstance(value, Sized):
        seen, expected = f"has {len(value)} items", f"at least {bounds.min_length}"
    else:
        finite = "a finite number" if isinstance(value, float) and not math.isfinite(value) else ""
        seen, expected = f"is {shorten(str(value))}", ", ".join(filter(None, (finite, bounds.words)))
    raise RecipeError(f"{key} {seen}; expected {expected}")


@dataclass(frozen=True)
class Settings:
    """Base of what a recipe sets: every instance is within its bounds, read from a table or made in Python."""

    def __post_init__(self) -> None:
        for name, bounds in _all_bounds(type(self)).items():  # type: ignore[arg-type]
            refuse_outside(bounds, getattr(self, name), f"{type(self).__name__}.{name}")


@cache
def _all_bounds(cls: type) -> dict[str, Bounds]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {item.name: bounds_of(hints[item.name]) for item in dataclasses.fields(cls)}


def power_of_two(value: float) -> bool:
    """Whether `value` is 1, 2, 4, ..."""
    return value > 0 and int(value) & (int(value) - 1) == 0
