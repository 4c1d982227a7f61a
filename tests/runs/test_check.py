"""The preflight finds what would go wrong, says what to do, and is silent about what is well."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kilofed.cli import main
from kilofed.config.fields import Value
from kilofed.config.recipe import AdapterSpec, ModelSpec, Recipe
from kilofed.config.tables import changed, from_table
from kilofed.costs import environment
from kilofed.models.loading import outline
from kilofed.runs import check as module
from kilofed.runs.check import Finding, check
from kilofed.runs.loop import run
from kilofed.runs.preview import bench_of, preview_of, run_memory
from kilofed.runs.sites import Sites
from kilofed.units import size

Change = Callable[[dict[str, Value]], Recipe]
Row = dict[str, object]


@pytest.fixture
def rows(tmp_path: Path) -> Callable[[list[Row]], str]:
    """Writes rows and gives the file's path."""

    def write(content: list[Row], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in content), "utf-8")
        return str(path)

    return write


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be spoilt."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def asked(number: int, answer: str = "yes", **more: object) -> Row:
    return {"client": f"site {number % 2}", "instruction": f"say {number}", "response": answer, **more}


def of(findings: list[Finding], level: str) -> dict[str, str]:
    return {finding.name: finding.text for finding in findings if finding.level == level}


def test_a_sound_recipe_has_only_good_findings_one_of_each(tiny_recipe: Recipe) -> None:
    findings = check(tiny_recipe)
    assert {finding.level for finding in findings} == {"good"}
    # FedAvg has nothing of its own to say, and its clients all have the recipe's model.
    expected = {*module.PARTS, "columns"} - {"method", "models"}
    assert {finding.name for finding in findings} | {"columns"} == expected


def test_a_method_says_what_it_expects_of_the_rows(tiny_recipe: Recipe, tiny_large: Path) -> None:
    words: dict[str, Value] = {"method": "fedpt", "method.large": str(tiny_large), "data.public_share": 0.2}
    (said,) = [one for one in check(changed(tiny_recipe, words)) if one.name == "method"]
    assert "held-out loss: steered large" in said.text
    assert said.level == ("warn" if "NOT likely" in said.text or "adds nothing" in said.text else "good")


def test_every_finding_is_one_line_of_its_own(tiny_recipe: Recipe) -> None:
    texts = [finding.text for finding in check(changed(tiny_recipe, {"adapter.targets": ["nothing"]}))]
    assert len(set(texts)) == len(texts)
    assert all(text and "\n" not in text for text in texts)


