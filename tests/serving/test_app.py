"""The routes over real HTTP, by the official client: answers are the decoder's own, whole and streamed."""

import json
import re
import threading
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kilofed.generation.decoding import Sampling
from kilofed.generation.detokenizer import detokenize
from kilofed.serving.server import running

TALK = [{"role": "user", "content": "add 1 and 2"}]


def said(server, prompt, sampling, stops=()) -> str:
    """The text that the decoder writes without a server."""
    generator, codec = server.served.generator, server.served.codec
    pieces = detokenize(generator.generate_tokens(prompt, sampling), codec, stops=stops, end_ids=generator.end_ids)
    return "".join(piece.text for piece in pieces)


def streamed(chunks) -> tuple[str, list[str]]:
    """Text and finish reasons of a stream of completions."""
    choices = [choice for chunk in chunks for choice in chunk.choices]
    return "".join(choice.text for choice in choices), [c.finish_reason for c in choices if c.finish_reason]


def test_a_completion_is_what_the_decoder_says(server) -> None:
    ids = server.served.codec.encode("add 1")
    reply = server.api.completions.create(model="tiny", prompt="add 1", max_tokens=20, temperature=0)
    assert reply.choices[0].text == said(server, ids, Sampling(20))
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(ids)
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.choices[0].finish_reason in ("stop", "length")
    assert reply.choices[0].logprobs is None


def test_a_stream_joined_is_the_whole_completion(server) -> None:
    asked = {"model": "tiny", "prompt": "add 1", "max_tokens": 30, "temperature": 0.8, "seed": 4, "top_p": 0.9}
    whole = server.api.completions.create(**asked)
    chunks = list(server.api.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert streamed(chunks) == (whole.choices[0].text, [whole.choices[0].finish_reason])
    assert len({chunk.id for chunk in chunks}) == 1
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)


def test_a_chat_completion_is_what_the_decoder_says_to_the_talks_tokens(server) -> None:
    ids = server.served.conversation_ids(TALK)
    reply = server.api.chat.completions.create(model="tiny", messages=TALK, max_tokens=20, temperature=0)
    assert reply.choices[0].message.content == said(server, ids, Sampling(20))
    assert reply.choices[0].message.role == "assistant"
    assert reply.usage.prompt_tokens == len(ids)


def test_a_chat_stream_joined_is_the_whole_answer(server) -> None:
    asked = {"model": "tiny", "messages": TALK, "max_completion_tokens": 30, "temperature": 1, "seed": 9}
    whole = server.api.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    chunks = list(server.api.chat.completions.create(**asked, logprobs=True, top_logprobs=2, stream=True))
    choices = [chunk.choices[0] for chunk in chunks]
    assert choices[0].delta.role == "assistant"
    assert "".join(choice.delta.content or "" for choice in choices) == whole.choices[0].message.content
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == [whole.choices[0].finish_reason]
    told = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    assert told == whole.choices[0].logprobs.content


def test_without_max_tokens_a_chat_may_fill_the_context(server) -> None:
    reply = server.api.chat.completions.create(model="tiny", messages=TALK, temperature=1, seed=1)
    for choice in reply.choices:
        assert choice.finish_reason in ("stop", "length")
    assert reply.usage.completion_tokens > 16


def test_logprobs_are_the_decoders_in_both_forms(server) -> None:
    generator, codec = server.served.generator, server.served.codec
    ids = codec.encode("ab")
    told = list(generator.generate_tokens(ids, Sampling(12, temperature=1.0, seed=3, num_logprobs=4)))
    asked = {"model": "tiny", "max_tokens": 12, "temperature": 1, "seed": 3}
    text = server.api.completions.create(**asked, prompt=ids, logprobs=4).choices[0].logprobs
    assert text.token_logprobs == [token.logprob for token in told]
    assert text.tokens == [codec.name(token.id) for token in told]
    assert [list(top.values()) for top in text.top_logprobs] == [[lp for _, lp in token.top] for token in told]
    chat = server.api.chat.completions.create(**asked, messages=TALK, logprobs=True, top_logprobs=4).choices[0]
    told = list(
        generator.generate_tokens(
            server.served.conversation_ids(TALK), Sampling(12, temperature=1.0, seed=3, num_logprobs=4)
        )
    )
    assert [token.logprob for token in chat.logprobs.content] == [token.logprob for token in told]
    assert [bytes(token.bytes) for token in chat.logprobs.content] == [codec.bytes(token.id) for token in told]
    assert [[top.logprob for top in token.top_logprobs] for token in chat.logprobs.content] == [
        [lp for _, lp in token.top] for token in told
    ]


