"""The pool: who works where, what happens to workers that die or cannot start, and what users are told."""

import multiprocessing
import os
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from kilofed.config.recipe import EngineSpec
from kilofed.engines import open_engine
from kilofed.engines.inprocess import InProcess
from kilofed.engines.opener import Opener
from kilofed.engines.pool import Pool
from kilofed.errors import DataError, RecipeError, RunError


def worker_of(pool: Pool, clients: list[int]) -> list[int]:
    return [int(reply.split()[1]) for _, reply in pool.exchange(dict.fromkeys(clients, b"who"))]


def test_a_client_always_meets_the_same_worker(opener) -> None:  # type: ignore[no-untyped-def]
    with closing(Pool(range(6), opener("obey"), workers=2, timeout=300)) as pool:
        first = worker_of(pool, [0, 1, 2, 3, 4, 5])
        assert first[0::2] == [first[0]] * 3
        assert first[1::2] == [first[1]] * 3
        assert first[0] != first[1]
        assert worker_of(pool, [1, 3, 4]) == [first[1], first[1], first[0]]


def test_workers_end_with_the_pool(opener) -> None:  # type: ignore[no-untyped-def]
    before = set(multiprocessing.active_children())
    pool = Pool(range(6), opener("obey"), workers=2, timeout=300)
    workers = worker_of(pool, [0, 1])
    pool.close()
    pool.close()
    assert set(multiprocessing.active_children()) == before
    for number in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(number, 0)


def test_there_are_no_more_workers_than_clients(opener) -> None:  # type: ignore[no-untyped-def]
    with closing(Pool([5], opener("obey"), workers=8, timeout=300)) as pool:
        assert len(pool._workers) == 1
        assert list(pool.exchange({5: b"x"})) == [(5, b"x")]


@pytest.mark.parametrize(
    ("handler", "error", "message"),
    [
        ("refuse", DataError, "^there is no file rows.jsonl$"),
        ("fail", RuntimeError, r"worker \d at its start failed:(.|\n)*ZeroDivisionError: a bug at the start"),
        ("die", RunError, r"worker \d ended at its start with exit code 4"),
        ("nothing", RecipeError, "names no function; expected module:function"),
    ],
)
def test_a_start_that_fails_says_why(opener, handler: str, error: type[Exception], message: str) -> None:  # type: ignore[no-untyped-def]
    start = opener(handler)
    with closing(Pool(range(2), Opener(start.path), workers=1, timeout=300)) as pool:
        with pytest.raises(error, match=message):
            list(pool.exchange({0: b"x"}))


def test_a_worker_that_died_at_rest_costs_nobody(opener) -> None:  # type: ignore[no-untyped-def]
    with closing(Pool(range(2), opener("obey"), workers=1, timeout=300)) as pool:
        (number,) = worker_of(pool, [0])
        os.kill(number, 9)
        time.sleep(0.2)
        assert list(pool.exchange({0: b"x", 1: b"y"})) == [(0, b"x"), (1, b"y")]


def test_replies_ahead_of_their_turn_are_few(opener, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("kilofed.engines.pool.AHEAD", 2)
    with closing(Pool(range(40), opener("obey"), workers=2, timeout=300)) as pool:
        asks = {client: b"slow" if client == 0 else b"x" for client in range(40)}
        held = []
        receive = pool._receive

        def counted(timeout: float) -> dict[int, bytes | None]:
            found = receive(timeout)
            held.extend(found)
            return found

        monkeypatch.setattr(pool, "_receive", counted)
        assert next(iter(pool.exchange(asks))) == (0, b"slow")
        assert max(held) <= 4


def test_a_busy_worker_dies_with_a_killed_parent(opener, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    script = tmp_path / "script.py"
    script.write_text(
        "from kilofed.engines.opener import Opener\n"
        "from kilofed.engines.pool import Pool\n"
        "if __name__ == '__main__':\n"
        f"    pool = Pool([0], Opener({opener('obey').path!r}))\n"
        "    print(next(pool.exchange({0: b'who'}))[1].split()[1].decode(), flush=True)\n"
        "    list(pool.exchange({0: b'sleep'}))\n"
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths}
    ) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        time.sleep(0.5)
        parent.kill()
    for _ in range(100):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail(f"worker {worker} lives on")


def test_workers_do_not_write_to_stdout(opener, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    script = tmp_path / "script.py"
    script.write_text(
        "from kilofed.engines.opener import Opener\n"
        "from kilofed.engines.pool import Pool\n"
        "if __name__ == '__main__':\n"
        f"    pool = Pool([0], Opener({opener('obey').path!r}))\n"
        "    print(list(pool.exchange({0: b'print'})))\n"
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True, text=True, timeout=300, check=True, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.stdout == "[(0, b'print')]\n"
    assert "noise on stdout" in done.stderr


def test_engines_are_opened_by_name(folder: Path) -> None:
    engine = open_engine(EngineSpec("inprocess"), [2, 1], "{}", folder, lambda client, body: body)
    assert isinstance(engine, InProcess)
    assert list(engine.exchange({2: b"b", 1: b"a"})) == [(1, b"a"), (2, b"b")]
    with closing(open_engine(EngineSpec("pool", workers=1), [0], '{"moel": 1}', folder, lambda c, b: b)) as pool:
        with pytest.raises(RecipeError, match=r"moel is not a field of Recipe \(did you mean model\?\)"):
            list(pool.exchange({0: b"x"}))
