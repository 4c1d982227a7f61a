"""Bodies that cannot be answered: a 4xx in OpenAI's form that names the field, and never a traceback."""

import json

import openai
import pytest

TEXT = {"model": "tiny", "prompt": "ab", "max_tokens": 2}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "ab"}], "max_tokens": 2}


def refused(server, path: str, body: object, status: int = 400) -> dict[str, str | None]:
    reply = server.post(path, body)
    assert reply.status_code == status, reply.text
    assert "Traceback" not in reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    return error


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"nonsense", b'{"model": "tiny",}', b"\xff\xfe", b'{"model": "\\ud800"}', b"[" * 200_000, b'{"a":' * 9999],
    ids=["empty", "half", "word", "comma", "no-utf8", "surrogate", "deep-list", "deep-object"],
)  # fmt: skip
def test_a_body_that_is_not_json_is_refused(server, body: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        assert refused(server, path, body)["code"] == "invalid_json"


@pytest.mark.parametrize("body", [b"[]", b"3", b'"text"', b"null"])
def test_a_body_that_is_no_object_is_refused(server, body: bytes) -> None:
    assert "object" in refused(server, "/v1/completions", body)["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", 3),
        ("model", None),
        ("max_tokens", "many"),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("max_tokens", -1),
        ("max_tokens", 10**9),
        ("max_tokens", 10**30),
        ("temperature", "hot"),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("top_p", 1.1),
        ("top_p", []),
        ("n", 0),
        ("n", 1000),
        ("n", "two"),
        ("seed", "lucky"),
        ("seed", 2**63),
        ("stop", 5),
        ("stop", [""]),
        ("stop", ["a"] * 17),
        ("stop", "a" * 201),
        ("stop", [1]),
        ("stop", {"a": 1}),
        ("stream", "yes"),
        ("stream_options", []),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -1),
        ("logit_bias", {"5": 100}),
        ("logit_bias", 7),
        ("unheard_of", 1),
    ],
)
def test_a_field_that_does_not_fit_is_named(server, field: str, value: object) -> None:
    for path, body in (("/v1/completions", TEXT), ("/v1/chat/completions", CHAT)):
        error = refused(server, path, {**body, field: value})
        assert error["param"] == field
        assert field in error["message"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_number_that_is_none_is_refused(server, number: str) -> None:
    body = json.dumps({**TEXT, "temperature": "X"}).replace('"X"', number).encode()
    assert refused(server, "/v1/completions", body)["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", 5),
        ("prompt", None),
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", [[], [5]]),
        ("prompt", ["a", 5]),
        ("prompt", ["a", [5]]),
        ("prompt", [[5, "a"]]),
        ("prompt", [[5, True]]),
        ("prompt", [1.5]),
        ("prompt", [True]),
        ("prompt", [{}]),
        ("prompt", [259]),
        ("prompt", [-1]),
        ("prompt", [10**30]),
        ("prompt", [1] * 128),
        ("prompt", "a" * 200),
        ("prompt", ["a"] * 129),
        ("logprobs", 1000),
        ("logprobs", True),
        ("echo", 1),
        ("best_of", 2),
        ("suffix", "end"),
        ("max_tokens", 0),
    ],
)
def test_a_field_of_completions_that_does_not_fit_is_named(server, field: str, value: object) -> None:
    assert refused(server, "/v1/completions", {**TEXT, field: value})["param"] == field


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ("hello", "messages"),
        ([], "messages"),
        (["hello"], "messages[0]"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]"),
        ([{"role": "wizard", "content": "a"}], "messages[0].role"),
        ([{"role": "tool", "content": "a"}], "messages[0].role"),
        ([{"content": "a"}], "messages[0].role"),
        ([{"role": ["user"], "content": "a"}], "messages[0].role"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "messages[1].role"),
        ([{"role": "user", "content": "a", "tool_calls": []}], "messages[0].tool_calls"),
        ([{"role": "user", "content": "a" * 200}], "messages"),
    ],
)
def test_a_message_that_does_not_fit_is_named(server, messages: object, param: str) -> None:
    assert refused(server, "/v1/chat/completions", {**CHAT, "messages": messages})["param"] == param


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("response_format", {"type": "json_object"}),
        ("top_logprobs", 3),
        ("logprobs", 3),
        ("max_tokens", 0),
        ("max_completion_tokens", 0),
        ("max_completion_tokens", 1000),
        ("tool_choice", "required"),
        ("store", True),
    ],
)
def test_a_field_of_chats_that_does_not_fit_is_named(server, field: str, value: object) -> None:
    assert refused(server, "/v1/chat/completions", {**CHAT, field: value})["param"] == field