def test_streamed_logprobs_are_those_of_the_whole(server) -> None:
    asked = {
        "model": "tiny",
        "prompt": "ab",
        "max_tokens": 25,
        "temperature": 1,
        "seed": 6,
        "logprobs": 3,
        "echo": True,
    }
    whole = server.api.completions.create(**asked).choices[0].logprobs
    parts = [
        chunk.choices[0].logprobs
        for chunk in server.api.completions.create(**asked, stream=True)
        if chunk.choices[0].logprobs
    ]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [one for part in parts for one in getattr(part, name)] == getattr(whole, name)


def test_echo_without_new_tokens_scores_the_prompt(server) -> None:
    ids = server.served.codec.encode("add 1 and 2")
    scored = server.served.generator.score(ids, 5)
    reply = server.api.completions.create(model="tiny", prompt="add 1 and 2", max_tokens=0, echo=True, logprobs=5)
    choice = reply.choices[0]
    assert choice.text == "add 1 and 2"
    assert choice.logprobs.token_logprobs == [None, *[token.logprob for token in scored[1:]]]
    assert choice.logprobs.top_logprobs[0] is None
    assert list(choice.logprobs.top_logprobs[1].values()) == [logprob for _, logprob in scored[1].top]
    assert choice.logprobs.tokens == ["<bos>", *"add 1 and 2"]
    assert choice.logprobs.text_offset == [0, *range(11)]
    assert reply.usage.completion_tokens == 0


def test_a_prompt_of_the_whole_context_can_be_scored(server) -> None:
    reply = server.api.completions.create(model="tiny", prompt=[1] * 128, max_tokens=0, echo=True, logprobs=0)
    assert len(reply.choices[0].logprobs.token_logprobs) == 128


def test_echo_puts_the_prompt_in_front_of_the_answer(server) -> None:
    ids = server.served.codec.encode("ab")
    reply = server.api.completions.create(
        model="tiny", prompt="ab", max_tokens=5, temperature=0, echo=True, logprobs=1
    )
    choice = reply.choices[0]
    assert choice.text == "ab" + said(server, ids, Sampling(5))
    assert choice.logprobs.text_offset[:4] == [0, 0, 1, 2]
    assert len(choice.logprobs.tokens) == 3 + reply.usage.completion_tokens


def test_all_logprobs_can_be_told_by_id(server) -> None:
    reply = server.post(
        "/v1/completions",
        {"model": "tiny", "prompt": [5, 6], "max_tokens": 1, "temperature": 0, "logprobs": 259}
        | {"return_tokens_as_token_ids": True},
    ).json()
    top = reply["choices"][0]["logprobs"]["top_logprobs"][0]
    (token,) = server.served.generator.generate_tokens([5, 6], Sampling(1, num_logprobs=259))
    assert top == {f"token_id:{known}": logprob for known, logprob in token.top}


def test_a_prompt_may_be_text_or_ids_or_a_list_of_either(server) -> None:
    def texts(prompt) -> list[str]:
        reply = server.api.completions.create(model="tiny", prompt=prompt, max_tokens=6, temperature=0)
        assert [choice.index for choice in reply.choices] == list(range(len(reply.choices)))
        return [choice.text for choice in reply.choices]

    ids = server.served.codec.encode
    one, two = texts("a")[0], texts("b")[0]
    assert texts(ids("a")) == texts(["a"]) == texts([ids("a")]) == [one]
    assert texts(["a", "b"]) == texts([ids("a"), ids("b")]) == [one, two]


