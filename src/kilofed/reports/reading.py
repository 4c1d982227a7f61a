"""A run folder read back as values: what was asked for, what each round gave, and the sums of the ledger's rows.

The ledger is streamed, one row at a time: only sums stay in memory, so that millions of rows cost no more than ten.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import cast

from kilofed.config.fields import Table
from kilofed.config.recipe import Recipe
from kilofed.config.tables import from_table
from kilofed.errors import RunError
from kilofed.federation import ledger
from kilofed.federation.ledger import Direction, Row
from kilofed.files import sha256_of
from kilofed.records import facts, metrics, results
from kilofed.records.facts import RunFacts
from kilofed.records.metrics import RoundMetrics
from kilofed.records.results import Results

LINES = ("ledger.jsonl", "metrics.jsonl")
"""Files that tell of each round."""


@dataclass(frozen=True)
class Traffic:
    """Sums over ledger rows."""

    by_round: Counter[tuple[int, Direction]] = field(default_factory=Counter)
    by_client: Counter[tuple[int, Direction]] = field(default_factory=Counter)
    by_action: Counter[tuple[str, str, Direction]] = field(default_factory=Counter)
    """Bytes per action and verb."""
    num_messages: Counter[tuple[str, str, Direction]] = field(default_factory=Counter)
    num_exchanges: Counter[int] = field(default_factory=Counter)
    """Exchanges of each round."""
    spans: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)
    """Least and most of an action per round: bytes of one client (`down`, `up`), or `exchanges`."""

    def total(self, direction: Direction) -> int:
        """Bytes of all rows in one direction."""
        return sum(count for (_, way), count in self.by_round.items() if way == direction)


@dataclass(frozen=True)
class Reading:
    """One run folder."""

    folder: Path
    recipe_text: str
    facts: RunFacts
    recipe: Recipe
    """What was asked for."""
    results: Results | None
    """None while the run has not finished."""
    rounds: list[RoundMetrics]
    traffic: Traffic
    """Of all repeats together, where the folder holds several."""
    seeds: list["Reading"]
    """The repeats, where the folder holds several."""


def read(folder: Path) -> Reading:
    """Read `folder`, and the `seed-N` folders in it.

    Raises:
        RunError: not a run folder, or a file that is not what a run writes, with the number of the broken line.
    """
    if not (folder / facts.FILE).is_file():
        raise RunError(f"{folder} is not a run folder (it has no run.json); give the folder that `kilofed run` made")
    recipe = folder / "recipe.toml"
    if (done := results.read(folder)) is not None:
        hold_to_files(folder, {name: done.files[name] for name in LINES if name in done.files})
    seeds = [read(path) for path in sorted(folder.glob("seed-*"), key=_seed) if path.is_dir()]
    return Reading(
        folder,
        _text_of(recipe),
        known := facts.read(folder),
        from_table(cast(Table, known.recipe)),
        done,
        list(metrics.read(folder / metrics.FILE)),
        merge([measure(ledger.read(folder / LINES[0])), *(seed.traffic for seed in seeds)]),
        seeds,
    )


def _text_of(recipe: Path) -> str:
    """The recipe as its copy has it; empty without one. Raises RunError: it is no text."""
    try:
        return recipe.read_text("utf-8") if recipe.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{recipe} cannot be read ({error}): delete it, which is a copy for the reader") from error


def hold_to_files(folder: Path, digests: Mapping[str, str]) -> None:
    """Raise RunError unless the files of a finished run are as they were when its results were worked out.

    Args:
        digests: SHA-256 by path in `folder`.
    """
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file() or sha256_of(path) != digest:
            found = "is not as it was" if path.is_file() else "is missing, which was there"
            raise RunError(
                f"{path} {found} when results.json was written: put a copy of it back, or resume the run, which says "
                "whether it can be made anew"
            )


def measure(rows: Iterable[Row]) -> Traffic:
    """Add up `rows`, whose rounds come in order."""
    traffic = Traffic()
    for at, group in groupby(rows, key=attrgetter("round")):
        sums: Counter[tuple[str, str, Direction, int]] = Counter()
        exchanges: dict[tuple[str, int], set[int]] = {}
        for row in group:
            sums[row.action, row.verb, row.direction, row.client] += row.bytes
            traffic.num_messages[row.action, row.verb, row.direction] += 1
            exchanges.setdefault((row.action, row.client), set()).add(row.exchange)
        for (action, verb, way, client), count in sums.items():
            traffic.by_round[at, way] += count
            traffic.by_client[client, way] += count
            traffic.by_action[action, verb, way] += count
            _widen(traffic.spans, (action, way), count, count)
        for (action, _), turns in exchanges.items():
            _widen(traffic.spans, (action, "exchanges"), len(turns), len(turns))
        traffic.num_exchanges[at] += len(set().union(*exchanges.values()))
    return traffic


def merge(parts: Iterable[Traffic]) -> Traffic:
    """The sums of all `parts`."""
    whole = Traffic()
    for part in parts:
        whole.by_round.update(part.by_round)
        whole.by_client.update(part.by_client)
        whole.by_action.update(part.by_action)
        whole.num_messages.update(part.num_messages)
        whole.num_exchanges.update(part.num_exchanges)
        for key, (low, high) in part.spans.items():
            _widen(whole.spans, key, low, high)
    return whole


def _widen(spans: dict[tuple[str, str], tuple[int, int]], key: tuple[str, str], low: int, high: int) -> None:
    least, most = spans.get(key, (low, high))
    spans[key] = (min(least, low), max(most, high))


def _seed(path: Path) -> tuple[int, str]:
    number = path.name.removeprefix("seed-")
    return (int(number) if number.isdecimal() else 0, number)
