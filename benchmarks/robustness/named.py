"""Mistakes that the tests once let live, made by hand: each is a piece of source and what stands there instead."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Named:
    """One mistake."""

    name: str
    module: str
    before: str
    """As it stands in the source, once."""
    after: str
    tests: tuple[str, ...]

    def line(self, source: str) -> int:
        """Where it lies, from 1. Raises ValueError: it is not there, or more than once."""
        if source.count(self.before) != 1:
            raise ValueError(
                f"{self.name}: found {source.count(self.before)} times in {self.module}.py, expected once"
            )
        return source[: source.index(self.before)].count("\n") + 1

    def applied(self, source: str) -> str:
        """The source with the mistake. Raises ValueError, as `line`."""
        self.line(source)
        return source.replace(self.before, self.after)


NAMED: tuple[Named, ...] = ()
