"""Operations are those of the textbook, and a run whose costs are counted learns the same."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import kilofed
from kilofed.config.recipe import Recipe
from kilofed.costs import environment, measurement
from kilofed.errors import RunError
from kilofed.federation.address import Address
from kilofed.payload import Payload
from kilofed.runs.sites import Sites


def test_a_linear_layer_costs_two_operations_per_weight_and_row_and_twice_that_back() -> None:
    layer, x = torch.nn.Linear(7, 5), torch.randn(3, 7, requires_grad=True)
    with measurement.counted() as forward:
        y = layer(x)
    with measurement.counted() as backward:
        y.sum().backward()
    assert (forward.flops, backward.flops) == (2 * 3 * 7 * 5, 2 * 2 * 3 * 7 * 5)
    assert forward.seconds > 0
    assert forward.peak_memory_bytes > 1 << 20


def test_attention_on_the_cpu_is_two_products_forward_and_five_back() -> None:
    q = torch.randn(1, 2, 6, 4, requires_grad=True)
    with measurement.counted() as forward:
        y = scaled_dot_product_attention(q, q, q, is_causal=True)
    with measurement.counted() as backward:
        y.sum().backward()
    product = 2 * 2 * 6 * 6 * 4
    assert (forward.flops, backward.flops) == (2 * product, 5 * product)


@pytest.fixture
def measured(tiny_recipe: Recipe) -> Recipe:
    return replace(tiny_recipe, evaluate=replace(tiny_recipe.evaluate, costs=True, generate=0, baselines=()))


def test_counting_changes_last_bits_at_most_and_finds_the_clients_at_work(measured: Recipe, tmp_path) -> None:
    plain = replace(measured, evaluate=replace(measured.evaluate, costs=False))
    with_costs, without = kilofed.run(measured, out=tmp_path / "a"), kilofed.run(plain, out=tmp_path / "b")
    states = [Payload.decode((one.folder / "state.safetensors").read_bytes()).tensors for one in (with_costs, without)]
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=1e-4, atol=1e-5)
    assert without.results.costs is None
    found = with_costs.results.costs
    assert found
    assert found.client.flops > 0 == found.server.flops  # FedAvg only adds.
    assert found.client.num_messages == 1
    assert json.loads((tmp_path / "a" / "clients" / "0" / measurement.FILE).read_text())["flops"] > 0


def test_sites_are_counted_in_round_1_and_weighed_in_round_2(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = Sites(tiny_recipe)
    measured = measurement.MeasuredSites(sites.site, tmp_path)

    def tell(number: int, round: int) -> dict[str, float]:
        ask = Payload(sites.store.start(tiny_recipe.model), Address("fit", "mean", round, 0).scalars)
        assert Payload.decode(measured.handle(number, ask.encode())).tensors
        found = json.loads((tmp_path / str(number) / measurement.FILE).read_text("utf-8"))
        assert isinstance(found, dict)
        return found

    first = tell(1, 1)
    assert first["flops"] > 0
    assert first["num_messages"] == 1
    assert tell(1, 1)["flops"] == 2 * first["flops"]
    assert tell(3, 1)["num_messages"] == 1
    monkeypatch.setattr(environment, "reset_peak_memory", lambda: True)
    monkeypatch.setattr(environment, "own_peak_memory", lambda: 12345)
    assert tell(1, 2) == {**tell(1, 3), "flops": 2 * first["flops"], "peak_memory_bytes": 12345}
    assert measured.spent[3].peak_memory_bytes > 1 << 20  # It had no second round yet.
    assert {path.name for path in tmp_path.iterdir()} == {"1", "3"}


def test_where_the_peak_cannot_be_forgotten_that_of_round_1_stands(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = Sites(tiny_recipe)
    measured = measurement.MeasuredSites(sites.site, tmp_path)
    monkeypatch.setattr(environment, "reset_peak_memory", lambda: False)
    for round in (1, 2):
        ask = Payload(sites.store.start(tiny_recipe.model), Address("fit", "mean", round, 0).scalars)
        measured.handle(0, ask.encode())
        if round == 1:
            before = (tmp_path / "0" / measurement.FILE).read_bytes()
            monkeypatch.setattr(environment, "own_peak_memory", lambda: 12345)
    assert (tmp_path / "0" / measurement.FILE).read_bytes() == before


@pytest.mark.slow
def test_worker_processes_count_as_one_process_does(measured: Recipe, tmp_path) -> None:
    pooled = replace(measured, engine=replace(measured.engine, name="pool", workers=1))
    flops = [kilofed.run(one, out=tmp_path / one.engine.name).results.costs for one in (measured, pooled)]
    assert flops[0].client.flops == flops[1].client.flops
    assert flops[0].server.flops == flops[1].server.flops


@pytest.mark.slow
def test_a_process_does_not_count_the_memory_of_the_one_that_started_it() -> None:
    large = torch.ones(100_000_000)  # 400 MB, all of it touched.
    code = "from kilofed.costs import environment\nprint(environment.own_peak_memory())"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 300e6 < large.nbytes  # torch itself takes more than half of that.
    assert large.nbytes < measurement.environment.own_peak_memory()


def kept(folder: Path, run: str = "ab") -> Path:
    """Costs of three unequal clients and of the server."""
    for client, flops in ((3, 10), (10, 20), (41, 60)):
        cost = measurement.Cost(flops, 0.5, 2, 1000 * client)
        measurement.write(folder / "clients" / str(client) / measurement.FILE, cost, run)
    measurement.write(folder / measurement.SERVER, measurement.Cost(7, 0.25, 1, 99), run)
    return folder


def test_costs_are_read_as_means_over_clients(tmp_path: Path) -> None:
    found = measurement.read(kept(tmp_path), "ab")
    assert found
    assert (found.client.flops, found.client.num_messages, found.client.peak_memory_bytes) == (30, 2, 41_000)
    assert (found.server.flops, found.server.seconds) == (7, 0.25)
    (tmp_path / measurement.SERVER).unlink()
    assert measurement.read(tmp_path, "ab") is None


@pytest.mark.parametrize("name", ["server-cost.json", "clients/10/cost.json"])
@pytest.mark.parametrize("damage", ["cut", "edit", "another run"])
def test_damaged_or_foreign_costs_are_refused_by_name(tmp_path: Path, name: str, damage: str) -> None:
    path, text = kept(tmp_path / "run") / name, (kept(tmp_path / "other", "cd") / name).read_text("utf-8")
    if damage != "another run":
        text = path.read_text("utf-8")
        text = text[:-5] if damage == "cut" else text.replace('"flops": ', '"flops": 1')
    path.write_text(text, "utf-8")
    with pytest.raises(RunError, match=rf"{name} (is not JSON|does not hold what its sha256 says|is of another run)"):
        measurement.read(tmp_path / "run", "ab")
