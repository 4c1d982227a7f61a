"""What is foreseen is what the ledger counts and what the counter finds; what does not fit says why; nothing is loaded."""

import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from tests.conftest import byte_tokenizer
from transformers import LlamaConfig

import kilofed
from kilofed.cli import main
from kilofed.config.fields import Table
from kilofed.config.recipe import AdapterSpec, ModelSpec, TrainSpec
from kilofed.config.tables import from_table
from kilofed.costs import environment
from kilofed.costs.counter import CostCounter
from kilofed.errors import KilofedError
from kilofed.federation.workload import WHOLE, Pass, PassKind, Work
from kilofed.runs import plan, preview
from kilofed.runs.sites import Sites
from kilofed.split.passes import PartName, PartOfModel

DEVICE = plan.Device(flops=1e9, memory=1e9, runtime=1e8)
PUBLIC = {"data": {"public_share": 0.3}}


def changed(table: Table, *changes: Table) -> Table:
    found = json.loads(json.dumps(table))
    for change in changes:
        for key, value in change.items():
            found[key] = {**found.get(key, {}), **value} if isinstance(value, dict) else value
    return found


CASES: dict[str, Table] = {
    "fedavg": {},
    "accumulated": {"train": {"accumulation": 2}, "cohort": 3},
    "full": {"adapter": {"kind": "full"}, "method": {"name": "fedavg", "wire": "bfloat16"}},
    "kd": {"method": {"name": "kd", "steps": 2, "client_distill_steps": 1, "top_k": 8, "public_rows": 5}, **PUBLIC},
    "kd all words": {"method": {"name": "kd", "top_k": 0, "score_share": 0.5, "weighting": "entropy"}, **PUBLIC},
    "split": {"method": {"name": "split", "activations": "int8", "average_every": 1}},
    "split joint": {"method": {"name": "split", "server_part": "joint", "gradients": "bfloat16"}},
    "split u-shape": {"method": {"name": "split", "labels": "client", "server_part": "averaged"}},
    "fedmezo": {"method": {"name": "fedmezo", "steps": 3, "rates": "random", "lr_range": 1e-6}},
    "fedpt": {"method": {"name": "fedpt", "steps": 2, "batch_size": 2, "target_loss": 1e-3}, **PUBLIC},
}


FAST = {"fedavg", "kd", "split", "fedpt"}


@pytest.mark.parametrize("case", [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in CASES])
def test_bytes_exchanges_and_operations_are_foreseen_exactly(
    case: str, tiny_table: Table, tiny_large: Path, tmp_path: Path
) -> None:
    evaluate = {"costs": True, "generate": 0, "baselines": [], "every": 2}
    table = changed(tiny_table, CASES[case], {"evaluate": evaluate})
    if case == "fedpt":
        table["method"]["large"] = {"path": str(tiny_large)}
    done = kilofed.run(from_table(table), out=tmp_path / "run")
    told = json.loads((done.folder / "run.json").read_text("utf-8"))["plan"]
    assert told["exact"]
    assert (told["up"], told["down"]) == (done.results.bytes.up, done.results.bytes.down)
    assert told["exchanges"] == done.results.exchanges
    for whose in ("client", "server"):
        assert told[f"{whose}_flops"] == pytest.approx(getattr(done.results.costs, whose).flops, rel=1e-9)
    assert (told["server_flops"] > 0) == (done.results.method in ("kd", "split", "fedpt"))
    assert told["client_memory"] > 1e8
    page = (done.folder / "report.html").read_text("utf-8")
    assert page.count("<td>equal</td>") >= 5


