"""What a preflight says of model, machine, messages and method."""

import json
import shutil
from pathlib import Path

import pytest
from tests.findings import of
from transformers import AutoConfig, AutoModelForCausalLM

from kilofed.config.fields import Value
from kilofed.config.recipe import AdapterSpec, ModelSpec, Recipe
from kilofed.config.tables import changed
from kilofed.costs import environment
from kilofed.models.loading import outline
from kilofed.runs.check import check
from kilofed.runs.look import Look
from kilofed.runs.loop import run
from kilofed.runs.preview import bench_of, preview_of, run_memory
from kilofed.runs.sites import Sites
from kilofed.units import size


def test_adapter_targets_that_match_nothing_list_what_exists(tiny_recipe: Recipe) -> None:
    bad = of(check(changed(tiny_recipe, {"adapter.targets": ["q_prj"]})), "bad")
    assert list(bad) == ["adapter"]
    assert "q_prj, which match no module; choose from down_proj" in bad["adapter"]
    assert "q_proj" in bad["adapter"]


def test_trained_parameters_are_counted(tiny_recipe: Recipe) -> None:
    # Rank 2, two layers of width 16 and inner width 24: four 16x16, three 16x24 linear maps each.
    expected = 2 * 2 * (4 * (16 + 16) + 3 * (16 + 24))
    assert of(check(tiny_recipe), "good")["adapter"].startswith(f"{expected:,} of ")


def test_full_training_trains_every_parameter(tiny_recipe: Recipe) -> None:
    assert "(100.0 %)" in of(check(changed(tiny_recipe, {"adapter.kind": "full"})), "good")["adapter"]


def test_a_device_that_is_not_there_is_bad(tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    bad = of(check(changed(tiny_recipe, {"model.device": "cuda:1"})), "bad")
    assert bad == {
        "device": "model.device=cuda:1 is not available; this machine has 0 CUDA devices, use one of them or cpu"
    }


def test_a_model_without_weights_is_bad(tiny_recipe: Recipe, model: Path) -> None:
    (model / "model.safetensors").unlink()
    bad = of(check(changed(tiny_recipe, {"model.path": str(model)})), "bad")
    assert list(bad) == ["weights"]
    assert "cannot load the model" in bad["weights"]


def test_too_little_memory_is_bad_and_the_weights_are_not_loaded(
    tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr(environment, "free_memory", lambda _: 1000)
    monkeypatch.setattr("kilofed.models.loading.load_base", refuse)
    findings = check(tiny_recipe)
    assert "1.0 kB free" in of(findings, "bad")["memory"]
    assert "weights" not in {finding.name for finding in findings}


def test_tight_memory_is_a_warning(tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Look, "needed", 900)
    monkeypatch.setattr(environment, "free_memory", lambda _: 1000)
    assert "tight" in of(check(tiny_recipe), "warn")["memory"]


def test_too_little_disk_is_bad(tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2, 1, 1))  # type: ignore[attr-defined]
    assert "1 B free" in of(check(tiny_recipe), "bad")["disk"]


def test_memory_grows_with_length_batch_processes_and_trained_parameters(tiny_recipe: Recipe) -> None:
    def needed(**changes: Value) -> int:
        recipe = changed(tiny_recipe, {key.replace("__", "."): value for key, value in changes.items()})
        sites = Sites(recipe)
        bench = bench_of(sites)
        found = run_memory(sites, preview_of(sites, bench), bench)
        assert found is not None
        return found

    base = needed()
    assert needed(data__max_length=16) < base
    assert needed(evaluate__batch_size=256) > base
    assert needed(engine__name="pool") > base
    assert needed(adapter__kind="full", evaluate__batch_size=1) > needed(evaluate__batch_size=1)
    assert needed(evaluate__baselines=["base"]) < base
    large = needed(train__batch_size=64, evaluate__batch_size=1)
    assert needed(train__batch_size=64, train__accumulation=32, evaluate__batch_size=1) < large


@pytest.mark.parametrize("method", ["split", "fedkseed"])
def test_bytes_are_told_for_every_method(method: str, tiny_recipe: Recipe) -> None:
    text = of(check(changed(tiny_recipe, {"method": method})), "good")["bytes"]
    assert "per client in the first round" in text
    assert text.startswith("about") == (method == "fedkseed")


def test_an_outline_has_the_shapes_of_the_model_and_no_weights(tiny_model: Path) -> None:
    spec = ModelSpec(path=str(tiny_model))
    drawn = outline(spec, AdapterSpec(kind="full"))
    real = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert {n: p.shape for n, p in drawn.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert {p.device.type for p in drawn.parameters()} == {"meta"}
    assert AutoConfig.from_pretrained(tiny_model).vocab_size == 259


def test_bytes_of_a_round_are_those_of_the_ledger(tiny_recipe: Recipe, tmp_path: Path) -> None:
    run(changed(tiny_recipe, {"rounds": 1}), out=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text("utf-8").splitlines()]
    down, up = (
        sum(line["bytes"] for line in lines if line["client"] == 0 and line["direction"] == way)
        for way in ("down", "up")
    )
    text = of(check(changed(tiny_recipe, {"rounds": 1})), "good")["bytes"]
    assert text.startswith(f"{size(down)} down and {size(up)} up per client in the first round")
    assert text.endswith(f"{size(4 * (down + up))} in the whole run")


def test_models_of_other_vocabularies_are_bad_where_tokens_are_learnt(
    tiny_recipe: Recipe, tiny_large: Path, tmp_path: Path
) -> None:
    words: dict[str, Value] = {"method": "kd", "data.public_share": 0.2, "method.models": {"3": str(tiny_large)}}
    assert f"{tiny_large} at 1 of 4 clients" in of(check(changed(tiny_recipe, words)), "good")["models"]
    other = json.loads((tiny_large / "tokenizer.json").read_text("utf-8"))
    other["model"]["vocab"] |= {"!": other["model"]["vocab"]["?"], "?": other["model"]["vocab"]["!"]}
    shutil.copytree(tiny_large, tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(other), "utf-8")
    words["method.models"] = {"3": str(tmp_path / "other")}
    assert "has another vocabulary" in of(check(changed(tiny_recipe, words)), "bad")["models"]
