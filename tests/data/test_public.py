"""Public rows become examples with or without labels and answers, and others' labels are refused."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from kilofed.config.recipe import ColumnsSpec, DataSpec
from kilofed.data.examples import IGNORED, Renderer
from kilofed.data.public import examples
from kilofed.errors import DataError

CLASSES = ("no", "yes")
CLASSIFY = DataSpec(task="classify", labels=CLASSES)


@pytest.fixture(scope="session")
def words(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def to_classify(words: PreTrainedTokenizerBase) -> Renderer:
    return Renderer(words, CLASSIFY, "label", CLASSES)


def test_rows_without_labels_are_taken(to_classify: Renderer) -> None:
    found = examples([{"text": "ab"}, {"text": "c", "label": None}], CLASSIFY, to_classify, CLASSES)
    assert [(len(row.input_ids), row.label) for row in found] == [(2, IGNORED), (1, IGNORED)]


def test_known_labels_are_kept(to_classify: Renderer) -> None:
    found = examples([{"text": "ab", "label": "yes"}, {"text": "c", "label": ""}], CLASSIFY, to_classify, CLASSES)
    assert [row.label for row in found] == [1, IGNORED]


def test_another_label_set_is_refused(to_classify: Renderer) -> None:
    with pytest.raises(DataError, match="other labels than the private ones: row 1: the label 'ja'"):
        examples([{"text": "ab", "label": "ja"}], CLASSIFY, to_classify, CLASSES)


def test_rows_without_text_are_refused(to_classify: Renderer) -> None:
    with pytest.raises(DataError, match="have the columns words; expected text"):
        examples([{"words": "ab"}], CLASSIFY, to_classify, CLASSES)


def test_a_row_without_a_column_that_others_have_is_refused(
    words: PreTrainedTokenizerBase, to_classify: Renderer
) -> None:
    renderer = Renderer(words, DataSpec(), "response")
    with pytest.raises(DataError, match="public row 2 has no column response; it has instruction: fill it in or drop"):
        examples([{"instruction": "a", "response": "b"}, {"instruction": "c"}], DataSpec(), renderer, ())
    with pytest.raises(DataError, match="public row 1 has no column text; it has none"):
        examples([{}, {"text": "ab"}], CLASSIFY, to_classify, CLASSES)


def test_plain_text_serves_as_public_rows_of_answers(words: PreTrainedTokenizerBase) -> None:
    spec = DataSpec(template="plain", columns=ColumnsSpec(response="answer"))
    renderer = Renderer(words, spec, "response")
    answered = examples([{"instruction": "a", "answer": "bc"}], spec, renderer, ())
    text = examples([{"text": "abcd"}], spec, renderer, ())
    assert [label for label in answered[0].labels if label != IGNORED] == answered[0].input_ids[-3:]
    assert text[0].labels[1:] == text[0].input_ids[1:]


def test_other_columns_are_refused(words: PreTrainedTokenizerBase) -> None:
    renderer = Renderer(words, DataSpec(), "response")
    with pytest.raises(DataError, match="expected instruction and response, or messages, or text"):
        examples([{"question": "a"}], DataSpec(), renderer, ())


def test_no_rows_are_no_examples(to_classify: Renderer) -> None:
    assert examples([], CLASSIFY, to_classify, CLASSES) == []
