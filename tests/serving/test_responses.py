"""Responses in OpenAI's forms: chunks joined are the whole, usage counts each token once, JSON never holds infinity."""

import json
import math

import pytest

from kilofed.generation.decoding import Sampling, Token
from kilofed.generation.detokenizer import Piece, PlacedToken
from kilofed.serving.model import ServedModel
from kilofed.serving.requests import GenerationRequest
from kilofed.serving.responses import LAST_EVENT, LEAST_LOGPROB, Completion, event
from kilofed.serving.steps import Step


def request(*, is_chat: bool, n: int = 2, logprobs: bool = False, usage: bool = True) -> GenerationRequest:
    sampling = Sampling(max_new_tokens=4, num_logprobs=2)
    return GenerationRequest(is_chat, ((1, 70), (1, 71, 72)), n, sampling, (), True, usage, False, logprobs, False)


def step(index: int, text: str, *tokens: Token, reason: str = "", num_new: int = 1) -> Step:
    placed = tuple(PlacedToken(token, at) for at, token in enumerate(tokens))
    return Step(index, Piece(text, placed, reason, num_new), 0)  # type: ignore[arg-type]


STEPS = [
    step(0, "a", Token(70, -0.5, ((70, -0.5), (71, -math.inf)))),
    step(0, "b", Token(71, -math.inf, ((71, -math.inf),)), reason="stop"),
    step(1, "", reason="length", num_new=0),
    step(2, "cd", Token(72, math.nan), reason="length"),
    step(3, "", Token(2, -1.0), reason="stop"),
]


def choices(body: dict[str, object]) -> list[dict[str, object]]:
    found = body["choices"]
    assert isinstance(found, list)
    return found


def whole(served: ServedModel, asked: GenerationRequest) -> dict[str, object]:
    completion = Completion(served, asked)
    # Only an echoed prompt, which a chat has not, holds a token that nothing is known of.
    for one in STEPS if not asked.is_chat else [*STEPS[:3], step(2, "cd", Token(72, -2.0), reason="length"), STEPS[4]]:
        completion.add(one)
    return completion.whole()


@pytest.mark.parametrize("is_chat", [True, False])
def test_chunks_joined_are_the_whole(served: ServedModel, is_chat: bool) -> None:
    asked = request(is_chat=is_chat)
    completion, texts, ends = Completion(served, asked), [""] * 4, [None] * 4
    for one in STEPS:
        for chunk in completion.chunks(one):
            (choice,) = choices(chunk)
            said = choice["delta"].get("content", "") if is_chat else choice["text"]  # type: ignore[attr-defined]
            texts[choice["index"]] += said  # type: ignore[index]
            ends[choice["index"]] = choice["finish_reason"] or ends[choice["index"]]  # type: ignore[index]
            assert chunk["usage"] is None
    body = whole(served, asked)
    assert texts == ["ab", "", "cd", ""]
    assert texts == [c["message"]["content"] if is_chat else c["text"] for c in choices(body)]  # type: ignore[index]
    assert ends == [choice["finish_reason"] for choice in choices(body)] == ["stop", "length", "length", "stop"]
    (last,) = completion.last_chunk()
    assert last["choices"] == []
    assert last["usage"] == body["usage"] == {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9}


def test_a_chat_begins_each_answer_with_its_role_once(served: ServedModel) -> None:
    completion = Completion(served, request(is_chat=True))
    begun = [
        choices(chunk)[0]["index"]
        for one in STEPS
        for chunk in completion.chunks(one)
        if "role" in choices(chunk)[0]["delta"]  # type: ignore[operator]
    ]
    assert begun == [0, 1, 2, 3]


def test_usage_comes_only_where_it_was_asked_for(served: ServedModel) -> None:
    completion = Completion(served, request(is_chat=True, usage=False))
    assert completion.last_chunk() == []
    assert all("usage" not in chunk for one in STEPS for chunk in completion.chunks(one))


@pytest.mark.parametrize("is_chat", [True, False])
def test_log_probabilities_are_numbers_that_json_knows(served: ServedModel, is_chat: bool) -> None:
    body = whole(served, request(is_chat=is_chat, logprobs=True))
    text = json.dumps(body, allow_nan=False)  # Fails on infinity and NaN.
    told = choices(json.loads(text))[0]["logprobs"]
    if is_chat:
        assert [one["logprob"] for one in told["content"]] == [-0.5, LEAST_LOGPROB]  # type: ignore[index]
        assert told["content"][0]["bytes"] == list(served.codec.bytes(70))  # type: ignore[index]
        assert len(told["content"][0]["top_logprobs"]) == 2  # type: ignore[index]
    else:
        assert told["token_logprobs"] == [-0.5, LEAST_LOGPROB]  # type: ignore[index]
        assert told["tokens"] == [served.codec.name(70), served.codec.name(71)]  # type: ignore[index]
        assert choices(body)[2]["logprobs"]["token_logprobs"] == [None]  # type: ignore[index]


def test_two_completions_have_two_ids_and_say_what_they_are(served: ServedModel) -> None:
    chat, text = (Completion(served, request(is_chat=is_chat)) for is_chat in (True, False))
    assert chat.id.startswith("chatcmpl-")
    assert text.id.startswith("cmpl-")
    assert chat.id != Completion(served, request(is_chat=True)).id
    assert whole(served, request(is_chat=True))["object"] == "chat.completion"
    assert whole(served, request(is_chat=False))["object"] == "text_completion"


def test_an_event_is_one_line_whatever_the_text_holds() -> None:
    sent = event({"text": "one\ntwo\r\n\n"})
    assert sent.startswith(b"data: {")
    assert sent.endswith(b"\n\n")
    assert sent.count(b"\n") == 2
    assert json.loads(sent.removeprefix(b"data: ")) == {"text": "one\ntwo\r\n\n"}
    assert LAST_EVENT == b"data: [DONE]\n\n"
