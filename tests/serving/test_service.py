"""Many clients at once: the line and its end, those who leave, read slowly or wait too long, and a model that fails."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import httpx
import openai
import pytest

from kilofed.errors import ModelError
from kilofed.serving.requests import Limits
from kilofed.serving.scheduler import Scheduler
from kilofed.serving.server import running
from kilofed.serving.service import Service
from kilofed.serving.validation import Refusal

ASK = {"model": "tiny", "prompt": "ab", "max_tokens": 5, "temperature": 0}
LONG = {**ASK, "max_tokens": 120}


def open_stream(server, body) -> socket.socket:
    """A connection on which a stream was asked for, and of which nothing is read."""
    host, port = server.url.removeprefix("http://").split(":")
    content = json.dumps({**body, "stream": True}).encode()
    connection = socket.create_connection((host, int(port)))
    connection.sendall(
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {server.token}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n".encode()
        + content
    )
    return connection


def test_beyond_the_line_clients_are_told_to_come_back(start, gated) -> None:
    gate, behind = gated
    server = start(behind, max_active=1, max_waiting=2)
    with ThreadPoolExecutor(3) as pool:
        taken = [pool.submit(server.post, "/v1/completions", ASK) for _ in range(3)]
        assert server.waits_for("kilofed_active_requests", 1)
        assert server.waits_for("kilofed_waiting_requests", 2)
        with pytest.raises(openai.RateLimitError) as caught:
            server.api.completions.create(**ASK)
        assert caught.value.code == "queue_full"
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
        assert server.post("/v1/completions", {**ASK, "stream": True}).status_code == 429
        gate.gate.set()
        replies = [one.result() for one in taken]
    assert [reply.status_code for reply in replies] == [200] * 3
    assert len({reply.json()["choices"][0]["text"] for reply in replies}) == 1
    assert server.post("/v1/completions", ASK).status_code == 200


def test_a_refused_client_succeeds_when_it_comes_back(start, gated) -> None:
    gate, behind = gated
    server = start(behind, max_active=1, max_waiting=0)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.post, "/v1/completions", ASK)
        assert server.waits_for("kilofed_active_requests", 1)
        threading.Timer(0.2, gate.gate.set).start()
        assert server.api.with_options(max_retries=3).completions.create(**ASK).choices
        assert first.result().status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_gives_its_place_back(start, gated, stream: bool) -> None:
    gate, behind = gated
    gate.seconds = 0.05
    gate.gate.set()
    server = start(behind, max_active=1, max_waiting=0)
    if stream:
        open_stream(server, LONG).close()
    else:
        with pytest.raises(httpx.ReadTimeout):
            server.http.post("/v1/completions", json=LONG, timeout=0.3)
    assert server.waits_for("kilofed_cancelled_total", 1)
    assert server.waits_for("kilofed_active_requests", 0)
    assert gate.num_tokens < 120
    assert gate.num_closed == gate.num_begun
    assert server.post("/v1/completions", ASK).status_code == 200


def test_a_client_that_leaves_the_line_makes_room_in_it(start, gated) -> None:
    gate, behind = gated
    server = start(behind, max_active=1, max_waiting=1)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(server.post, "/v1/completions", ASK)
        assert server.waits_for("kilofed_active_requests", 1)
        waiting = open_stream(server, ASK)
        assert server.waits_for("kilofed_waiting_requests", 1)
        waiting.close()
        assert server.waits_for("kilofed_cancelled_total", 1)
        second = pool.submit(server.post, "/v1/completions", ASK)
        assert server.waits_for("kilofed_waiting_requests", 1)
        gate.gate.set()
        assert [first.result().status_code, second.result().status_code] == [200, 200]
    assert gate.num_begun == 2


def test_a_slow_reader_keeps_nobody_waiting(start) -> None:
    server = start(max_active=1, max_waiting=8)
    slow = open_stream(server, {**LONG, "logprobs": 100, "temperature": 1})
    try:
        assert server.post("/v1/completions", ASK).status_code == 200
        assert server.waits_for("kilofed_active_requests", 0)
        # What it was sent in the meantime is whole.
        slow.settimeout(20)
        seen = b""
        while b"data: [DONE]" not in seen:
            seen += slow.recv(1 << 16)
    finally:
        slow.close()


def test_a_reader_that_never_reads_is_cut_off(start, monkeypatch, caplog) -> None:
    monkeypatch.setattr("kilofed.serving.service.SLACK", 0.5)
    server = start(timeout=1.5, max_logprobs=259)
    # More than the buffers on the way hold: 64 prompts of 120 tokens with all log-probabilities.
    stuck = open_stream(server, {**ASK, "prompt": [[5] * 120] * 64, "max_tokens": 0, "echo": True, "logprobs": 259})
    with stuck:
        assert server.waits_for("kilofed_cancelled_total", 1)
    assert server.waits_for("kilofed_active_requests", 0)
    assert any("too slowly" in record.getMessage() for record in caplog.records)
    assert not any(record.exc_info for record in caplog.records)


def test_an_answer_that_takes_too_long_ends_with_an_error(start, gated) -> None:
    _, behind = gated
    server = start(behind, timeout=0.3)
    with pytest.raises(openai.InternalServerError) as caught:
        server.api.with_options(max_retries=2).completions.create(**ASK)
    assert (caught.value.status_code, caught.value.code) == (504, "timeout")
    # It would only be tried again in vain.
    assert server.http.get("/metrics").text.count('status="504"} 1.0\n') == 1
    with pytest.raises(openai.APIError, match="took longer"):
        list(server.api.completions.create(**ASK, stream=True))
    assert server.count("kilofed_failed_streams_total") == 1


def test_a_model_that_fails_ends_its_own_request_only(start, served) -> None:
    class Failing:
        context, end_ids = served.generator.context, served.generator.end_ids
        errors = (ModelError("the large model did not answer: try again"), RuntimeError("/secret/path"))

        def generate_tokens(self, ids, sampling):
            yield from served.generator.generate_tokens(ids, replace(sampling, max_new_tokens=1))
            if sampling.seed < 2:
                raise self.errors[sampling.seed]

        def score(self, ids, num_logprobs=0):
            return served.generator.score(ids, num_logprobs)

    server = start(replace(served, generator=Failing()))
    told = server.post("/v1/completions", {**ASK, "seed": 0})
    assert (told.status_code, told.json()["error"]["message"]) == (500, "the large model did not answer: try again")
    hidden = server.post("/v1/completions", {**ASK, "seed": 1})
    assert hidden.json()["error"]["message"] == "the model failed (RuntimeError)"
    assert "secret" not in hidden.text
    with pytest.raises(openai.APIError, match="RuntimeError"):
        list(server.api.completions.create(**ASK, seed=1, stream=True))
    assert server.post("/v1/completions", {**ASK, "seed": 2}).status_code == 200


def test_a_body_that_is_too_large_is_refused_declared_or_not(start) -> None:
    server = start(max_body=1000)
    large = json.dumps({**ASK, "prompt": "a" * 2000}).encode()

    def in_parts():
        for at in range(0, len(large), 100):
            yield large[at : at + 100]

    for content in (large, in_parts()):
        reply = server.http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "request_too_large")
    assert server.post("/v1/completions", ASK).status_code == 200


def test_a_body_that_comes_too_slowly_is_given_up(start, monkeypatch) -> None:
    monkeypatch.setattr("kilofed.serving.service.BODY_TIMEOUT", 0.2)
    server = start()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.token}\r\n"
            "Content-Type: application/json\r\nContent-Length: 500\r\n\r\n{".encode()
        )
        connection.settimeout(10)
        assert connection.recv(100).startswith(b"HTTP/1.1 408 ")


def test_unread_answers_are_bounded(served) -> None:
    with Scheduler(max_active=1, max_waiting=1) as scheduler:
        service = Service(served, scheduler, Limits(max_active=1, max_waiting=1))
        service.num_open = 7
        service.refuse_overload()
        service.num_open = 8
        with pytest.raises(Refusal, match="try again later"):
            service.refuse_overload()


def test_a_server_that_stops_ends_its_answers_with_a_word_and_its_threads(gated, monkeypatch, caplog) -> None:
    monkeypatch.setattr("kilofed.serving.server.GRACE", 1)
    gate, behind = gated
    gate.seconds = 0.05
    gate.gate.set()
    before = set(threading.enumerate())
    with ThreadPoolExecutor(1) as pool:
        with running(behind) as url:
            stream = open_stream(SimpleNamespace(url=url, token=None), LONG)
            whole = pool.submit(httpx.post, f"{url}/v1/completions", json=LONG, timeout=30)
            while gate.num_begun < 2 or not gate.num_tokens:
                time.sleep(0.01)
        with stream:
            stream.settimeout(10)
            seen = b"".join(iter(lambda: stream.recv(1 << 16), b""))
        assert (whole.result().status_code, whole.result().json()["error"]["code"]) == (503, "shutting_down")
    assert seen.startswith(b"HTTP/1.1 200 ")
    assert b"the server is shutting down" in seen
    assert b"[DONE]" not in seen
    assert 0 < gate.num_tokens < 240
    assert gate.num_closed == gate.num_begun == 2
    assert not caplog.records
    assert not {thread.name for thread in set(threading.enumerate()) - before} & {"serve", "decode"}
