"""A process killed at any instant, resumed, ends in the bytes of one that was left alone."""

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kilofed.config.fields import Value

Order = Callable[..., dict[str, object]]
TESTS = Path(__file__).parent
VARIES = {"run", "seconds", "peak_memory_bytes", "files", "sha256"}
"""Of results: files of lines hold seconds, and so differ in their digests."""


@pytest.fixture(scope="module")
def table(tiny_model: Path, tiny_rows: Path) -> dict[str, Value]:
    return {
        "rounds": 3,
        "model": {"path": str(tiny_model)},
        "adapter": {"rank": 2},
        "data": {"source": str(tiny_rows), "holdout": 0.2, "max_length": 48},
        "method": {"name": "fixtures.stateful_method"},
        "train": {"steps": 1, "batch_size": 2, "lr": 0.01},
        "evaluate": {"generate": 0, "baselines": ["base"]},
    }


@pytest.fixture(scope="module")
def order(table: dict[str, Value], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Order]:
    """`order(folder, after=0.5)`: run or resume in a child of a warm process, and kill it as told."""
    words = tmp_path_factory.mktemp("killer") / "stderr"
    with words.open("w", encoding="utf-8") as stderr:
        killer = subprocess.Popen(
            [sys.executable, str(TESTS / "fixtures" / "killer.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    assert killer.stdin
    assert killer.stdout

    def give(folder: Path, **words: object) -> dict[str, object]:
        assert killer.stdin
        assert killer.stdout
        killer.stdin.write(json.dumps({"recipe": table, "folder": str(folder), **words}) + "\n")
        killer.stdin.flush()
        answer = killer.stdout.readline()
        assert answer, words.read_text("utf-8")[-3000:]
        return dict(json.loads(answer))

    yield give
    killer.stdin.close()
    killer.stdout.close()
    killer.wait()


@pytest.fixture(scope="module")
def whole(order: Order, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    """A run that was left alone, and how it went."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, order(folder)


def content(folder: Path) -> dict[str, object]:
    """Everything of a run that must not depend on being killed."""

    def lines(name: str) -> list[dict[str, object]]:
        rows = [json.loads(line) for line in (folder / name).read_text("utf-8").splitlines()]
        return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]

    results = json.loads((folder / "results.json").read_text("utf-8"))
    return {
        "state": (folder / "state.safetensors").read_bytes(),
        "clients": {file.name: file.read_bytes() for file in sorted(folder.glob("clients/*/*"))},
        "adapter": (folder / "adapter" / "adapter_model.safetensors").read_bytes(),
        "ledger": lines("ledger.jsonl"),
        "metrics": lines("metrics.jsonl"),
        "results": {k: v for k, v in results.items() if k not in VARIES},
        "files": sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix != ".html"),
    }


def survive(order: Order, folder: Path, kills: list[dict[str, object]]) -> int:
    """Run with these kills, one after the other, then to the end; how many kills hit."""
    hits = 0
    for kill in kills:
        answer = order(folder, **kill)
        hits += bool(answer["killed"])
        if not answer["killed"]:
            return hits
    assert not order(folder)["killed"]
    return hits


def at_random(order: Order, whole: tuple[Path, dict[str, object]], folder: Path, seed: int, kills: int) -> int:
    draw = random.Random(seed)
    longest = whole[1]["seconds"]
    assert isinstance(longest, float)
    hits = survive(order, folder, [{"after": draw.uniform(0, 0.8 * longest)} for _ in range(kills)])
    assert content(folder) == content(whole[0])
    return hits


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_a_random_instant_and_resumed(order: Order, whole, tmp_path: Path, seed: int) -> None:
    at_random(order, whole, tmp_path / "run", seed, 1)


@pytest.mark.parametrize(("call", "number"), [("write", 6), ("fsync", 7), ("replace", 8)])
def test_killed_inside_a_write_and_resumed(order: Order, whole, tmp_path: Path, call: str, number: int) -> None:
    assert survive(order, tmp_path / "run", [{"call": call, "number": number}]) == 1
    assert content(tmp_path / "run") == content(whole[0])


@pytest.mark.slow
def test_killed_twenty_times_at_random_instants_up_to_three_times_a_run(order: Order, whole, tmp_path: Path) -> None:
    hits = 0
    for seed in range(100):
        hits += at_random(order, whole, tmp_path / str(seed), seed, 3)
        if hits >= 20:
            return
    raise AssertionError(f"only {hits} kills hit a run that was still going")


@pytest.mark.slow
@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_killed_inside_each_of_its_writes(order: Order, whole, tmp_path: Path, call: str) -> None:
    calls = whole[1]["calls"]
    assert isinstance(calls, dict)
    assert calls[call] >= 10
    for number in range(1, calls[call] + 1):
        assert survive(order, tmp_path / str(number), [{"call": call, "number": number}]) == 1
        assert content(tmp_path / str(number)) == content(whole[0])