@pytest.mark.slow
def test_what_seeds_and_slopes_take_is_foreseen_closely(tiny_table: Table, tmp_path: Path) -> None:
    method = {"name": "fedkseed", "num_seeds": 1024, "steps": 40, "lr": 1e-4}
    table = changed(tiny_table, {"method": method, "adapter": {"kind": "full"}, "rounds": 3})
    table["evaluate"] = {"costs": True, "generate": 0, "baselines": [], "every": 3}
    done = kilofed.run(from_table(table), out=tmp_path / "run")
    told = json.loads((done.folder / "run.json").read_text("utf-8"))["plan"]
    assert not told["exact"]
    for way in ("up", "down"):
        assert told[way] == pytest.approx(getattr(done.results.bytes, way), rel=0.1)
    assert told["client_flops"] == pytest.approx(done.results.costs.client.flops, rel=1e-9)


def test_seconds_follow_from_device_and_link(tiny_table: Table) -> None:
    sites = Sites(from_table(tiny_table))
    bench = CostCounter(sites.recipe.adapter, sites.recipe.train, ())  # It counts a pass once.
    slow = plan.forecast(sites, DEVICE, bench=bench)
    fast = plan.forecast(sites, replace(DEVICE, flops=4e9), bench=bench)
    assert slow.compute_seconds == pytest.approx(4 * fast.compute_seconds)
    near = plan.forecast(sites, replace(DEVICE, latency=0.0, up=8.0, down=8e12), bench=bench)
    per_round = slow.up / 2
    assert near.link_seconds == pytest.approx(2 * per_round, rel=1e-3)
    far = plan.forecast(sites, replace(DEVICE, latency=5.0, up=8e12, down=8e12), bench=bench)
    assert far.link_seconds == pytest.approx(10)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": {"name": "kd"}}, "there are none; set data.public"),
        ({"method": {"name": "split", "cut": 2}}, "method.cut is 2, and the model has 2 blocks: expected 1 to 1"),
        ({"method": {"name": "fedkseed"}, "train": {"schedule": "linear"}}, "one constant learning rate"),
    ],
)
def test_what_could_not_run_says_why(change: Table, said: str, tiny_table: Table) -> None:
    found, other = plan.plan(
        {"wrong": from_table(changed(tiny_table, change)), "right": from_table(tiny_table)}, DEVICE
    )
    assert said in found.refused
    assert found.up is None
    assert not other.refused
    assert f"wrong does not fit: {found.refused}" in plan.text([found, other], DEVICE)


def test_a_method_that_needs_more_memory_than_the_device_has_does_not_fit(tiny_table: Table) -> None:
    (found,) = plan.plan({"one": from_table(tiny_table)}, replace(DEVICE, memory=1e8))
    assert found.refused.startswith("a client needs 10")
    assert found.up
    assert found.refused.endswith("of memory, the device has 100.0 MB")


def test_proxy_tuning_is_refused_where_rows_get_classes(tiny_table: Table, tiny_encoder: Path) -> None:
    table = changed(tiny_table, {"model": {"path": str(tiny_encoder)}, "method": {"name": "fedpt"}, **PUBLIC})
    table["data"] |= {"task": "classify", "columns": {"text": "instruction", "label": "client"}}
    with pytest.raises(KilofedError, match=r"fedpt steers the next token .* gives classes to rows"):
        plan.forecast(Sites(from_table(table)), DEVICE)