def test_choice_number_i_has_the_seed_plus_i(server) -> None:
    asked = {"model": "tiny", "prompt": "ab", "max_tokens": 12, "temperature": 1}
    three = [choice.text for choice in server.api.completions.create(**asked, n=3, seed=7).choices]
    assert len(set(three)) == 3
    for i, text in enumerate(three):
        assert server.api.completions.create(**asked, seed=7 + i).choices[0].text == text
    again = [server.api.completions.create(**asked).choices[0].text for _ in range(2)]
    assert again[0] != again[1]  # Without a seed one is drawn.


def test_the_largest_seed_has_choices_too(server) -> None:
    reply = server.api.completions.create(model="tiny", prompt="a", max_tokens=2, n=2, seed=2**63 - 1)
    assert len(reply.choices) == 2


def test_a_stop_string_ends_the_answer_and_is_left_out(server) -> None:
    asked = {"model": "tiny", "prompt": "ab", "max_tokens": 40, "temperature": 1, "seed": 2}
    free = server.api.completions.create(**asked).choices[0].text
    stop = free[6:9]
    for choice in (
        server.api.completions.create(**asked, stop=stop).choices[0],
        server.api.completions.create(**asked, stop=["never this", stop], logprobs=0).choices[0],
    ):
        assert choice.text == free.partition(stop)[0]
        assert choice.finish_reason == "stop"
    assert streamed(server.api.completions.create(**asked, stop=stop, stream=True)) == (choice.text, ["stop"])


def test_concurrent_streams_say_what_each_says_alone(server) -> None:
    asked = [
        {
            "model": "tiny",
            "prompt": f"row {n}",
            "max_tokens": 16,
            "temperature": float(n % 2),
            "seed": n,
            "logprobs": 2,
        }
        for n in range(12)
    ]
    alone = [server.api.completions.create(**one).choices[0] for one in asked]

    def together(number: int) -> tuple[str, list[float]]:
        chunks = list(server.api.completions.create(**asked[number], stream=True))
        told = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
        return streamed(chunks)[0], [logprob for part in told for logprob in part.token_logprobs]

    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(together, range(len(asked))))
    assert found == [(choice.text, choice.logprobs.token_logprobs) for choice in alone]


def test_models_are_listed_and_named(server) -> None:
    assert [model.id for model in server.api.models.list()] == ["tiny"]
    assert server.api.models.retrieve("tiny").owned_by == "kilofed"
    with pytest.raises(openai.NotFoundError) as caught:
        server.api.models.retrieve("gpt")
    assert caught.value.code == "model_not_found"


def test_a_wrong_key_is_refused_before_anything_is_read(server) -> None:
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {server.token}"}):
        reply = httpx.post(f"{server.url}/v1/completions", content=b"{", headers=headers)
        assert reply.status_code == 401
        assert reply.json()["error"]["code"] == "invalid_api_key"
        assert reply.headers["www-authenticate"] == "Bearer"
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as api:
        with pytest.raises(openai.AuthenticationError):
            api.models.list()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("GET", "/v1/completions", 405), ("OPTIONS", "/v1/completions", 405),
     ("GET", "/docs", 404), ("GET", "/openapi.json", 404), ("POST", "/health", 405)],
)  # fmt: skip
def test_other_paths_and_methods_are_errors_in_openais_form(server, method: str, path: str, status: int) -> None:
    reply = server.http.request(method, path)
    assert reply.status_code == status
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_no_other_origin_is_let_in(server) -> None:
    asked = {"origin": "https://elsewhere.example", "access-control-request-method": "POST"}
    replies = [server.http.options("/v1/completions", headers=asked), server.http.get("/v1/models", headers=asked)]
    assert not [name for reply in replies for name in reply.headers if name.startswith("access-control")]


def test_health_needs_no_key_and_metrics_do(server) -> None:
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{server.url}/metrics").status_code == 401
    before = server.count("kilofed_generated_tokens_total")
    server.api.completions.create(model="tiny", prompt="ab", max_tokens=4, temperature=0, seed=0)
    assert 1 <= server.count("kilofed_generated_tokens_total") - before <= 4
    assert server.count("kilofed_active_requests") == 0
    assert server.http.get("/metrics").headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = list(text_string_to_metric_families(server.http.get("/metrics").text))
    assert all(family.documentation and family.type != "unknown" for family in families)


