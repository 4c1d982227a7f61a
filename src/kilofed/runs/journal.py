"""What is committed after each round: rows of the ledger, a line of metrics, then the state that says what they hold."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from kilofed.federation.ledger import Ledger, Tally
from kilofed.federation.parties import Server
from kilofed.federation.states import States
from kilofed.files import append_line
from kilofed.runs import commit as commit_file
from kilofed.runs.commit import Commit, Lines

LEDGER, METRICS = "ledger.jsonl", "metrics.jsonl"

_VARIES = {"seconds", "framing_bytes"}


class Journal:
    """The files of a run that grow with each round; close it.

    Args:
        last: the round that was committed last, with which the files agree; None before the first.
        metrics: of the lines of metrics that are there.
        run: the run's identity.
        recipe: digest of what in its recipe changes numbers.
    """

    def __init__(self, folder: Path, last: Commit | None, metrics: Tally, *, run: str, recipe: str) -> None:
        self.ledger = Ledger(folder / LEDGER)
        self._folder, self._metrics, self._recipe = folder, metrics, recipe
        self.run = run
        # Rows of earlier rounds say nothing about what was released: the commit does.
        self._num_means = (last.num_means if last else 0) - self.ledger.num_means
        self._clients = dict(last.clients) if last else {}

    def add_line(self, metrics: Mapping[str, object]) -> None:
        """Append a line of metrics, on the disk. Raises RunError."""
        append_line(self._folder / METRICS, metrics)
        self._metrics.add(of_metrics(metrics))

    def commit(self, server: Server, cohort: Sequence[int], metrics: Mapping[str, object]) -> None:
        """Put a round that is over on the disk, the state last.

        Raises:
            RunError: it cannot be written; the round before it is kept.
        """
        self.ledger.sync()
        self.add_line(metrics)
        self._note_states(cohort, server.round)
        tally = self.ledger.tally
        commit_file.write(
            self._folder,
            Commit(
                state=server.state,
                round=server.round,
                run=self.run,
                recipe=self._recipe,
                ledger=Lines(tally.num, tally.sha256),
                metrics=Lines(self._metrics.num, self._metrics.sha256),
                num_means=self._num_means + self.ledger.num_means,
                clients=self._clients,
            ),
        )

    def close(self) -> None:
        """Let go of the ledger."""
        self.ledger.close()

    def _note_states(self, cohort: Sequence[int], round: int) -> None:
        below = self._folder / "clients"
        there = set(os.listdir(below)) if below.is_dir() else set()  # Of ten thousand clients most may have none.
        for client in cohort:
            if str(client) in there and (mark := States(below / str(client), client).newest(round)):
                self._clients[client] = mark


def of_metrics(row: Mapping[str, object]) -> bytes:
    """What of a round's metrics is equal in equal runs: neither its seconds nor the words of a failure."""
    kept = {name: value for name, value in row.items() if name not in _VARIES}
    if isinstance(failures := row.get("failures"), dict):
        kept["failures"] = sorted(map(str, failures))
    return json.dumps(kept, sort_keys=True, separators=(",", ":")).encode() + b"\n"
