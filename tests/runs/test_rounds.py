"""Rounds are committed one by one: what was left after any of them goes on as if nothing had happened."""

import json
from collections.abc import Mapping
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import NoReturn

import pytest

from kilofed.config.fields import Value
from kilofed.config.recipe import Recipe
from kilofed.config.tables import changed
from kilofed.errors import KilofedError, NonFiniteLoss
from kilofed.federation.ledger import Ledger
from kilofed.federation.parties import Client
from kilofed.models import evaluation
from kilofed.payload import Payload
from kilofed.runs import commit
from kilofed.runs.rounds import run_rounds
from kilofed.runs.sites import Sites

SIZES = (3, 10, 41)
TIMES = ("seconds", "framing_bytes")


@pytest.fixture
def recipe(tiny_recipe: Recipe, tmp_path: Path) -> Recipe:
    """Four rounds of three clients with 3, 10 and 41 rows, all scored in every second round."""
    rows = [
        {"client": f"site {client}", "instruction": f"add {n} and {client}", "response": f"is {n + client}"}
        for client, size in enumerate(SIZES)
        for n in range(size)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return changed(tiny_recipe, {"data.source": str(tmp_path / "rows.jsonl"), "rounds": 4, "evaluate.every": 2})


def run(recipe: Recipe, folder: Path, most: int | None = None) -> list[dict[str, object]]:
    """Metrics of at most `most` rounds in a new process, as far as Python objects can be one."""
    folder.mkdir(exist_ok=True)
    sites = Sites(recipe, folder / "clients")
    with closing(run_rounds(sites, sites.server(folder=folder), sites.policy, folder)) as rounds:
        return [without_times(metrics) for _, metrics in islice(rounds, most)]


def without_times(metrics: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in metrics.items() if name not in TIMES}


def on_disk(folder: Path) -> tuple[bytes, list[dict[str, object]], int]:
    """The server's state, the metrics, and how many lines the ledger has."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    with closing(Ledger(folder / "ledger.jsonl")) as ledger:
        return (
            (folder / "state.safetensors").read_bytes(),
            [without_times(line) for line in lines],
            len(list(ledger.rows())),
        )


def test_a_round_is_on_the_disk_when_its_metrics_are_told(recipe: Recipe, tmp_path: Path) -> None:
    sites = Sites(recipe)
    with closing(run_rounds(sites, sites.server(), sites.policy, tmp_path)) as rounds:
        for number, metrics in rounds:
            state, lines, num_messages = on_disk(tmp_path)
            assert Payload.decode(state).scalars["round"] == number
            assert lines[-1] == without_times(json.loads(json.dumps(metrics)))
            assert [line["round"] for line in lines] == list(range(number + 1))
            assert num_messages == 2 * len(SIZES) * number
    assert number == 4


@pytest.mark.parametrize("method", [{}, {"method": "fedadam"}])
def test_left_after_any_round_and_begun_again_it_ends_in_the_same_bytes(
    recipe: Recipe, tmp_path: Path, method: dict[str, Value]
) -> None:
    recipe = changed(recipe, method)
    whole = run(recipe, tmp_path / "whole")
    parts = [metrics for most in (1, 2, None) for metrics in run(recipe, tmp_path / "parts", most)]
    assert parts == whole
    assert on_disk(tmp_path / "parts") == on_disk(tmp_path / "whole")
    assert run(recipe, tmp_path / "whole") == []  # It is finished.


def test_held_out_rows_are_scored_before_the_first_round_as_asked_and_after_the_last(
    recipe: Recipe, tmp_path: Path
) -> None:
    run(changed(recipe, {"evaluate.every": 3}), tmp_path / "run")
    _, lines, _ = on_disk(tmp_path / "run")
    assert [line["round"] for line in lines if "accuracy" in line] == [0, 3, 4]
    assert [one["id"] for one in lines[-1]["clients"]] == [0, 1, 2]  # type: ignore[index, attr-defined]


def test_what_lies_beyond_the_state_is_cut_off(recipe: Recipe, tmp_path: Path) -> None:
    run(recipe, tmp_path / "whole")
    run(recipe, tmp_path / "cut", 2)
    state = (tmp_path / "cut" / "state.safetensors").read_bytes()
    run(recipe, tmp_path / "cut", 1)
    (tmp_path / "cut" / "state.safetensors").write_bytes(state)  # Killed before the third commit.
    run(recipe, tmp_path / "cut")
    assert on_disk(tmp_path / "cut") == on_disk(tmp_path / "whole")


def no_fit(client: Client, objective: object) -> NoReturn:
    raise NonFiniteLoss("the loss is nan")


def test_a_failed_round_leaves_the_state_of_the_one_before(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(recipe, tmp_path / "run", 1)
    state = (tmp_path / "run" / "state.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Client, "fit_round", no_fit)
        with pytest.raises(KilofedError, match=r"round 2: client 0: the loss is nan; the state of round 1 is kept"):
            run(recipe, tmp_path / "run")
    assert (tmp_path / "run" / "state.safetensors").read_bytes() == state
    run(recipe, tmp_path / "run")
    run(recipe, tmp_path / "whole")
    assert on_disk(tmp_path / "run") == on_disk(tmp_path / "whole")


def test_a_method_that_is_done_early_is_scored_after_its_last_round(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    monkeypatch.setenv("KILOFED_TRUST", "fixtures.brief_method")
    run(changed(recipe, {"method": "fixtures.brief_method", "evaluate.every": 3}), tmp_path / "run")
    _, lines, _ = on_disk(tmp_path / "run")
    assert [line["round"] for line in lines] == [0, 1, 2]
    assert [line["round"] for line in lines if "accuracy" in line] == [0, 2]


KD = {"method": "kd", "method.public_rows": 3, "method.batch_size": 4, "method.top_k": 8, "data.public_share": 0.2}
METHODS: list[dict[str, Value]] = [
    {"method": "fedavg"},
    {**KD},
    {"method": "split"},
    {"method": "fedkseed", "method.num_seeds": 64, "method.steps": 3, "method.lr": 1e-3, "adapter.kind": "full"},
]


@pytest.mark.parametrize("words", METHODS, ids=lambda words: str(words["method"]))
def test_what_is_scored_after_a_round_is_what_its_state_delivers(
    recipe: Recipe, tmp_path: Path, words: dict[str, Value]
) -> None:
    """Clients of this process train in the model that the server delivers from."""
    recipe = changed(recipe, {**words, "rounds": 2, "evaluate.every": 1})
    run(recipe, tmp_path / "run")
    kept = commit.read(tmp_path / "run")
    assert kept
    sites = Sites(recipe)
    server = sites.server(folder=tmp_path / "run")
    server.state, server.round = dict(kept.state), kept.round
    model = sites.method.deliver(server)
    losses = [evaluation.score(model, sites.corpus.test_examples(client), 32).loss for client in range(len(SIZES))]
    _, lines, _ = on_disk(tmp_path / "run")
    assert lines[-1]["loss"] == pytest.approx(sum(losses) / len(SIZES), rel=1e-9)
