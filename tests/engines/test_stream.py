"""The stream: a process per client on a line of its own, and who may open one."""

import json
import logging
import multiprocessing
import os
import signal
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

pytest.importorskip("grpc", reason="gRPC is not installed: pip install 'kilofed[stream]'")

import grpc

import kilofed
from kilofed.config.fields import Value
from kilofed.config.recipe import EngineSpec
from kilofed.config.tables import changed, from_table
from kilofed.engines import open_engine, stream
from kilofed.engines.opener import Opener
from kilofed.engines.stream import CHUNK, Stream
from kilofed.errors import DataError, RecipeError, RunError

pytestmark = pytest.mark.slow


def homes(engine: Stream, clients: list[int]) -> list[int]:
    return [int(reply.split()[1]) for _, reply in engine.exchange(dict.fromkeys(clients, b"who"))]


def test_each_client_has_a_process_that_stays(opener) -> None:  # type: ignore[no-untyped-def]
    before = set(multiprocessing.active_children())
    engine = Stream([3, 5], opener("obey"), timeout=300)
    assert set(multiprocessing.active_children()) == before  # None starts before its client is asked.
    first = homes(engine, [3, 5])
    assert len({*first, os.getpid()}) == 3
    assert homes(engine, [5, 3]) == first
    engine.close()
    engine.close()
    assert set(multiprocessing.active_children()) == before


def test_framing_is_counted_apart_and_exactly(opener) -> None:  # type: ignore[no-untyped-def]
    with closing(Stream([0], opener("obey"), timeout=300)) as engine:
        list(engine.exchange({0: b"x"}))
        started = engine.overhead()
        list(engine.exchange({0: bytes(10)}))
        each = stream.HEAD.size + stream.PREFIX
        assert engine.overhead() - started == 2 * each
        assert started == 3 * each  # The third is the word that it is ready.
        list(engine.exchange({0: bytes(2 * CHUNK + 1)}))
        assert engine.overhead() - started == 2 * each + 2 * (each + 2 * stream.PREFIX)


@pytest.mark.parametrize(
    ("handler", "error", "message"),
    [
        ("refuse", DataError, "^there is no file rows.jsonl$"),
        ("fail", RuntimeError, r"client 4 at its start failed:(.|\n)*ZeroDivisionError: a bug at the start"),
        ("die", RunError, r"client 4 ended at its start with exit code 4"),
    ],
)
def test_a_process_that_cannot_start_says_why(opener, handler: str, error: type[Exception], message: str) -> None:  # type: ignore[no-untyped-def]
    with closing(Stream([4], Opener(opener(handler).path), timeout=300)) as engine:
        with pytest.raises(error, match=message):
            list(engine.exchange({4: b"x"}))


def test_a_stranger_without_the_token_is_turned_away(opener, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]
    with closing(Stream([0, 1], opener("obey"), timeout=300)) as engine:
        list(engine.exchange({0: b"x"}))
        token = engine._homes[0].token
        for client, shown in (("0", token), ("0", "0" * 32), ("1", token), ("x", token), ("", "")):
            with grpc.insecure_channel(engine._address, stream.OPTIONS) as channel:
                call = channel.stream_stream(f"/{stream.SERVICE}/{stream.WORK}")
                with pytest.raises(grpc.RpcError) as error:
                    next(call(iter([b""]), metadata=((stream.CLIENT, client), (stream.TOKEN, shown))))
                assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert caplog.text.count("is refused") == 5
        assert list(engine.exchange({0: b"y", 1: b"y"})) == [(0, b"y"), (1, b"y")]


def test_a_process_killed_at_work_is_left_out_and_comes_back(opener, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]
    with closing(Stream([0, 1], opener("obey"), timeout=300)) as engine:
        _, victim = homes(engine, [0, 1])
        threading.Timer(0.5, os.kill, (victim, signal.SIGKILL)).start()
        with caplog.at_level(logging.WARNING):
            began = time.monotonic()
            assert list(engine.exchange({0: b"x", 1: b"sleep"})) == [(0, b"x")]
        assert time.monotonic() - began < 60
        assert "the process of client 1 died (exit code -9)" in caplog.text
        assert homes(engine, [1]) != [victim]


def test_a_wrong_recipe_is_refused_by_name(folder: Path) -> None:
    with closing(open_engine(EngineSpec("stream"), [0], '{"moel": 1}', folder, lambda c, b: b)) as engine:
        with pytest.raises(RecipeError, match="moel is not a field of Recipe"):
            list(engine.exchange({0: b"x"}))


@pytest.mark.parametrize(
    "method",
    [
        {"method": "fedavg"},
        {"method": "split", "method.labels": "client", "method.server_part": "averaged"},
        {"method": "split", "method.activations": "int8", "method.gradients": "int8"},
    ],
    ids=["fedavg", "u-shape", "int8"],
)
def test_a_run_gives_the_same_state_and_ledger_as_in_process(
    method: dict[str, Value], tiny_table: dict[str, Value], tmp_path: Path
) -> None:
    few = {"evaluate.baselines": [], "evaluate.generate": 0, "engine.threads": 1, "data.partition.num_clients": 2}
    recipe = changed(from_table(tiny_table), {**few, **method, "data.partition.kind": "iid"})  # type: ignore[dict-item]
    runs = {
        name: kilofed.run(changed(recipe, {"engine.name": name}), out=tmp_path / name)
        for name in ("inprocess", "stream")
    }
    found = {name: json.loads((run.folder / "results.json").read_text()) for name, run in runs.items()}
    assert found["stream"]["state_sha256"] == found["inprocess"]["state_sha256"]
    assert found["stream"]["bytes_total"] == found["inprocess"]["bytes_total"]
    assert found["stream"]["exchanges"] == found["inprocess"]["exchanges"]
    assert found["inprocess"]["framing_bytes"] == 0 < found["stream"]["framing_bytes"]
