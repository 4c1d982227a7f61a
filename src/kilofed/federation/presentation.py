"""What a method shows of itself in the report: lines over numbers, kept in results.json. Standard library only."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Chart:
    """A drawing of at most eight lines."""

    title: str
    words: str
    """What it shows, in a sentence or two; stands beside the title."""
    x: str
    """What the horizontal axis counts, with its unit."""
    y: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    """Points (x, y) by the line's label, in order of x."""

    def as_dict(self) -> dict[str, object]:
        """As it stands in results.json."""
        return asdict(self)
