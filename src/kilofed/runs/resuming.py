"""Before a run goes on: all that its folder holds is held against the round that was committed last.

A killed run leaves whole lines of rounds that were not committed, and at most one half-written line at the end. Those
go. Anything else that is not as it was committed is damage, and is refused by its file and line.
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kilofed.config.recipe import Recipe
from kilofed.errors import RunError
from kilofed.federation.ledger import Row, Tally, lasting
from kilofed.federation.states import States
from kilofed.files import cut_to, said
from kilofed.runs import commit as commit_file
from kilofed.runs.commit import Commit, Lines
from kilofed.runs.folder import noise_key, recipe_digest, run_identity
from kilofed.runs.journal import LEDGER, METRICS, of_metrics

log = logging.getLogger("kilofed")

Table = Mapping[str, object]

_NOTHING = Lines(0, "")
_AGAIN = "put a copy of it back, or run the recipe anew"


@dataclass(frozen=True)
class Begun:
    """How far a run is."""

    run: str
    """Its identity."""
    commit: Commit | None
    """The round that was committed last; None before the first."""
    metrics: Tally
    """Of the lines of metrics that were committed."""


def checked(folder: Path, recipe: Recipe) -> Begun:
    """How far the run in `folder` is, once nothing in it speaks against going on; what was not committed is cut.

    Raises:
        RunError: a file is damaged, missing, older than another, or of another run; by its name.
    """
    commit = commit_file.read(folder)
    run = run_identity(recipe, noise_key(recipe, folder))
    if commit is None:
        _refuse_lost_state(folder)
        for name, of_line in ((LEDGER, of_ledger), (METRICS, of_metrics)):
            cut_back(folder / name, of_line, _NOTHING, -1)
        return Begun(run, None, Tally())
    path = folder / commit_file.FILE
    if not commit.run:
        raise RunError(
            f"{path} was written by an earlier kilofed, which noted nothing to check it by: finish the run with that "
            "release, or run its recipe.toml anew"
        )
    hold_to_recipe(path, commit, recipe)
    if commit.run != run:
        raise RunError(
            f"{path} and {folder}/noise.key, the secret of the noise, are not of one run: put a copy of the one that was "
            "changed back, or run the recipe anew"
        )
    cut_back(folder / LEDGER, of_ledger, commit.ledger, commit.round)
    metrics = cut_back(folder / METRICS, of_metrics, commit.metrics, commit.round)
    _hold_clients(folder, commit)
    return Begun(run, commit, metrics)


def hold_to_recipe(path: Path, commit: Commit, recipe: Recipe) -> None:
    """Raise RunError unless `commit`, read from `path`, is of a run of this recipe."""
    if not commit.run:
        log.warning("%s was written by an earlier kilofed and is not checked: it noted nothing to check it by", path)
    elif commit.recipe != recipe_digest(recipe):
        raise RunError(
            f"{path} is not of a run of the recipe beside it (recipe.toml and run.json): put a copy of what was changed "
            "back, or run the recipe anew"
        )


def cut_back(path: Path, of_line: Callable[[Table], bytes], committed: Lines, last_round: int) -> Tally:
    """Cut what was appended to `path` after round `last_round`; what is left.

    Args:
        of_line: what of a line is equal in equal runs.
        committed: what the file held when that round was committed; no line of it is cut.

    Raises:
        RunError: the file is not as it was, or holds what no killed run leaves.
    """
    tally, kept, size = Tally(), 0, 0
    if path.exists():
        with said(f"cannot read {path}"), path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                size += len(line)
                if number <= committed.num:
                    tally.add(_of_line(path, number, line, of_line))
                    kept = size
                elif line.endswith(b"\n"):
                    _of_later_round(path, number, line, last_round)
    if tally.num < committed.num:
        raise RunError(
            f"{path} has {tally.num} whole lines; when round {last_round} ended it had {committed.num}: {_AGAIN}"
        )
    if tally.sha256 != committed.sha256 and committed.num:
        raise RunError(f"{path} is not as it was when round {last_round} ended (its lines were changed): {_AGAIN}")
    if kept < size:
        cut_to(path, kept)
    return tally


def _refuse_lost_state(folder: Path) -> None:
    """Raise RunError if a round after the first was begun: then one was committed, and its state is gone."""
    for name in (LEDGER, METRICS):
        if (path := folder / name).exists() and (round := _last_round(path)) > 1:
            raise RunError(
                f"{folder / commit_file.FILE} is missing, but {name} holds round {round}: put a copy of it back, or "
                "run the recipe anew"
            )
        if path.exists() and path.stat().st_size:
            log.warning("no round of %s was committed: it begins again with round 1", folder)
            return


def _last_round(path: Path) -> int:
    last = 0
    with path.open("rb") as lines:
        for line in lines:
            try:
                last = max(last, int(json.loads(line)["round"]))
            except (ValueError, TypeError, KeyError, RecursionError):
                continue  # Nothing of it is kept.
    return last


def _hold_clients(folder: Path, commit: Commit) -> None:
    below = folder / "clients"
    there = {int(path.name) for path in below.iterdir() if path.name.isdecimal()} if below.is_dir() else set()
    for client in sorted(there | commit.clients.keys()):
        States(below / str(client), client).hold_against(commit.clients.get(client), commit.round, commit.run)


def of_ledger(row: Table) -> bytes:
    """What of a ledger's row is equal in equal runs. Raises TypeError: it is no such row."""
    return lasting(Row(**row))  # type: ignore[arg-type]


def _of_line(path: Path, number: int, line: bytes, of_line: Callable[[Table], bytes]) -> bytes:
    try:
        if not line.endswith(b"\n"):
            raise ValueError("it is cut")
        return of_line(_table(line))
    except (ValueError, TypeError) as error:
        raise RunError(f"{path} line {number} is damaged ({error}): {_AGAIN}") from error


def _of_later_round(path: Path, number: int, line: bytes, last_round: int) -> None:
    """Raise RunError unless a whole line is of a round after `last_round`."""
    try:
        round = _table(line).get("round")
    except ValueError as error:
        raise RunError(f"{path} line {number} is damaged ({error}): {_AGAIN}") from error
    if not isinstance(round, int) or round <= last_round:
        raise RunError(
            f"{path} line {number} is of round {round!r:.20}, but round {last_round} ended without it: {_AGAIN}"
        )


def _table(line: bytes) -> Table:
    """Raises ValueError: `line` is no JSON object."""
    try:
        found = json.loads(line)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    return found
