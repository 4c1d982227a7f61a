"""What a method shows of itself: findings before a run, models beside the delivered one, charts. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kilofed.records.results import Chart

if TYPE_CHECKING:
    from torch import nn

    from kilofed.data.examples import Example
    from kilofed.federation.parties import Server


@dataclass(frozen=True)
class Diagnosis:
    """What a method says of a run before it begins."""

    good: bool
    text: str
    """One sentence."""


class Presentation:
    """What a method adds to `kilofed check`, the table of results and the report; nothing by default."""

    def diagnose(
        self, server: "Server", rows: "Sequence[Example]", held_out: "Sequence[Example]"
    ) -> Sequence[Diagnosis]:
        """What `kilofed check` says of this method on some of the clients' rows."""
        return ()

    def extra_models(self, server: "Server") -> "Mapping[str, nn.Module]":
        """Other models that the run makes or works with, each a row of the table by its name; put in place when read."""
        return {}

    def charts(self, server: "Server", rows: "Sequence[Example]") -> list[Chart]:
        """What the report draws after the last round; `rows` are held-out ones, some of each client's."""
        return []
