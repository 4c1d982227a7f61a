"""What is committed is on the disk, in this order: rows, metrics, state; and the state says what the others hold."""

import os
from contextlib import closing
from pathlib import Path

import pytest
import torch

from kilofed.config.recipe import TrainSpec
from kilofed.federation.ledger import Row, Tally
from kilofed.federation.parties import Server
from kilofed.federation.states import States
from kilofed.runs import commit
from kilofed.runs.journal import Journal, of_metrics
from kilofed.runs.resuming import cut_back, of_ledger

CLIENTS = (3, 10, 41)


def server(round: int) -> Server:
    return Server(0, 3, TrainSpec(), state={"w": torch.full((2, 3), float(round))}, round=round)


def opened(folder: Path) -> Journal:
    last = commit.read(folder)
    metrics = Tally()
    if last:
        cut_back(folder / "ledger.jsonl", of_ledger, last.ledger, last.round)
        metrics = cut_back(folder / "metrics.jsonl", of_metrics, last.metrics, last.round)
    return Journal(folder, last, metrics, run="ab" * 8, recipe="cd" * 32)


def play(journal: Journal, round: int, verbs: tuple[str, ...] = ("mean",)) -> None:
    """A round with an exchange per verb."""
    for exchange, verb in enumerate(verbs):
        for client in CLIENTS:
            journal.ledger.add(Row(round, exchange, "fit", verb, "up", client, 100 * client, 0.25))
    journal.commit(server(round), CLIENTS, {"round": round, "loss": 1.0 / round, "seconds": 0.5})


def test_the_state_says_what_the_other_files_hold(tmp_path: Path) -> None:
    with closing(opened(tmp_path)) as journal:
        journal.add_line({"round": 0, "loss": 2.0})
        play(journal, 1)
        play(journal, 2, ("call", "mean", "mean"))
    found = commit.read(tmp_path)
    assert found
    assert (found.round, found.ledger.num, found.metrics.num) == (2, 12, 3)
    again = cut_back(tmp_path / "ledger.jsonl", of_ledger, found.ledger, 2)
    assert (again.num, again.sha256) == (found.ledger.num, found.ledger.sha256)


def test_released_means_are_counted_on_and_calls_are_none(tmp_path: Path) -> None:
    with closing(opened(tmp_path)) as journal:
        play(journal, 1, ("mean", "call", "mean"))
    with closing(opened(tmp_path)) as journal:
        play(journal, 2, ("call",))
        play(journal, 3, ("mean",))
    found = commit.read(tmp_path)
    assert found
    assert found.num_means == 3


def test_means_are_not_counted_from_the_ledger(tmp_path: Path) -> None:
    with closing(opened(tmp_path)) as journal:
        play(journal, 1, ("mean", "mean"))
    last = commit.read(tmp_path)
    (tmp_path / "ledger.jsonl").write_text("", "utf-8")
    with closing(Journal(tmp_path, last, Tally(), run="", recipe="")) as journal:
        play(journal, 2)
    found = commit.read(tmp_path)
    assert found
    assert found.num_means == 3


def test_the_newest_state_of_each_client_of_the_cohort_is_noted_and_others_are_kept(tmp_path: Path) -> None:
    for client, when in ((3, (1, 0)), (3, (1, 1)), (10, (1, 0)), (99, (1, 0))):
        States(tmp_path / "clients" / str(client), client).keep(when, {"x": torch.ones(client)})
    with closing(opened(tmp_path)) as journal:
        play(journal, 1)
    first = commit.read(tmp_path)
    States(tmp_path / "clients" / "41", 41).keep((2, 0), {"x": torch.ones(2)})
    States(tmp_path / "clients" / "41", 41).keep((3, 0), {"x": torch.ones(2)})  # As of a round that was killed.
    with closing(opened(tmp_path)) as journal:
        journal.commit(server(2), (41,), {"round": 2})
    second = commit.read(tmp_path)
    assert first
    assert second
    assert {client: mark.when for client, mark in first.clients.items()} == {3: (1, 1), 10: (1, 0)}
    assert {client: mark.when for client, mark in second.clients.items()} == {3: (1, 1), 10: (1, 0), 41: (2, 0)}
    assert second.clients[3] == first.clients[3]


def test_a_round_is_committed_when_its_rows_and_metrics_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing counts as being on the disk but what an fsync has covered."""
    durable: dict[str, int] = {}
    at_commit: list[tuple[int, int]] = []
    fsync, replace = os.fsync, os.replace

    def syncing(handle: int) -> None:
        fsync(handle)
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if path.is_file():
            durable[path.name] = path.stat().st_size

    def replacing(source: Path, target: Path) -> None:
        if target.name == commit.FILE:
            assert durable[Path(source).name] == Path(source).stat().st_size
            at_commit.append((durable["ledger.jsonl"], durable["metrics.jsonl"]))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", replacing)
    sizes = []
    with closing(opened(tmp_path)) as journal:
        for round in (1, 2):
            play(journal, round)
            sizes.append(tuple((tmp_path / name).stat().st_size for name in ("ledger.jsonl", "metrics.jsonl")))
            assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == round
    assert at_commit == sizes
    assert len(set(sizes)) == 2


@pytest.mark.parametrize("file", ["ledger.jsonl", "metrics.jsonl"])
def test_a_disk_that_refuses_rows_or_metrics_commits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    fsync = os.fsync

    def full(handle: int) -> None:
        if os.readlink(f"/proc/self/fd/{handle}").endswith(file):
            raise OSError(28, "No space left on device")
        fsync(handle)

    with closing(opened(tmp_path)) as journal:
        play(journal, 1)
        before = (tmp_path / commit.FILE).read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(ValueError, match=f"cannot write .*{file} .No space left"):
                play(journal, 2)
    assert (tmp_path / commit.FILE).read_bytes() == before


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ({"seconds": 9.0, "framing_bytes": 1}, False),
        ({"failures": {"10": "other words"}}, False),
        ({"failures": {"3": "no answer"}}, True),
        ({"loss": 0.5}, True),
        ({"clients": [{"id": 3, "loss": 1.0}]}, True),
    ],
)
def test_a_line_of_metrics_is_known_by_what_does_not_vary(change: dict[str, object], seen: bool) -> None:
    line: dict[str, object] = {"round": 1, "loss": 1.0, "failures": {"10": "no answer"}, "seconds": 1.0}
    assert (of_metrics({**line, **change}) != of_metrics(line)) is seen
    assert of_metrics(dict(reversed(line.items()))) == of_metrics(line)
