"""The ledger: what was sent, per round, exchange, action, direction and client; append-only, the only meter.

A row is written for the very byte string that an engine was handed (down) or gave back (up). Rows go to a file as
they happen; only the totals stay in memory, so that ten thousand clients cost no more than ten.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO

from kilofed.errors import RunError
from kilofed.files import said

Direction = Literal["down", "up"]


@dataclass(frozen=True)
class Row:
    """One byte string on its way."""

    round: int
    exchange: int
    """Number of the exchange in its round, from 0."""
    action: str
    verb: str
    direction: Direction
    """down: server to client; up: client to server."""
    client: int
    bytes: int
    seconds: float
    """Up only: wall time from the exchange's last reply (or its start) to this one."""


class Tally:
    """How many lines a file has, and the digest of what in them is equal in equal runs."""

    def __init__(self) -> None:
        self.num = 0
        self._hash = hashlib.sha256()

    def add(self, lasting: bytes) -> None:
        """Count a line, of which `lasting` does not vary."""
        self.num += 1
        self._hash.update(lasting)

    @property
    def sha256(self) -> str:
        """64 hex digits, of all lines in their order."""
        return self._hash.hexdigest()


class Ledger:
    """Append rows, read them back, add them up.

    Args:
        path: JSON-lines file, made if absent and continued if present; None keeps the rows in memory.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._kept: list[Row] = []
        self._bytes: Counter[tuple[str, int]] = Counter()
        self._exchanges: set[tuple[int, int]] = set()
        self._means: set[tuple[int, int]] = set()
        self.tally = Tally()
        """Of all rows so far."""
        self._file: TextIO | None = None
        for row in self.rows():
            self._count(row)
        self._file = path.open("a", encoding="utf-8") if path else None

    def add(self, row: Row) -> None:
        """Append `row`."""
        self._count(row)
        if self._file:
            with said(f"cannot write {self.path}"):
                self._file.write(json.dumps(vars(row), separators=(",", ":")) + "\n")
        else:
            self._kept.append(row)

    def rows(self) -> Iterator[Row]:
        """All rows in the order they were added. Raises RunError: a broken line, named by its number."""
        if self.path is None:
            yield from self._kept
        else:
            self.flush()
            yield from read(self.path)

    @property
    def num_exchanges(self) -> int:
        """Exchanges so far: the number of times that the server waited for clients."""
        return len(self._exchanges)

    @property
    def num_means(self) -> int:
        """Exchanges so far of which the server saw the mean alone."""
        return len(self._means)

    def total(self, direction: Direction) -> int:
        """Bytes of all clients in one direction."""
        return sum(count for (way, _), count in self._bytes.items() if way == direction)

    def per_client(self, direction: Direction) -> dict[int, int]:
        """Bytes of each client in one direction."""
        return {client: count for (way, client), count in sorted(self._bytes.items()) if way == direction}

    def flush(self) -> None:
        """Hand rows to the operating system."""
        if self._file:
            with said(f"cannot write {self.path}"):
                self._file.flush()

    def sync(self) -> None:
        """Force rows to the disk."""
        if self._file:
            with said(f"cannot write {self.path}"):
                self._file.flush()
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and let go of the file."""
        if self._file:
            try:
                self.sync()
            finally:
                file, self._file = self._file, None
                with said(f"cannot write {self.path}"):
                    file.close()

    def _count(self, row: Row) -> None:
        self._bytes[row.direction, row.client] += row.bytes
        self._exchanges.add((row.round, row.exchange))
        if row.verb == "mean":
            self._means.add((row.round, row.exchange))
        self.tally.add(lasting(row))


def lasting(row: Row) -> bytes:
    """What of `row` is equal in equal runs: all but its seconds."""
    return (f"{row.round} {row.exchange} {row.action} {row.verb} {row.direction} {row.client} {row.bytes}\n").encode()


def read(path: Path) -> Iterator[Row]:
    """The rows of a ledger file, none if it is absent. Raises RunError: a broken line, named by its number."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield Row(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise RunError(
                    f"{path} line {number} is not a ledger row ({error}); resume the run to mend it"
                ) from error
