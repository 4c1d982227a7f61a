"""Rows become tokens: what is a prompt, what is learnt, what is cut."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from kilofed.config.recipe import ColumnsSpec, DataSpec
from kilofed.data.examples import IGNORED, TEMPLATES, Example, Renderer, class_names
from kilofed.data.readers import Rows
from kilofed.errors import DataError

SHARED = Path(__file__).parents[2] / ".." / "shared"
CHAT = (
    "<bos>{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TALK = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "2"},
]
SPEC = DataSpec(max_length=96)


@pytest.fixture(scope="session")
def plain(tiny_model: Path) -> PreTrainedTokenizerBase:
    """One token per byte, bos and eos, no chat template."""
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="session")
def bare(tiny_model: Path) -> PreTrainedTokenizerBase:
    """Without bos and eos."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.bos_token = tokenizer.eos_token = None
    return tokenizer


@pytest.fixture(scope="session")
def chat(tiny_model: Path) -> PreTrainedTokenizerBase:
    """With a chat template whose turns end with a token of their own and a line break."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"], "eos_token": "<|end|>"})
    tokenizer.chat_template = CHAT
    return tokenizer


def one(tokenizer: PreTrainedTokenizerBase, row: dict[str, object], kind: str, spec: DataSpec = SPEC) -> Example:
    (example,) = Renderer(tokenizer, spec, kind)([row])
    return example


def text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False))


def learnt(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    return text(tokenizer, [label for label in example.labels if label != IGNORED])


def test_only_the_response_and_the_end_token_are_targets(plain: PreTrainedTokenizerBase) -> None:
    example = one(plain, {"instruction": "say", "context": "now", "response": "yes"}, "response")
    assert text(plain, example.input_ids) == "<bos>say\nnow\nyes<eos>"
    assert learnt(plain, example) == "yes<eos>"
    assert text(plain, example.prompt_ids) == "<bos>say\nnow\n"
    assert example.references == ["yes"]


@pytest.mark.parametrize("row", [{}, {"context": ""}, {"context": None}])
def test_a_row_without_context_takes_the_prompt_without_one(
    plain: PreTrainedTokenizerBase, row: dict[str, object]
) -> None:
    example = one(plain, {"instruction": "say", "response": "yes", **row}, "response")
    assert text(plain, example.prompt_ids) == "<bos>say\n"


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_each_template_puts_the_response_right_behind_its_prompt(plain: PreTrainedTokenizerBase, name: str) -> None:
    spec = replace(SPEC, template=name, max_length=500)
    example = one(plain, {"instruction": "{say}", "context": "c", "response": "yes"}, "response", spec)
    prompt = TEMPLATES[name][0].format(instruction="{say}", context="c")
    space = "" if prompt[-1].isspace() else " "
    assert text(plain, example.input_ids) == f"<bos>{prompt}{space}yes<eos>"
    assert text(plain, example.prompt_ids) == f"<bos>{prompt}"
    assert example.input_ids[: len(example.prompt_ids)] == example.prompt_ids


def test_the_question_of_the_embedded_pair_ends_without_a_space_and_its_answer_begins_with_one(
    plain: PreTrainedTokenizerBase,
) -> None:
    example = one(plain, {"instruction": "why", "response": "so"}, "response", replace(SPEC, template="qa"))
    assert text(plain, example.prompt_ids) == "<bos>Q: why\nA:"
    assert learnt(plain, example) == " so<eos>"
    assert example.references == ["so"]


def test_the_first_of_several_references_is_the_target_and_all_are_references(plain: PreTrainedTokenizerBase) -> None:
    example = one(plain, {"instruction": "say", "response": ["yes", "aye"]}, "response")
    assert learnt(plain, example) == "yes<eos>"
    assert example.references == ["yes", "aye"]


def test_mapped_columns_are_read(plain: PreTrainedTokenizerBase) -> None:
    columns = ColumnsSpec(instruction="definition", context="input", response="output")
    row = {"definition": "d", "input": "i", "output": ["o"], "instruction": "no", "response": "no"}
    example = one(plain, row, "response", replace(SPEC, columns=columns))
    assert text(plain, example.input_ids) == "<bos>d\ni\no<eos>"


def test_an_instruction_in_the_context_column_is_not_repeated(plain: PreTrainedTokenizerBase) -> None:
    spec = replace(SPEC, columns=ColumnsSpec(instruction="context"))
    example = one(plain, {"context": "User: hi", "response": "yes"}, "response", spec)
    assert text(plain, example.input_ids) == "<bos>User: hi\nyes<eos>"


def test_plain_text_is_a_target_throughout(plain: PreTrainedTokenizerBase) -> None:
    example = one(plain, {"text": "abc"}, "text")
    assert text(plain, example.input_ids) == "<bos>abc<eos>"
    assert learnt(plain, example) == "abc<eos>"
    assert example.references == []


def test_plain_text_has_start_and_end_tokens_also_with_a_chat_template(chat: PreTrainedTokenizerBase) -> None:
    assert text(chat, one(chat, {"text": "abc"}, "text").input_ids) == "<bos>abc<|end|>"


def test_chat_template_learns_assistant_turns_up_to_their_end_token(chat: PreTrainedTokenizerBase) -> None:
    example = one(chat, {"messages": TALK}, "messages")
    assert text(chat, example.input_ids) == (
        "<bos><|user|>one?<|end|>\n<|assistant|>1<|end|>\n<|user|>two?<|end|>\n<|assistant|>2<|end|>\n"
    )
    assert learnt(chat, example) == "1<|end|>2<|end|>"
    assert text(chat, example.prompt_ids).endswith("two?<|end|>\n<|assistant|>")
    assert example.references == ["2"]


def test_a_plain_conversation_has_assistant_turns_and_end_tokens_as_targets(plain: PreTrainedTokenizerBase) -> None:
    example = one(plain, {"messages": TALK}, "messages")
    assert text(plain, example.input_ids) == ("<bos>User: one?\nAssistant: 1<eos>\nUser: two?\nAssistant: 2<eos>")
    assert learnt(plain, example) == "1<eos>2<eos>"


def test_a_plain_conversation_without_end_token_has_line_ends_as_targets(bare: PreTrainedTokenizerBase) -> None:
    example = one(bare, {"messages": TALK}, "messages")
    assert text(bare, example.input_ids) == "User: one?\nAssistant: 1\nUser: two?\nAssistant: 2\n"
    assert learnt(bare, example) == "1\n2\n"


def test_a_system_turn_and_a_last_user_turn_are_never_targets(chat: PreTrainedTokenizerBase) -> None:
    talk = [{"role": "system", "content": "be brief"}, *TALK, {"role": "user", "content": "three?"}]
    example = one(chat, {"messages": talk}, "messages")
    assert learnt(chat, example) == "1<|end|>2<|end|>"
    assert "be brief" in text(chat, example.input_ids)
    assert "three?" not in text(chat, example.input_ids)


def test_instruction_rows_go_through_the_chat_template_as_one_question(chat: PreTrainedTokenizerBase) -> None:
    example = one(chat, {"instruction": "say", "context": "now", "response": "yes"}, "response")
    assert text(chat, example.input_ids) == "<bos><|user|>say\n\nnow<|end|>\n<|assistant|>yes<|end|>\n"
    assert learnt(chat, example) == "yes<|end|>"


def test_a_tokeniser_without_ends_gets_none(bare: PreTrainedTokenizerBase) -> None:
    example = one(bare, {"instruction": "say", "response": "yes"}, "response")
    assert text(bare, example.input_ids) == "say\nyes"
    assert learnt(bare, example) == "yes"


@pytest.mark.parametrize("max_length", [8, 9, 20, 40])
def test_a_long_prompt_is_cut_from_the_left_and_the_answer_survives(
    plain: PreTrainedTokenizerBase, max_length: int
) -> None:
    spec = replace(SPEC, max_length=max_length)
    example = one(plain, {"instruction": "x" * 100 + "?", "response": "yes"}, "response", spec)
    assert len(example.input_ids) == max_length
    assert text(plain, example.input_ids).startswith("<bos>")
    assert text(plain, example.input_ids).endswith("?\nyes<eos>")
    assert learnt(plain, example) == "yes<eos>"


def test_a_long_answer_is_cut_from_the_right_and_keeps_a_quarter_of_the_room_for_the_prompt(
    plain: PreTrainedTokenizerBase,
) -> None:
    example = one(
        plain, {"instruction": "p" * 50, "response": "abcdefghi" * 9}, "response", replace(SPEC, max_length=41)
    )
    assert text(plain, example.input_ids) == "<bos>" + "p" * 9 + "\n" + ("abcdefghi" * 9)[:30]
    assert text(plain, example.prompt_ids) == "<bos>" + "p" * 39 + "\n"


def test_a_short_prompt_before_a_long_answer_is_kept_whole(plain: PreTrainedTokenizerBase) -> None:
    example = one(plain, {"instruction": "say", "response": "y" * 90}, "response", replace(SPEC, max_length=40))
    assert text(plain, example.input_ids) == "<bos>say\n" + "y" * 35


def test_a_cut_chat_keeps_its_first_token_and_its_last_answer(chat: PreTrainedTokenizerBase) -> None:
    long = [{"role": "user", "content": "x" * 90}, *TALK]
    example = one(chat, {"messages": long}, "messages", replace(SPEC, max_length=24))
    assert len(example.input_ids) == 24
    assert text(chat, example.input_ids).startswith("<bos>")
    assert learnt(chat, example).endswith("2<|end|>")


def test_cut_examples_are_counted_exactly(plain: PreTrainedTokenizerBase) -> None:
    renderer = Renderer(plain, replace(SPEC, max_length=10), "response")
    # bos + "ab\n" + "cdefg" + eos is 10.
    renderer([{"instruction": "ab", "response": "cdefg"}, {"instruction": "abc", "response": "cdefg"}])
    assert renderer.num_cut == 1


def test_an_empty_prompt_is_no_obstacle(plain: PreTrainedTokenizerBase, chat: PreTrainedTokenizerBase) -> None:
    row = {"instruction": "", "response": "yes"}
    assert text(plain, one(plain, row, "response").input_ids) == "<bos>\nyes<eos>"
    assert learnt(chat, one(chat, row, "response")) == "yes<|end|>"


@pytest.mark.parametrize("answer", ["", None, []])
def test_a_row_without_answer_is_left_out_aloud(
    plain: PreTrainedTokenizerBase, chat: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture, answer: object
) -> None:
    rows = [{"instruction": "say", "response": answer}, {"instruction": "say", "response": "yes"}]
    for tokenizer in (plain, chat):
        renderer = Renderer(tokenizer, SPEC, "response")
        assert len(renderer(rows)) == len(renderer(rows)) == 1
        assert renderer.num_empty == 2
    assert [r.getMessage() for r in caplog.records] == [
        "1 of 2 rows have no answer and are skipped; fill in data.columns.response, or drop them"
    ] * 2


def test_a_token_that_no_position_predicts_is_nothing_to_learn(bare: PreTrainedTokenizerBase) -> None:
    assert Renderer(bare, SPEC, "text")([{"text": "a"}]) == []
    assert len(Renderer(bare, SPEC, "text")([{"text": "ab"}])) == 1


@pytest.mark.parametrize("kind", ["plain", "chat"])
def test_the_prompt_of_a_conversation_is_the_prompt_of_its_example(
    plain: PreTrainedTokenizerBase, chat: PreTrainedTokenizerBase, kind: str
) -> None:
    tokenizer = {"plain": plain, "chat": chat}[kind]
    renderer = Renderer(tokenizer, SPEC, "messages")
    (example,) = renderer([{"messages": TALK}])
    assert renderer.prompt(TALK[:3]) == example.prompt_ids == example.input_ids[: len(example.prompt_ids)]


@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_prompt_of_a_question_is_the_prompt_part_of_its_example(plain: PreTrainedTokenizerBase, template: str) -> None:
    renderer = Renderer(plain, replace(SPEC, template=template, max_length=300), "response")
    (example,) = renderer([{"instruction": "say", "response": "yes"}])
    assert renderer.prompt([{"role": "user", "content": "say"}]) == example.prompt_ids
    assert example.input_ids[: len(example.prompt_ids)] == example.prompt_ids


def test_prompt_of_running_text_is_the_text(plain: PreTrainedTokenizerBase) -> None:
    renderer = Renderer(plain, SPEC, "text")
    assert text(plain, renderer.prompt([{"role": "user", "content": "abc"}])) == "<bos>abc"


def test_asking_for_a_prompt_counts_nothing_as_cut(plain: PreTrainedTokenizerBase) -> None:
    renderer = Renderer(plain, replace(SPEC, max_length=8), "response")
    assert len(renderer.prompt([{"role": "user", "content": "x" * 50}])) == 8
    assert renderer.num_cut == 0


def test_key_tells_rows_apart_by_what_a_model_sees(plain: PreTrainedTokenizerBase) -> None:
    questions = Renderer(plain, SPEC, "response")
    row = {"id": 1, "instruction": "say", "context": "", "response": "yes"}
    assert questions.key(row) == questions.key({"id": 2, "instruction": "say", "response": "yes"})
    assert questions.key(row) != questions.key({**row, "response": "no"})
    assert questions.key(row, answer=False) == questions.key({**row, "response": "no"}, answer=False)
    talks = Renderer(plain, SPEC, "messages")
    other = [*TALK[:3], {"role": "assistant", "content": "II"}]
    assert talks.key({"messages": TALK}) != talks.key({"messages": other})
    assert talks.key({"messages": TALK}, answer=False) == talks.key({"messages": other}, answer=False)
    assert talks.key({"messages": TALK}, answer=False) != talks.key({"messages": TALK[:2]}, answer=False)


def refused(tokenizer: PreTrainedTokenizerBase, row: dict[str, object], kind: str, spec: DataSpec = SPEC) -> str:
    with pytest.raises(DataError) as caught:
        Renderer(tokenizer, spec, kind)([row])
    return str(caught.value)


@pytest.mark.parametrize(
    "talk", ["hello", None, [{"role": "user"}], [{"from": "human", "value": "x"}], [{"role": "user", "content": None}]]
)
def test_a_malformed_conversation_is_refused_with_what_was_seen(plain: PreTrainedTokenizerBase, talk: object) -> None:
    message = refused(plain, {"messages": talk}, "messages")
    assert str(talk) in message
    assert "expected a list of {role, content}" in message


def test_a_template_that_rewrites_earlier_turns_is_refused(chat: PreTrainedTokenizerBase) -> None:
    try:
        chat.chat_template = "{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}"
        assert "rewrites earlier turns" in refused(chat, {"messages": TALK}, "messages")
    finally:
        chat.chat_template = CHAT


def test_a_template_that_raises_is_answered_in_a_sentence(chat: PreTrainedTokenizerBase) -> None:
    try:
        chat.chat_template = "{{ raise_exception('System role not supported') }}"
        message = refused(chat, {"messages": [{"role": "system", "content": "x"}, *TALK]}, "messages")
        assert "refuses a conversation of system, user (System role not supported)" in message
    finally:
        chat.chat_template = CHAT


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("alpca", "response", "did you mean alpaca?"),
        ("chat", "response", "the tokeniser has none"),
        ("alpaca", "messages", "for single questions"),
        ("plain", "text", "has no prompt"),
    ],
)
def test_a_template_that_does_not_fit_is_refused(
    plain: PreTrainedTokenizerBase, name: str, kind: str, said: str
) -> None:
    assert said in refused(plain, {}, kind, replace(SPEC, template=name))


def test_a_long_row_is_tokenised_without_a_word(
    plain: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.WARNING):
        one(plain, {"text": "x" * 5000}, "text")
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.text(max_size=40), answer=st.text(min_size=1, max_size=40), most=st.integers(8, 60), ends=st.booleans()
)
def test_every_example_fits_and_its_targets_are_its_tokens(
    plain: PreTrainedTokenizerBase,
    bare: PreTrainedTokenizerBase,
    prompt: str,
    answer: str,
    most: int,
    ends: bool,
) -> None:
    tokenizer = plain if ends else bare
    example = one(tokenizer, {"instruction": prompt, "response": answer}, "response", replace(SPEC, max_length=most))
    assert len(example.input_ids) == len(example.labels) <= most
    assert len(example.prompt_ids) <= most
    assert all(label in (IGNORED, token) for token, label in zip(example.input_ids, example.labels, strict=True))
    first = next(i for i, label in enumerate(example.labels) if label != IGNORED)
    assert all(label != IGNORED for label in example.labels[first:])
    assert learnt(tokenizer, example).startswith(str(tokenizer.decode(tokenizer.encode(answer)))[:1])


@pytest.mark.skipif(not (SHARED / "models").exists(), reason="needs ../shared/models")
@pytest.mark.parametrize("name", ["small", "stories260K"])
def test_real_tokenisers_give_back_what_went_in(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / name)
    example = one(tokenizer, {"instruction": "Who is it?", "response": "Nobody at all."}, "response")
    renderer = Renderer(tokenizer, SPEC, "response")
    assert renderer.prompt([{"role": "user", "content": "Who is it?"}]) == example.prompt_ids
    assert example.input_ids[: len(example.prompt_ids)] == example.prompt_ids
    told = [label for label in example.labels if label != IGNORED]
    assert tokenizer.decode(told, skip_special_tokens=True).strip() == "Nobody at all."
    assert told[-1] == tokenizer.eos_token_id


LABELLED = DataSpec(task="classify", max_length=8)


def classes(train: list[object], test: list[object] = [], **changes: object) -> tuple[str, ...]:  # noqa: B006
    rows = [[{"text": "a", "label": label} for label in some] for some in (train, test)]
    return class_names(replace(LABELLED, **changes), Rows(*rows, ""))  # type: ignore[arg-type]


def test_classes_are_the_labels_of_the_training_rows_sorted_or_those_agreed() -> None:
    assert classes(["b", "a", "b", None], ["a"]) == ("a", "b")
    assert classes(["b"], labels=("c", "b")) == ("c", "b")
    assert class_names(DataSpec(), Rows([{"text": "a"}], [], "")) == ()


@pytest.mark.parametrize(
    ("train", "test", "agreed", "message"),
    [
        (["yes", "no"], ["no", "maybe"], (), r"held-out row 2: the label 'maybe' is not one of the 2 labels"),
        (["yes", "noo"], [], ("yes", "no"), r"row 2: the label 'noo' .* \(did you mean no\?\)"),
        (["yes", "yes"], [], (), "all rows have the label 'yes'; expected at least two labels in column label"),
        ([None, ""], [], (), "no row has a label"),
        (["a"], [], ("a", "b", "a"), r"data\.labels has a label twice"),
    ],
)
def test_labels_that_do_not_fit_are_refused(
    train: list[object], test: list[object], agreed: tuple[str, ...], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        classes(train, test, labels=agreed)


def test_labels_without_the_task_are_refused() -> None:
    with pytest.raises(DataError, match=r"set that too"):
        class_names(DataSpec(labels=("a", "b")), Rows([{"text": "a"}], [], ""))


def test_a_row_to_classify_has_its_number_and_is_cut_from_the_right(plain: PreTrainedTokenizerBase) -> None:
    renderer = Renderer(plain, LABELLED, "label", ("no", "yes"))
    short, long = renderer([{"text": "ab", "label": "yes"}, {"text": "abcdefghijk", "label": "no"}])
    assert (short.label, long.label) == (1, 0)
    assert short.input_ids == plain.encode("ab")
    assert long.input_ids == plain.encode("abcdefgh")
    assert renderer.num_cut == 1


def test_a_row_without_label_is_left_out_aloud(
    plain: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"text": "a", "label": "no"}, {"text": "b", "label": None}, {"text": "", "label": "yes"}]
    assert [e.label for e in Renderer(plain, LABELLED, "label", ("no", "yes"))(rows)] == [0, 1]
    assert "1 of 3 rows have no label and are skipped; fill in data.columns.label" in caplog.text
