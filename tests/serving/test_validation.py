"""Prompts, messages and stop strings: what is taken, and that a refusal names the very field."""

import pytest

from kilofed.serving import validation
from kilofed.serving.model import ServedModel
from kilofed.serving.validation import LONGEST_STOP, MOST_STOPS, Refusal, num_prompts


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, ()),
        ([], ()),
        ("a", ("a",)),
        (["a", "b\n"], ("a", "b\n")),
        (["x" * LONGEST_STOP], ("x" * 200,)),
    ],
)
def test_stop_strings_are_one_or_a_list(given, expected: tuple[str, ...]) -> None:
    assert validation.read_stops(given) == expected


@pytest.mark.parametrize("given", [5, "", {"a": 1}, True, ["a"] * (MOST_STOPS + 1), ["a", ""], ["a", 3], ["x" * 201]])
def test_other_stop_strings_are_refused(given) -> None:
    with pytest.raises(Refusal) as caught:
        validation.read_stops(given)
    assert caught.value.param == "stop"
    assert caught.value.status == 400


def test_a_prompt_is_a_text_ids_or_a_list_of_either(served: ServedModel) -> None:
    one, two = served.codec.encode("ab"), served.codec.encode("c")
    assert validation.read_prompts("ab", served) == [one]
    assert validation.read_prompts(["ab", "c"], served) == [one, two]
    assert validation.read_prompts(one, served) == [one]
    assert validation.read_prompts([one, two], served) == [one, two]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "must be a text"),
        ([], "must be a text"),
        (["a", 1], "mixes"),
        ([[1], "a"], "mixes"),
        ([[1, "a"]], "something else in it"),
        ([[1, True]], "something else in it"),
        ([True], "mixes"),
        ([259], "token id 259; this model knows 0 to 258"),
        ([[1], [-1]], "token id -1"),
    ],
)
def test_other_prompts_are_refused(given, said: str, served: ServedModel) -> None:
    with pytest.raises(Refusal, match=said) as caught:
        validation.read_prompts(given, served)
    assert caught.value.param == "prompt"


def test_messages_become_turns_and_a_developer_is_the_system() -> None:
    parts = [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]
    assert validation.read_messages(
        [
            {"role": "developer", "content": "a"},
            {"role": "assistant", "content": ""},
            {"role": "user", "content": parts},
        ]
    ) == [
        {"role": "system", "content": "a"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "bc"},
    ]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hello", "messages"),
        (["hello"], "messages[0]"),
        ([{"role": "robot", "content": "a"}], "messages[0].role"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": "a", "tool_calls": []}], "messages[0].tool_calls"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "messages[1].role"),
    ],
)
def test_a_refused_message_is_named(messages, param: str) -> None:
    with pytest.raises(Refusal) as caught:
        validation.read_messages(messages)
    assert caught.value.param == param


def test_another_model_is_a_404_that_says_what_is_served(served: ServedModel) -> None:
    validation.check_name(served.name, served)
    with pytest.raises(Refusal, match="only 'tiny'") as caught:
        validation.check_name("x" * 5000, served)
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")
    assert len(caught.value.message) < 200


def test_a_refusal_is_openai_s_error() -> None:
    refusal = Refusal("no", param="n", code="c", status=422, headers={"retry-after": "1"})
    assert refusal.body() == {"error": {"message": "no", "type": "invalid_request_error", "param": "n", "code": "c"}}
    assert refusal.headers == {"retry-after": "1"}


@pytest.mark.parametrize(
    ("prompt", "number"),
    [("ab", 1), ([1, 2, 3], 1), (["a", "b"], 2), ([[1], [2], [3]], 3), ([], 1), (None, 1), ({"a": 1}, 1)],
)
def test_prompts_are_counted_without_being_encoded(prompt, number: int) -> None:
    assert num_prompts(prompt) == number
