"""The rows of many clients: divided once, tokenised when asked for, once for each tokeniser."""

import json
from pathlib import Path

import pytest
from tests.conftest import byte_tokenizer
from transformers import PreTrainedTokenizerFast

from kilofed.config.recipe import ModelSpec, Recipe
from kilofed.config.tables import changed
from kilofed.data.corpus import Corpus
from kilofed.data.formats import Row
from kilofed.errors import DataError, ModelError

SIZES = (3, 10, 41)


def write(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


class Tokenizers:
    """Byte tokenisers by model, and which were asked for; a model named `other...` has one token more."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, spec: ModelSpec) -> PreTrainedTokenizerFast:
        self.asked.append(spec.path)
        tokenizer = byte_tokenizer()
        if spec.path.startswith("other"):
            tokenizer.add_tokens(["<more>"])
        return tokenizer


@pytest.fixture
def recipe(tiny_recipe: Recipe, tmp_path: Path) -> Recipe:
    """Three clients of 3, 10 and 41 rows, a fifth of each held out."""
    rows: list[Row] = [
        {"client": f"site {client}", "instruction": f"add {n} and {client}", "response": f"is {n + client}"}
        for client, size in enumerate(SIZES)
        for n in range(size)
    ]
    return changed(tiny_recipe, {"data.source": str(write(tmp_path / "rows.jsonl", rows))})


@pytest.fixture
def to_classify(recipe: Recipe, tmp_path: Path) -> Recipe:
    rows: list[Row] = [
        {"client": f"site {client}", "text": f"text {n}", "label": "ab"[n % 2]}
        for client, size in enumerate(SIZES)
        for n in range(size)
    ]
    source = write(tmp_path / "labelled.jsonl", rows)
    return changed(recipe, {"data.source": str(source), "data.task": "classify"})


def test_every_row_is_learnt_or_held_out_by_its_own_client(recipe: Recipe) -> None:
    corpus = Corpus(recipe, Tokenizers())
    counts = [(len(corpus.train_examples(n)), len(corpus.test_examples(n))) for n in range(3)]
    assert counts == [(2, 1), (8, 2), (33, 8)]
    for number in range(3):
        text = [corpus.tokenizer.decode(e.prompt_ids) for e in corpus.train_examples(number)]
        assert all(f"and {number}" in one for one in text)


def test_rows_are_read_and_tokenised_once_and_only_when_asked_for(recipe: Recipe, tmp_path: Path) -> None:
    tokenizers = Tokenizers()
    corpus = Corpus(recipe, tokenizers)
    assert corpus.classes == ()
    assert tokenizers.asked == []
    first = corpus.train_examples(2)
    (tmp_path / "rows.jsonl").unlink()
    assert corpus.train_examples(2) is first
    assert corpus.test_examples(1) is corpus.test_examples(1)
    assert corpus.train_examples(2, recipe.model) is first
    assert tokenizers.asked == [recipe.model.path]
    with pytest.raises(DataError, match="file or folder"):
        _ = Corpus(recipe, tokenizers).shares


def test_tokenize_leaves_nothing_to_be_tokenised(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = Corpus(recipe, Tokenizers())
    corpus.tokenize()
    monkeypatch.setattr(type(corpus.renderer), "__call__", lambda *_: pytest.fail("it tokenised"))
    assert [len(corpus.train_examples(client)) for client in range(3)] == [2, 8, 33]


def test_models_with_one_vocabulary_share_examples(recipe: Recipe) -> None:
    tokenizers = Tokenizers()
    corpus = Corpus(recipe, tokenizers)
    for _ in range(2):
        assert corpus.train_examples(1, ModelSpec(path="same")) is corpus.train_examples(1)
    assert tokenizers.asked == ["same", recipe.model.path]


def test_another_vocabulary_is_refused_where_tokens_are_learnt(recipe: Recipe) -> None:
    corpus = Corpus(recipe, Tokenizers())
    with pytest.raises(ModelError, match=r"^other has another vocabulary than .* \(260 and 259 tokens\)"):
        corpus.train_examples(1, ModelSpec(path="other"))


def test_another_vocabulary_has_its_own_examples_where_rows_are_classified(to_classify: Recipe) -> None:
    tokenizers = Tokenizers()
    corpus, other = Corpus(to_classify, tokenizers), ModelSpec(path="other")
    assert corpus.classes == ("a", "b")
    assert corpus.train_examples(1, other) is not corpus.train_examples(1)
    assert corpus.train_examples(1, other) is corpus.train_examples(1, other)
    assert corpus.renderer_of(other).tokenizer is not corpus.tokenizer
    assert sorted(tokenizers.asked) == sorted(["other", to_classify.model.path])


def test_public_rows_are_set_aside_and_tokenised_once_for_each_tokeniser(to_classify: Recipe) -> None:
    corpus = Corpus(changed(to_classify, {"data.public_share": 0.5}), Tokenizers())
    assert len(corpus.public_rows) == sum(SIZES) / 2
    assert sum(len(share.train) + len(share.test) for share in corpus.shares) == sum(SIZES) / 2
    assert len(corpus.public_examples()) == len(corpus.public_rows)
    assert corpus.public_examples() is corpus.public_examples(to_classify.model)
    other = ModelSpec(path="other")
    assert corpus.public_examples(other) is corpus.public_examples(other) is not corpus.public_examples()


def test_without_public_rows_there_are_none(recipe: Recipe) -> None:
    assert Corpus(recipe, Tokenizers()).public_examples() == []


def test_a_client_whose_rows_have_no_answer_is_named(recipe: Recipe, tmp_path: Path) -> None:
    rows: list[Row] = [{"client": "a", "instruction": "x", "response": "y"}] * 3
    rows += [{"client": "b", "instruction": "x", "response": ""}] * 10
    source = str(write(tmp_path / "b.jsonl", rows))
    corpus = Corpus(changed(recipe, {"data.source": source, "data.holdout": 0.0}), Tokenizers())
    assert corpus.train_examples(0)
    for _ in range(2):
        with pytest.raises(DataError, match=r"client b: no row has an answer within data\.max_length=48 tokens"):
            corpus.train_examples(1)


def test_a_sentence_stays_short_whatever_a_client_is_called(recipe: Recipe, tmp_path: Path) -> None:
    rows: list[Row] = [{"client": "x" * 100_000, "instruction": "x", "response": ""}] * 3
    source = str(write(tmp_path / "long.jsonl", rows))
    corpus = Corpus(changed(recipe, {"data.source": source, "data.holdout": 0.0}), Tokenizers())
    with pytest.raises(DataError) as refused:
        corpus.train_examples(0)
    assert len(str(refused.value)) < 300


def test_one_clients_rows_alone_give_the_examples_that_it_has_among_the_others(recipe: Recipe, tmp_path: Path) -> None:
    whole = Corpus(recipe, Tokenizers())
    for number, share in enumerate(whole.shares):
        path = write(tmp_path / f"{number}.jsonl", [*share.train, *share.test])
        own = {"data.source": str(path), "data.partition.kind": "iid", "data.partition.num_clients": 1}
        alone = Corpus(changed(recipe, own), Tokenizers())
        assert alone.train_examples(0) == whole.train_examples(number)
        assert sorted(alone.test_examples(0)) == sorted(whole.test_examples(number))
