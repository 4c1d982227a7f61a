"""Flower's simulation gives what the in-process engine gives: the same state, the same ledger, bit for bit."""

import importlib.util
import json
import re
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from kilofed.config.recipe import EngineSpec, Recipe
from kilofed.config.tables import to_table
from kilofed.engines import open_engine
from kilofed.errors import RunError
from kilofed.federation.address import Address
from kilofed.federation.cohort import Cohort
from kilofed.federation.ledger import Ledger
from kilofed.payload import Payload
from kilofed.runs.sites import Sites

HAVE = bool(importlib.util.find_spec("flwr") and importlib.util.find_spec("ray"))
needs_flower = pytest.mark.skipif(
    not HAVE, reason="Flower's simulation is not installed: pip install 'kilofed[flower]'"
)


def run(recipe: Recipe, spec: EngineSpec, folder: Path) -> tuple[bytes, str]:
    """Two rounds of `recipe`; the server's state and the ledger without its seconds."""
    folder.mkdir()
    sites = Sites(recipe, folder / "clients")
    sites.method.setup(server := sites.server())
    text = json.dumps(to_table(recipe))
    with (
        closing(Ledger(folder / "ledger.jsonl")) as ledger,
        closing(open_engine(spec, sites.client_ids(), text, folder / "clients", sites.handle)) as engine,
    ):
        for number in range(1, recipe.rounds + 1):
            server.round = number
            cohort = Cohort(engine.client_ids(), engine, ledger, sites.policy, round=number)
            sites.method.round(server, cohort)
            assert not cohort.failures
    lines = (folder / "ledger.jsonl").read_text()
    return Payload(server.state).encode(), re.sub(r'"seconds":[^}]*', "", lines)


@pytest.mark.parametrize(
    "name", ["pool", pytest.param("flower", marks=[needs_flower, pytest.mark.filterwarnings("ignore")])]
)
@pytest.mark.slow
def test_fedavg_ends_in_the_same_bytes_as_in_process(name: str, tiny_recipe: Recipe, tmp_path: Path) -> None:
    spec = EngineSpec("inprocess", workers=2, threads=1, timeout=300)
    state, ledger = run(tiny_recipe, spec, tmp_path / "inprocess")
    assert ledger.count('"direction":"up"') == 4 * tiny_recipe.rounds
    other_state, other_ledger = run(tiny_recipe, replace(spec, name=name), tmp_path / name)  # type: ignore[arg-type]
    assert other_state == state
    assert other_ledger == ledger


@pytest.mark.slow
@needs_flower
@pytest.mark.filterwarnings("ignore")
def test_a_site_that_cannot_be_opened_in_an_actor_says_why(tiny_recipe: Recipe, tmp_path: Path) -> None:
    gone = replace(tiny_recipe, model=replace(tiny_recipe.model, path=str(tmp_path / "gone")))
    text = json.dumps(to_table(gone))
    with closing(open_engine(EngineSpec("flower", timeout=300), [0, 1], text, tmp_path, Sites(gone).handle)) as engine:
        asked = Address("fit", "mean", 1, 0)
        ((_, body),) = engine.exchange({0: Payload(scalars=asked.scalars).encode()})
    reply = Payload.decode(body)
    assert re.match(r"model directory .*gone does not exist", str(reply.scalars["@error"]))
    assert reply.scalars["@"] == asked.answered(0)["@"]


@pytest.mark.slow
@needs_flower
@pytest.mark.filterwarnings("ignore")
def test_two_simulations_in_one_process_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine = open_engine(EngineSpec("flower"), [0], "{}", tmp_path, lambda client, body: body)
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    with pytest.raises(RunError, match="close the other engine first"):
        list(engine.exchange({0: b""}))


def test_without_flower_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delitem(sys.modules, "kilofed.engines.flower", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"pip install 'kilofed\[flower\]'"):
        open_engine(EngineSpec("flower"), [0], "{}", tmp_path, lambda client, body: body)
