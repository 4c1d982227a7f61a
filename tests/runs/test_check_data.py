"""What a preflight says of rows, clients, tokeniser and template."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.findings import Row, asked, of
from transformers import AutoTokenizer

from kilofed.config.fields import Value
from kilofed.config.recipe import Recipe
from kilofed.config.tables import changed, from_table
from kilofed.runs.check import check


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