def test_the_page_runs_only_what_stands_in_it(server) -> None:
    reply = httpx.get(f"{server.url}/")
    assert reply.status_code == 200
    assert not re.findall(r"https?://|@import|url\(|src=", reply.text)
    assert re.findall(r'href="([^"]*)"', reply.text) == ["data:,"]
    policy = reply.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    for kind in ("script", "style"):
        (inside,) = re.findall(rf"<{kind}>(.*?)</{kind}>", reply.text, re.S)
        assert f"'sha256-{b64encode(sha256(inside.encode()).digest()).decode()}'" in policy
    assert reply.headers["x-content-type-options"] == "nosniff"


def test_without_a_token_only_this_machines_programs_and_page_are_let_in(start) -> None:
    open_to_all = start(token=None)
    ask = {"model": "tiny", "prompt": "a", "max_tokens": 1}
    own = open_to_all.url
    port = own.rpartition(":")[2]
    assert open_to_all.post("/v1/completions", ask).status_code == 200
    assert open_to_all.post("/v1/completions", ask, origin=own, **{"sec-fetch-site": "same-origin"}).status_code == 200
    assert open_to_all.post("/v1/completions", ask, host=f"localhost:{port}").status_code == 200
    for headers in (
        {"origin": "https://elsewhere.example"},
        {"origin": "null"},
        {"origin": f"http://127.0.0.1:{int(port) + 1}"},
        {"sec-fetch-site": "cross-site"},
        {"host": "rebound.example"},
        {"host": "[", "origin": "http://["},
    ):
        reply = open_to_all.post("/v1/completions", ask, **headers)
        assert reply.status_code == 403
        assert reply.json()["error"]["type"] == "invalid_request_error"


def test_what_a_page_can_send_without_asking_is_refused(server) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        reply = server.post("/v1/completions", {"model": "tiny", "prompt": "a"}, **{"content-type": kind})
        assert reply.status_code == 415


def test_nothing_that_was_asked_or_answered_is_logged(server, capfd, caplog) -> None:
    caplog.set_level("DEBUG")
    reply = server.api.completions.create(model="tiny", prompt="a secret word", max_tokens=8, temperature=0)
    with pytest.raises(openai.BadRequestError):
        server.api.completions.create(model="tiny", prompt="a secret word", max_tokens=10**6)
    out, err = capfd.readouterr()
    ours = "".join(r.getMessage() for r in caplog.records if r.name.startswith(("kilofed", "uvicorn", "fastapi")))
    assert "secret" not in out + err + ours
    assert reply.choices[0].text not in out + err + ours or not reply.choices[0].text


def test_the_client_of_the_docs_page_runs_as_it_stands(server, capsys) -> None:
    page = (Path(__file__).parents[2] / "docs" / "serve.md").read_text("utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", page, flags=re.M | re.S)
    for shown, real in (("http://127.0.0.1:8000", server.url), ("kf-...", server.token), ("tiny-1", "tiny")):
        assert shown in block
        block = block.replace(shown, real)
    scope: dict = {}
    exec(block, scope)
    scope["client"].close()
    assert capsys.readouterr().out


def test_events_are_framed_as_the_standard_says(server) -> None:
    ask = {"model": "tiny", "prompt": "ab", "max_tokens": 3, "stream": True}
    reply = server.post("/v1/completions", ask)
    assert reply.headers["content-type"].startswith("text/event-stream")
    *events, last, rest = reply.text.split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    assert all(json.loads(event.removeprefix("data: "))["object"] == "text_completion" for event in events)


def test_threads_of_a_stopped_server_are_gone(served) -> None:
    before = set(threading.enumerate())
    with running(served) as url:
        assert httpx.get(f"{url}/health").status_code == 200
        assert {thread.name for thread in set(threading.enumerate()) - before} >= {"serve", "decode"}
    assert not {thread.name for thread in set(threading.enumerate()) - before} & {"serve", "decode"}