def test_a_missing_field_is_named(server) -> None:
    for path, body in (("/v1/completions", TEXT), ("/v1/chat/completions", CHAT)):
        for field in ("model", "prompt" if "prompt" in body else "messages"):
            error = refused(server, path, {name: value for name, value in body.items() if name != field})
            assert (error["param"], error["code"]) == (field, "missing")


def test_a_prompt_longer_than_the_context_says_by_how_much(server) -> None:
    error = refused(server, "/v1/completions", {**TEXT, "prompt": "a" * 200})
    assert error["code"] == "context_length_exceeded"
    assert "201 tokens" in error["message"]
    assert "128" in error["message"]
    error = refused(server, "/v1/completions", {**TEXT, "prompt": "a" * 100, "max_tokens": 50})
    assert (error["param"], error["code"]) == ("max_tokens", "context_length_exceeded")
    assert "at most 27" in error["message"]


def test_a_model_that_is_not_served_is_not_found(server) -> None:
    error = refused(server, "/v1/completions", {**TEXT, "model": "gpt-5"}, status=404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    with pytest.raises(openai.NotFoundError, match="only 'tiny'"):
        server.api.chat.completions.create(**{**CHAT, "model": "gpt-5"})


def test_null_is_the_default_and_what_does_nothing_is_taken(server) -> None:
    neutral = {
        "temperature": None, "top_p": None, "n": None, "stop": None, "seed": None, "stream": None, "user": "me",
        "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "metadata": {"a": "b"},
    }  # fmt: skip
    text = {"logprobs": None, "echo": False, "best_of": 1, "suffix": None}
    chat = {"logprobs": False, "tools": [], "response_format": {"type": "text"}, "store": False, "top_logprobs": None}
    assert server.post("/v1/completions", {**TEXT, **neutral, **text}).status_code == 200
    assert server.post("/v1/chat/completions", {**CHAT, **neutral, **chat}).status_code == 200


def test_content_may_be_a_list_of_text_parts(server) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = {**CHAT, "temperature": 0, "max_tokens": 6}
    whole = server.post("/v1/chat/completions", asked).json()
    split = server.post("/v1/chat/completions", {**asked, "messages": [{"role": "user", "content": parts}]}).json()
    assert split["choices"] == whole["choices"]


def test_too_many_prompts_are_refused_before_any_is_encoded(server, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    encode = type(server.served.codec).encode
    monkeypatch.setattr(
        type(server.served.codec), "encode", lambda codec, text: encoded.append(text) or encode(codec, text)
    )
    error = refused(server, "/v1/completions", {**TEXT, "prompt": ["a"] * 1000})
    assert "1000 is too many" in error["message"]
    assert not encoded
    assert server.post("/v1/completions", {**TEXT, "prompt": ["a"] * 3}).status_code == 200
    assert encoded == ["a"] * 3


def test_a_refusal_quotes_little_of_what_was_sent(server) -> None:
    for body in (
        {**TEXT, "k" * 500_000: 1},
        {**TEXT, "n": int("9" * 4000)},
        {**TEXT, "prompt": [int("9" * 4000)]},
        {**TEXT, "model": "m" * 500_000},
    ):
        reply = server.post("/v1/completions", body)
        assert reply.status_code in (400, 404)
        assert len(reply.content) < 3000


@pytest.mark.parametrize("cold", [5e-324, 1e-320, 1e-40, 1e-7])
def test_a_temperature_by_which_logits_cannot_be_divided_is_refused(server, cold: float) -> None:
    error = refused(server, "/v1/completions", {**TEXT, "temperature": cold})
    assert error["param"] == "temperature"
    assert server.post("/v1/completions", {**TEXT, "temperature": 1e-6}).status_code == 200
    assert server.post("/v1/completions", {**TEXT, "temperature": 0}).status_code == 200