def test_nothing_is_written_and_nothing_is_printed(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    check(tiny_recipe)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_several_faults_are_all_found_at_once_and_each_once(tiny_recipe: Recipe) -> None:
    wrong: dict[str, Value] = {
        "method.name": "fedavgg", "privacy.kind": "central", "privacy.noise_key": "x", "model.device": "abacus",
        "data.template": "alpca", "adapter.targets": ["nothing"], "cohort": 9,
    }  # fmt: skip
    bad = [finding.text for finding in check(changed(tiny_recipe, wrong)) if finding.level == "bad"]
    for said in ("fedavgg", "noise_key", "abacus", "cohort is 9"):
        assert sum(said in text for text in bad) == 1, said


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


@pytest.mark.parametrize(("key", "value"), [("data.source", "./no.jsonl"), ("model.path", "./no-model")])
def test_what_is_missing_is_one_bad_finding(tiny_recipe: Recipe, key: str, value: str) -> None:
    bad = [finding.text for finding in check(changed(tiny_recipe, {key: value})) if finding.level == "bad"]
    assert len(bad) == 1
    assert value in bad[0]


def test_a_device_that_is_not_there_is_bad(tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    bad = of(check(changed(tiny_recipe, {"model.device": "cuda:1"})), "bad")
    assert bad == {
        "device": "model.device=cuda:1 is not available; this machine has 0 CUDA devices, use one of them or cpu"
    }


def test_padding_with_the_end_token_is_a_warning_with_its_consequence(tiny_recipe: Recipe, model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(model)
    warn = of(check(changed(tiny_recipe, {"model.path": str(model)})), "warn")
    assert "padding and end are one token (<eos>)" in warn["tokeniser"]


def test_a_tokeniser_without_end_token_is_a_warning(tiny_recipe: Recipe, model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(model)
    warn = of(check(changed(tiny_recipe, {"model.path": str(model)})), "warn")
    assert "answers do not learn to stop" in warn["tokeniser"]


def test_a_tokeniser_with_more_tokens_than_the_model_is_bad(tiny_recipe: Recipe, model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["one", "two"])
    tokenizer.save_pretrained(model)
    bad = of(check(changed(tiny_recipe, {"model.path": str(model)})), "bad")
    assert bad["tokeniser"].startswith("the tokeniser has 261 tokens, the model 259 embeddings")


def test_a_model_without_weights_is_bad(tiny_recipe: Recipe, model: Path) -> None:
    (model / "model.safetensors").unlink()
    bad = of(check(changed(tiny_recipe, {"model.path": str(model)})), "bad")
    assert list(bad) == ["weights"]
    assert "cannot load the model" in bad["weights"]


def test_the_rendered_prompt_is_shown(tiny_recipe: Recipe) -> None:
    assert "plain: a prompt begins '<bos>add " in of(check(tiny_recipe), "good")["template"]


def test_a_long_prompt_is_shown_by_its_first_hundred_characters(
    tiny_recipe: Recipe, rows: Callable[[list[Row]], str]
) -> None:
    source = rows([asked(i, context="x" * 300) for i in range(20)])
    text = of(check(changed(tiny_recipe, {"data.source": source})), "good")["template"]
    assert len(text) < 150
    assert text.endswith("...'")


def test_a_mask_that_hides_every_answer_is_bad(tiny_recipe: Recipe, rows: Callable[[list[Row]], str]) -> None:
    source = rows([asked(i, "") for i in range(20)])
    assert "no token of" in of(check(changed(tiny_recipe, {"data.source": source})), "bad")["loss"]


def test_some_rows_without_answer_are_a_warning(tiny_recipe: Recipe, rows: Callable[[list[Row]], str]) -> None:
    source = rows([asked(i, "" if i % 4 == 0 else "yes") for i in range(40)])
    warn = of(check(changed(tiny_recipe, {"data.source": source})), "warn")
    assert "rows have no answer and are skipped" in warn["data"]


@pytest.mark.parametrize(("length", "level"), [(50, "good"), (150, "good"), (400, "warn")])
def test_less_than_two_percent_learnt_is_a_warning(
    tiny_recipe: Recipe, rows: Callable[[list[Row]], str], length: int, level: str
) -> None:
    source = rows([asked(i, context="x" * length) for i in range(20)])
    # bos, "say 10", two line ends: a dozen tokens of prompt beside the context; "yes" and eos are learnt.
    findings = check(changed(tiny_recipe, {"data.source": source, "data.max_length": 900}))
    assert "of tokens are learnt" in of(findings, level)["loss"]


def test_truncation_names_the_length_that_holds_95_percent(
    tiny_recipe: Recipe, rows: Callable[[list[Row]], str]
) -> None:
    # bos + "say 10\n" + answer + eos: 9 tokens beside the answer.
    source = rows([asked(10 + i % 2, "y" * (20 if i < 80 else 60)) for i in range(100)])
    findings = check(changed(tiny_recipe, {"data.source": source, "data.max_length": 40}))
    text = of(findings, "warn")["truncation"]
    assert "longer than data.max_length=40" in text
    assert text.endswith(": 69 would hold 95 %")


def test_few_long_rows_are_no_warning(tiny_recipe: Recipe, rows: Callable[[list[Row]], str]) -> None:
    source = rows([asked(10 + i % 2, "y" * (20 if i else 60)) for i in range(100)])
    findings = check(changed(tiny_recipe, {"data.source": source, "data.max_length": 40, "data.holdout": 0.0}))
    assert of(findings, "good")["truncation"].startswith("1.0 % of rows")


def test_rows_longer_than_the_models_positions_are_bad(tiny_recipe: Recipe, rows: Callable[[list[Row]], str]) -> None:
    source = rows([asked(i, "y" * 200) for i in range(20)])
    findings = check(changed(tiny_recipe, {"data.source": source, "data.max_length": 150}))
    assert "set data.max_length=128 or less" in of(findings, "bad")["truncation"]


def test_answers_that_would_pass_the_models_positions_are_a_warning(
    tiny_recipe: Recipe, rows: Callable[[list[Row]], str]
) -> None:
    source = rows([asked(i, "y" * 100) for i in range(20)])
    wanted: dict[str, Value] = {"data.source": source, "data.max_length": 120, "evaluate.max_new_tokens": 30}
    assert "pass the model's 128 positions" in of(check(changed(tiny_recipe, wanted)), "warn")["truncation"]


def test_tiny_clients_are_named(tiny_recipe: Recipe, rows: Callable[[list[Row]], str]) -> None:
    source = rows([*(asked(i) for i in range(40)), *(asked(i, client="hamlet") for i in range(50, 53))])
    warn = of(check(changed(tiny_recipe, {"data.source": source})), "warn")
    assert warn["clients"].startswith("hamlet: fewer rows than train.batch_size=4")


def test_a_client_without_rows_to_learn_is_bad(tiny_recipe: Recipe) -> None:
    findings = check(changed(tiny_recipe, {"data.partition.min_rows": 11}))
    assert of(findings, "bad")["clients"].startswith("client site 0 has 10 training rows")


@pytest.mark.parametrize(("key", "value"), [("cohort", 5), ("quorum", 5)])
def test_more_clients_per_round_than_there_are_is_bad(tiny_recipe: Recipe, key: str, value: int) -> None:
    bad = [finding.text for finding in check(changed(tiny_recipe, {key: value})) if finding.level == "bad"]
    assert len(bad) == 1
    assert f"{key} is 5, but there are 4 clients" in bad[0]


def test_held_out_rows_that_are_trained_on_are_counted_by_kind(tiny_recipe: Recipe, rows: Callable[..., str]) -> None:
    train = rows([asked(i) for i in range(20)])
    same, elsewhere = asked(0), {**asked(1), "client": "site 0"}
    prompt, other = asked(2, "no"), {**asked(3, "no"), "client": "site 0"}
    test = rows([same, elsewhere, prompt, other, asked(99), asked(98)], "test.jsonl")
    text = of(check(changed(tiny_recipe, {"data.source": train, "data.test": test})), "warn")["leaks"]
    assert text.startswith(
        "4 of 6 held-out rows are also in the training rows (1 with the same prompt, 1 with the same prompt at another "
        "client, 1 with the same row, 1 with the same row at another client)"
    )


def test_training_rows_of_several_clients_are_counted(tiny_recipe: Recipe, rows: Callable[[list[Row]], str]) -> None:
    source = rows([*(asked(i) for i in range(20)), *({**asked(i), "client": "copy"} for i in range(6))])
    findings = check(changed(tiny_recipe, {"data.source": source, "data.holdout": 0.0}))
    assert of(findings, "warn")["leaks"].startswith("6 training rows are held by more than one client")


def test_columns_that_nothing_uses_are_a_warning_each_time(
    tiny_recipe: Recipe, rows: Callable[[list[Row]], str]
) -> None:
    recipe = changed(tiny_recipe, {"data.source": rows([asked(i, note="x") for i in range(20)])})
    for _ in range(2):
        assert "unused columns: note" in of(check(recipe), "warn")["data"]


def test_a_mapped_column_that_is_absent_is_bad(tiny_recipe: Recipe) -> None:
    bad = of(check(changed(tiny_recipe, {"data.columns.context": "contxt"})), "bad")
    assert "data.columns.context is 'contxt', which no row has" in bad["data"]


@pytest.mark.parametrize(
    ("changes", "level", "said"),
    [
        # 10 rows, 2 of them held out; 2 rounds of 2 steps of 4.
        ({}, "good", "2 to 2 times over in 2 rounds"),
        ({"train.epochs": 3}, "good", "6 to 6 times over"),
        ({"cohort": 2}, "good", "1 to 1 times over"),
        ({"rounds": 100}, "warn", "1e+02 to 1e+02 times over in 100 rounds: that learns small clients by heart"),
        ({"rounds": 1, "train.batch_size": 1, "train.steps": 1, "cohort": 1}, "warn", "most rows are never seen"),
    ],
)
def test_passes_over_the_rows_are_forecast(
    tiny_recipe: Recipe, changes: dict[str, Value], level: str, said: str
) -> None:
    assert said in of(check(changed(tiny_recipe, changes)), level)["passes"]


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
    monkeypatch.setattr(module._Look, "needed", 900)
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
    assert needed(adapter__kind="full") > base
    assert needed(evaluate__controls=["base"]) < base
    large = needed(train__batch_size=64, evaluate__batch_size=1)
    assert needed(train__batch_size=64, train__accumulation=8, evaluate__batch_size=1) < large


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


def test_the_command_says_each_finding_and_fails_when_one_is_bad(
    tiny_table: dict[str, Value], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(tiny_table), "utf-8")
    assert main(["check", str(path)]) == 0
    good = capsys.readouterr()
    assert all(line.startswith("good  ") for line in good.out.splitlines())
    assert main(["check", str(path), "cohort=7", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in found if one["level"] == "bad"] == ["clients"]


def test_text_rows_are_said_to_be_learnt_whole(tiny_table: dict[str, Value], rows: Callable[[list[Row]], str]) -> None:
    source = rows([{"client": f"site {i % 2}", "text": f"some text {i}"} for i in range(20)])
    recipe = from_table({**tiny_table, "data": {"source": source}})
    assert of(check(recipe), "good")["template"].startswith("running text")


def test_rows_to_classify_are_checked_as_such(tiny_recipe: Recipe, tiny_encoder: Path) -> None:
    task: dict[str, Value] = {"data.task": "classify", "data.columns.text": "instruction", "model": str(tiny_encoder),
                              "data.columns.label": "client", "data.partition.kind": "iid"}  # fmt: skip
    good = of(check(changed(tiny_recipe, task)), "good")
    assert good["labels"].startswith(
        "4 labels from the training rows: site 0, site 1, site 2, site 3; 10 training rows"
    )
    assert "a head of kind mean for 4 labels" in good["adapter"]
    assert good["loss"] == "100.0 % of rows have a label"
    labels = [f"site {n}" for n in range(5)]
    warned = of(check(changed(tiny_recipe, {**task, "data.labels": list(labels)})), "warn")
    assert "no training row has site 4" in warned["labels"]


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
