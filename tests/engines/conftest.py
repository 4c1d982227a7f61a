"""Engines with a handler that does what its message says; worker processes find it by an import path."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kilofed.engines.faulty import Faults, Faulty
from kilofed.engines.inprocess import InProcess
from kilofed.engines.opener import Opener
from kilofed.engines.pool import Pool
from kilofed.federation.cohort import Engine

HANDLER = '''
"""Handlers for tests of engines."""

import os
import time

import torch

from kilofed.errors import DataError, NonFiniteLoss


def obey(*words):
    """Echo, after doing what the message's first word says."""

    def handle(client, body):
        if body == b"die":
            os._exit(3)
        if body == b"sleep":
            time.sleep(600)
        if body == b"slow":
            time.sleep(0.3)
        if body == b"refuse":
            raise NonFiniteLoss(f"client {client}: nothing to learn: at all")
        if body == b"fail":
            raise ZeroDivisionError("a bug")
        if body == b"who":
            return f"{client} {os.getpid()} {torch.get_num_threads()} {' '.join(words)}".encode()
        if body == b"print":
            print("noise on stdout", flush=True)
        return body

    return handle


def refuse():
    raise DataError("there is no file rows.jsonl")


def fail():
    raise ZeroDivisionError("a bug at the start")


def die():
    os._exit(4)
'''

IDS = [0, 1, 2, 3, 4, 7]

Open = Callable[[str], Opener]


@pytest.fixture(scope="session")
def opener(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    """An opener for each handler by name."""
    folder = tmp_path_factory.mktemp("handlers")
    (folder / "kilofed_test_handlers.py").write_text(HANDLER)
    sys.path.insert(0, str(folder))
    yield lambda name: Opener(f"kilofed_test_handlers:{name}", ("a", "b"), threads=1)
    sys.path.remove(str(folder))


def start(name: str, opener: Open) -> Engine:
    """An engine by name, over IDS."""
    if name == "pool":
        return Pool(IDS, opener("obey"), workers=2, timeout=300)
    if name == "flower":
        if not (importlib.util.find_spec("flwr") and importlib.util.find_spec("ray")):
            pytest.skip("Flower's simulation is not installed: pip install 'kilofed[flower]'")
        from kilofed.engines.flower import Flower

        return Flower(IDS, opener("obey"), workers=2, timeout=300)
    if name == "stream":
        if not importlib.util.find_spec("grpc"):
            pytest.skip("gRPC is not installed: pip install 'kilofed[stream]'")
        from kilofed.engines.stream import Stream

        return Stream(IDS, opener("obey"), timeout=300)
    plain = InProcess(IDS, opener("obey").open())
    return Faulty(plain, Faults()) if name == "faulty" else plain


SEPARATE = [
    "pool",
    pytest.param("stream", marks=pytest.mark.slow),
    pytest.param("flower", marks=[pytest.mark.slow, pytest.mark.filterwarnings("ignore")]),
]


@pytest.fixture(scope="module")
def started(opener: Open) -> Iterator[Callable[[str], Engine]]:
    """An engine by name; one instance for a file's tests, as a run uses one for all rounds."""
    made: dict[str, Engine] = {}

    def get(name: str) -> Engine:
        if name not in made:
            made[name] = start(name, opener)
        return made[name]

    yield get
    for engine in made.values():
        engine.close()


@pytest.fixture(params=["inprocess", "faulty", *SEPARATE])
def engine(request: pytest.FixtureRequest, started: Callable[[str], Engine]) -> Engine:
    """Every engine."""
    return started(request.param)


@pytest.fixture(params=SEPARATE)
def separate(request: pytest.FixtureRequest, started: Callable[[str], Engine]) -> Engine:
    """Every engine whose clients live in processes of their own."""
    return started(request.param)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a run would keep client states."""
    return tmp_path / "clients"
