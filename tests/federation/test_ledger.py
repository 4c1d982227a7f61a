"""The ledger is the only meter: rows in order, exact sums, broken lines named."""

import errno
import io
import os
import tracemalloc
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kilofed.errors import RunError
from kilofed.federation.ledger import Ledger, Row

ROWS = [
    Row(1, 0, "fit", "mean", "down", 0, 100, 0.0),
    Row(1, 0, "fit", "mean", "down", 2, 100, 0.0),
    Row(1, 0, "fit", "mean", "up", 0, 60, 0.5),
    Row(1, 1, "look", "call", "down", 2, 7, 0.0),
    Row(1, 1, "look", "call", "up", 2, 9, 0.25),
    Row(2, 0, "fit", "mean", "down", 0, 1000, 0.0),
]


def filled(path: Path | None) -> Ledger:
    ledger = Ledger(path)
    for row in ROWS:
        ledger.add(row)
    return ledger


def check_sums(ledger: Ledger) -> None:
    assert list(ledger.rows()) == ROWS
    assert (ledger.total("down"), ledger.total("up")) == (1207, 69)
    assert ledger.per_client("down") == {0: 1100, 2: 107}
    assert ledger.per_client("up") == {0: 60, 2: 9}
    assert ledger.num_exchanges == 3


def test_sums_are_those_of_the_rows_in_memory() -> None:
    check_sums(filled(None))


def test_sums_are_those_of_the_rows_on_the_disk(tmp_path: Path) -> None:
    with closing(filled(tmp_path / "ledger.jsonl")) as ledger:
        check_sums(ledger)


def test_a_ledger_that_is_opened_again_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    filled(path).close()
    with closing(Ledger(path)) as again:
        check_sums(again)
        again.add(Row(2, 0, "fit", "mean", "up", 0, 31, 1.0))
        assert again.total("up") == 100
    with closing(Ledger(path)) as third:
        assert len(list(third.rows())) == len(ROWS) + 1


def test_synced_rows_are_on_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with closing(filled(path)) as ledger:
        ledger.sync()
        assert len(path.read_text("utf-8").splitlines()) == len(ROWS)


@pytest.mark.parametrize("line", ["{", '{"round":1}', "[1]", '{"colour":1}'])
def test_a_broken_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "ledger.jsonl"
    filled(path).close()
    path.write_text(path.read_text("utf-8") + line + "\n", "utf-8")
    with pytest.raises(RunError, match=rf"ledger\.jsonl line {len(ROWS) + 1} is not a ledger row"):
        Ledger(path)


def test_rows_on_the_disk_do_not_stay_in_memory(tmp_path: Path) -> None:
    with closing(Ledger(tmp_path / "ledger.jsonl")) as ledger:
        ledger.add(ROWS[0])
        tracemalloc.start()
        for number in range(1000, 4000):
            ledger.add(Row(1, 0, "fit", "mean", "down", 0, number, 0.0))
        grown, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert grown < 400_000  # Rows kept would take half as much again.


def test_a_full_disk_is_said_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = filled(tmp_path / "ledger.jsonl")
    with monkeypatch.context() as patch:

        def no_space(*_: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(os, "fsync", no_space)
        with pytest.raises(RunError, match=r"cannot write .*ledger\.jsonl \(No space left on device\): make room"):
            ledger.close()
    with closing(Ledger(tmp_path / "ledger.jsonl")) as again:
        check_sums(again)


def test_an_exchange_that_shows_every_reply_is_no_mean(tmp_path: Path) -> None:
    # What privacy costs is counted in means: of these three exchanges one was a call.
    for ledger in (filled(None), filled(tmp_path / "ledger.jsonl")):
        with closing(ledger):
            assert (ledger.num_exchanges, ledger.num_means) == (3, 2)


def test_clients_come_in_ascending_order_whoever_answered_first() -> None:
    ledger = Ledger()
    for row in reversed(ROWS):
        ledger.add(row)
    assert list(ledger.per_client("down")) == list(ledger.per_client("up")) == [0, 2]


def test_rows_that_no_longer_fit_on_the_disk_are_said_when_they_are_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "open", lambda *_, **__: Full())
    with pytest.raises(RunError, match=r"cannot write .*ledger\.jsonl \(No space left on device\)"):
        Ledger(tmp_path / "ledger.jsonl").add(ROWS[0])


def tally_of(rows: list[Row]) -> tuple[int, str]:
    ledger = Ledger()
    for row in rows:
        ledger.add(row)
    return ledger.tally.num, ledger.tally.sha256


def test_the_tally_knows_every_row_and_its_place_but_not_its_seconds() -> None:
    whole = tally_of(ROWS)
    assert whole[0] == len(ROWS)
    assert tally_of([replace(row, seconds=9.5) for row in ROWS]) == whole
    others = [ROWS[:-1], ROWS[::-1], [ROWS[1], ROWS[0], *ROWS[2:]], [*ROWS, ROWS[-1]]]
    changes: list[dict[str, Any]] = [
        {"round": 3}, {"exchange": 2}, {"action": "fix"}, {"verb": "call"}, {"direction": "up"}, {"client": 41}, {"bytes": 9},
    ]  # fmt: skip
    others += [[*ROWS[:-1], replace(ROWS[-1], **change)] for change in changes]
    assert len({tally_of(rows)[1] for rows in others} | {whole[1]}) == len(others) + 1


def test_the_tally_goes_on_where_the_file_ended(tmp_path: Path) -> None:
    with closing(Ledger(tmp_path / "ledger.jsonl")) as ledger:
        for row in ROWS[:3]:
            ledger.add(row)
    with closing(Ledger(tmp_path / "ledger.jsonl")) as ledger:
        for row in ROWS[3:]:
            ledger.add(row)
        assert (ledger.tally.num, ledger.tally.sha256) == tally_of(ROWS)
        assert ledger.num_means == 2