def test_a_model_far_larger_than_this_machine_is_planned_without_its_weights(
    tiny_table: Table, tmp_path: Path
) -> None:
    config = LlamaConfig(
        vocab_size=259, hidden_size=16384, intermediate_size=53248, num_hidden_layers=2, num_attention_heads=128,
        num_key_value_heads=8, tie_word_embeddings=True,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    recipe = from_table(changed(tiny_table, {"model": {"path": str(tmp_path)}}))
    before = environment.own_peak_memory()
    (found,) = plan.plan({"large": recipe}, DEVICE)
    assert environment.own_peak_memory() - before < 1e9
    assert found.client_memory > 2 * 4 * (2 * 16384**2 + 3 * 16384 * 53248)  # Two blocks of float32.
    assert "a client needs 2" in found.refused


def test_a_model_that_looks_at_its_numbers_runs_without_a_forecast(
    tiny_table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def looks(*_: object) -> torch.Tensor:
        return torch.ones(1).sum().item() * torch.ones(1)  # As some mixtures of experts do.

    monkeypatch.setattr(PassKind, "prepare", lambda *_: looks)
    table = changed(tiny_table, {"evaluate": {"costs": True, "generate": 0, "baselines": [], "every": 2}})
    (found,) = plan.plan({"one": from_table(table)}, DEVICE)
    assert f"cannot forecast the costs of {tiny_table['model']['path']}" in found.refused
    done = kilofed.run(from_table(table), out=tmp_path / "run")
    assert json.loads((done.folder / "run.json").read_text("utf-8"))["plan"] is None
    assert "the run goes on without a forecast" in caplog.text
    assert "operations of a client, round 1</th><td>-</td>" in (done.folder / "report.html").read_text("utf-8")


def test_rounds_beyond_those_looked_at_are_taken_to_be_like_them(
    tiny_table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = Sites(from_table(changed(tiny_table, {"rounds": 6})))
    whole = plan.forecast(sites, DEVICE)
    monkeypatch.setattr(preview, "MOST", 8)  # Two rounds of four clients.
    part = plan.forecast(sites, DEVICE)
    assert whole.exact
    assert not part.exact
    assert (part.up, part.down, part.exchanges) == (whole.up, whole.down, whole.exchanges)
    assert part.compute_seconds == pytest.approx(whole.compute_seconds, rel=0.2)  # Rows differ in length.


@pytest.mark.parametrize("part", [WHOLE, *(PartOfModel(1, part) for part in get_args(PartName))], ids=str)
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_four_probes_tell_the_operations_of_any_batch(part: PassKind, kind: str, tiny_model: Path) -> None:
    bench = CostCounter(AdapterSpec(kind=kind, rank=2), TrainSpec(), ())
    spec = ModelSpec(str(tiny_model))
    one = Pass(3, 37, 11, learns=True, kind=part)
    assert bench.operations([one, replace(one, times=2.0)], spec) == pytest.approx(
        3 * bench._run(one, spec)[0], rel=1e-9
    )


def test_activations_grow_with_the_batch_and_vanish_with_it(tiny_model: Path) -> None:
    bench, spec = CostCounter(AdapterSpec(rank=2), TrainSpec(), ()), ModelSpec(str(tiny_model))
    one = Pass(2, 32, 32, learns=True)
    small, large = (bench.activations([replace(one, rows=rows)], spec) for rows in (2, 8))
    look = bench.activations([replace(one, learns=False)], spec)
    assert 0 < look < small
    assert 2 * small < large < 5 * small
    assert bench.activations([one], spec) == small  # Nothing of the pass before is counted again.
    works = [Work([one], waits=waits) for waits in (True, False)]
    waiting, done = (bench.memory([work], spec, messages=1, together=3) for work in works)
    assert waiting - done == 2 * small


def test_the_command_prints_a_line_per_method(tiny_table: Table, tmp_path: Path, capsys) -> None:
    source = tmp_path / "recipe.toml"
    source.write_text(kilofed.config.tables.to_toml(from_table(tiny_table)), "utf-8")
    words = ["plan", str(source), "--methods", "fedavg,split", "--memory", "8GB", "--flops", "2e12", "--up", "5Mbit"]
    torch.manual_seed(0)
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device"]["memory"] == 8e9
    assert found["device"]["flops"] == 2e12
    assert [one["label"] for one in found["methods"]] == ["fedavg", "split"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[0] == "fedavg"
    assert lines[1].split()[-1] == "yes"
    assert "5 Mbit/s up" in lines[-1]
    with pytest.raises(SystemExit):
        main(["plan", "--memory", "apples"])
    assert "'apples' is no number of B; expected such as 8GB" in capsys.readouterr().err
