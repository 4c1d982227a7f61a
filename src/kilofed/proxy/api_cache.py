"""Next-token scores that an API gave before, kept in one SQLite file: what was paid for once is not requested again.

A key is the SHA-256 of the model's name, the number of scores asked for and the token ids of the text before; neither
address nor key of the API is in the file. Values are token ids and log-probabilities as raw bytes, never pickled.
"""

import hashlib
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kilofed.errors import RunError


class TopLogprobs(NamedTuple):
    """The likeliest tokens of one position, as an API gave them."""

    ids: npt.NDArray[np.int32]
    """(k,) tokens, in no order."""
    logprobs: npt.NDArray[np.float32]
    """(k,) natural logarithms."""


class LogprobCache:
    """A file of scores. Raises RunError: it cannot be opened or is no such file.

    Args:
        path: made if absent; None keeps the scores in memory.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        try:
            self._file = sqlite3.connect(path or ":memory:", isolation_level=None, check_same_thread=False)
            self._file.execute("pragma journal_mode = wal")
            self._file.execute("create table if not exists told (prefix blob primary key, k integer, scores blob)")
        except sqlite3.Error as error:
            raise self._said(error) from error

    def get(self, keys: Sequence[bytes]) -> dict[bytes, TopLogprobs]:
        """Those of `keys` that are known."""
        found = {}
        try:
            for key in keys:
                row = self._file.execute("select k, scores from told where prefix = ?", (key,)).fetchone()
                if row is not None and len(row[1]) == 8 * row[0]:
                    ids = np.frombuffer(row[1], np.int32, row[0])
                    found[key] = TopLogprobs(ids, np.frombuffer(row[1], np.float32, row[0], 4 * row[0]))
        except sqlite3.Error as error:
            raise self._said(error) from error
        return found

    def put(self, scores: Mapping[bytes, TopLogprobs]) -> None:
        """Keep these, all or none."""
        rows = [
            (key, len(one.ids), one.ids.astype(np.int32).tobytes() + one.logprobs.astype(np.float32).tobytes())
            for key, one in scores.items()
        ]
        try:
            self._file.execute("begin")
            self._file.executemany("insert or replace into told values (?, ?, ?)", rows)
            self._file.execute("commit")
        except sqlite3.Error as error:
            if self._file.in_transaction:
                self._file.execute("rollback")
            raise self._said(error) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _said(self, error: sqlite3.Error) -> RunError:
        return RunError(f"cannot use the file of scores {self._path} ({error}): make room, or delete it")


def prefix_keys(model: str, top_k: int, ids: Sequence[int]) -> list[bytes]:
    """Keys of the positions after 1, 2, ... len(ids) tokens."""
    running = hashlib.sha256(f"{model}\0{top_k}\0".encode())
    keys = []
    for number in ids:
        running.update(int(number).to_bytes(4, "little"))
        keys.append(running.digest())
    return keys
