"""What is foreseen of rounds that have not run is what their ledger then shows, for clients of unequal size."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from tests.conftest import SIZES

import kilofed
from kilofed.config.fields import Value
from kilofed.config.recipe import Recipe
from kilofed.config.tables import changed
from kilofed.federation import ledger
from kilofed.federation.workload import Costs
from kilofed.methods.fedavg import FedAvg
from kilofed.records.facts import ActionForecast
from kilofed.runs import preview as module
from kilofed.runs.preview import (
    bench_of,
    client_memory,
    client_works,
    num_processes,
    preview_of,
    replies,
    rounds,
    run_memory,
    spans,
    traffic,
    turn_to,
)
from kilofed.runs.sites import Sites


@pytest.fixture
def uneven(uneven: Recipe) -> Recipe:
    """Unequal clients, two of them drawn in each of three rounds."""
    few: Mapping[str, Value] = {"evaluate.generate": 0, "evaluate.baselines": [], "rounds": 3, "cohort": 2}
    return changed(uneven, few)


def measured(folder: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Least and most bytes per client and round, by action and direction."""
    sums: dict[tuple[str, str], dict[tuple[int, int], int]] = {}
    for row in ledger.read(folder / "ledger.jsonl"):
        by = sums.setdefault((row.action, row.direction), {})
        by[row.round, row.client] = by.get((row.round, row.client), 0) + row.bytes
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for (action, way), by in sums.items():
        found.setdefault(action, {})[way] = min(by.values()), max(by.values())
    return found


@pytest.mark.parametrize("method", ["fedavg", "split"])
def test_spans_are_those_of_the_ledger(method: str, uneven: Recipe, tmp_path: Path) -> None:
    recipe = changed(uneven, {"method": method})
    sites = Sites(recipe)
    told = spans(sites, preview_of(sites, bench_of(sites)))
    done = kilofed.run(recipe, out=tmp_path / "run")
    assert {one.action: {"down": one.down, "up": one.up} for one in told} == measured(done.folder)
    assert all(isinstance(one, ActionForecast) and one.exchanges[0] >= 1 for one in told)
    assert any(one.up[0] < one.up[1] for one in told) == (method == "split")  # Batches of unequal rows.


def test_a_preview_turns_to_the_clients_that_are_drawn(uneven: Recipe) -> None:
    sites = Sites(uneven)
    preview = preview_of(sites, bench_of(sites))
    drawn = []
    for number in (1, 2, 3):
        turn_to(preview, sites, number)
        drawn.append(tuple(preview.ids))
        assert sorted(traffic(sites, preview)) == sorted(preview.ids)
    assert all(len(ids) == 2 for ids in drawn)
    assert len(set(drawn)) > 1


def test_replies_hold_what_leaves_by_action(uneven: Recipe) -> None:
    sites = Sites(changed(uneven, {"method": "split"}))
    found = replies(sites, preview_of(sites, bench_of(sites)))
    assert sorted(found) == ["forward", "part"]
    assert len(found["forward"]) == 2 * len(found["part"]) == 4  # Two clients of two batches.


def test_longer_messages_and_more_clients_in_a_process_take_more_memory(uneven: Recipe) -> None:
    sites = Sites(changed(uneven, {"method": "split", "adapter.kind": "lora"}))
    bench = bench_of(sites)
    preview = preview_of(sites, bench)
    works, sent = client_works(sites, preview), traffic(sites, preview)
    one = client_memory(bench, works, sent)
    assert client_memory(bench, works, sent, together=9) > one  # Each keeps its activations while it waits.
    assert client_memory(bench, works, {}) <= one


def test_a_method_that_does_not_say_what_it_computes_has_no_memory(
    uneven: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = Sites(uneven)
    bench = bench_of(sites)
    assert run_memory(sites, preview_of(sites, bench), bench)
    monkeypatch.setattr(FedAvg, "costs", lambda _: Costs())
    assert run_memory(sites, preview_of(sites, bench), bench) is None


@pytest.mark.parametrize(
    ("num", "cohort", "most", "looked"), [(1, 0, 8, 1), (6, 0, 8, 2), (6, 0, 13, 4), (6, 2, 8, 4)]
)
def test_rounds_looked_at_are_bounded_by_clients(
    num: int, cohort: int, most: int, looked: int, uneven: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST", most)
    sites = Sites(changed(uneven, {"rounds": num, "cohort": cohort}))
    assert list(rounds(sites, preview_of(sites, bench_of(sites)))) == list(range(1, looked + 1))


@pytest.mark.parametrize(("engine", "processes"), [("inprocess", 1), ("pool", 2), ("flower", 2), ("stream", 3)])
def test_memory_counts_the_processes_of_the_engine(engine: str, processes: int, uneven: Recipe) -> None:
    recipe = changed(uneven, {"engine.name": engine, "engine.workers": 2, "cohort": 0})
    assert num_processes(recipe.engine, len(SIZES)) == processes
    assert num_processes(replace(recipe.engine, workers=9), len(SIZES)) == (1 if engine == "inprocess" else 3)
    sites = Sites(recipe)
    bench = bench_of(sites)
    found = run_memory(sites, preview_of(sites, bench), bench)
    assert found is not None
    assert found > (processes + (engine != "inprocess")) * bench.weight_bytes(recipe.model)
