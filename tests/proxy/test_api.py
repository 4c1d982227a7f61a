"""Requests to an API on loopback: retries, refusals, the budget, the ledger, and where the key is not."""

import json
import logging
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.loopback import Fault, Loopback, cut, malformed, packed, served, slow, status
from tests.tiny_models import model

from kilofed.errors import BudgetSpent, RemoteError
from kilofed.proxy.api import Api
from kilofed.proxy.spec import LargeSpec

PROMPTS = [[1, 5, 9], [1, 8]]


@pytest.fixture
def server() -> Iterator[Loopback]:
    with served(model(0)) as running:
        yield running


def spec(server: Loopback, **fields: object) -> LargeSpec:
    return LargeSpec(server.url, name="large", first_wait=0.001, timeout=0.3, **fields)  # type: ignore[arg-type]


def test_answers_come_in_the_order_of_the_prompts(server: Loopback) -> None:
    api = Api(spec(server, top_k=3))
    found = api.complete(PROMPTS, 5, echo=True)
    assert [len(one["top_logprobs"]) for one in found] == [4, 3]  # type: ignore[arg-type]
    assert api.num_requests == 1
    assert api.num_tokens == 7
    api.close()


@pytest.mark.parametrize(
    "fault",
    [
        status(429),
        status(500),
        status(503, {"Retry-After": "0.01"}),
        slow(0.6),
        cut,
        malformed(b"{"),
        malformed(b"[]"),
        malformed(b'{"choices": []}'),
        malformed(b'{"choices": [7, 8]}'),
        malformed(b'{"choices": [{"index": 1e999}, {"index": 0}]}'),
        malformed(b"[" * 100_000),
        packed(b"not gzip", "gzip"),
    ],
    ids=[
        *("429", "500", "503", "slow", "cut", "half JSON", "a list", "no choices", "no objects"),
        *("endless index", "deep JSON", "not gzip"),
    ],
)
def test_a_passing_fault_is_tried_again(server: Loopback, fault: Fault) -> None:
    server.faults = [fault, fault]
    api = Api(spec(server))
    assert len(api.complete(PROMPTS, 5, echo=False)) == 2
    assert api.num_requests == 3
    api.close()


def test_tries_are_bounded(server: Loopback) -> None:
    server.faults = [status(503)] * 9
    api = Api(spec(server, max_tries=3))
    with pytest.raises(RemoteError, match=r"no answer \(tries: 3, last: status 503\)"):
        api.complete(PROMPTS, 5, echo=False)
    assert len(server.bodies) == 3
    api.close()


def test_nobody_there_is_said(server: Loopback) -> None:
    api = Api(LargeSpec("http://127.0.0.1:1/v1", name="large", first_wait=0.001, max_tries=2))
    with pytest.raises(RemoteError, match=r"the connection failed \(ConnectError\)"):
        api.complete(PROMPTS, 5, echo=False)
    api.close()


def test_the_api_s_wait_is_kept(server: Loopback) -> None:
    server.faults = [status(429, {"Retry-After": "0.2"})]
    api = Api(spec(server))
    began = time.monotonic()
    api.complete(PROMPTS, 5, echo=False)
    assert time.monotonic() - began >= 0.2
    api.close()


def test_a_wrong_request_is_not_tried_again(server: Loopback) -> None:
    server.faults = [status(400, message="logprobs must be at most 5")]
    api = Api(spec(server))
    with pytest.raises(RemoteError, match=r"status 400 \(logprobs must be at most 5\)"):
        api.complete(PROMPTS, 5, echo=False)
    assert len(server.bodies) == 1
    api.close()


def test_an_unknown_model_is_told_which_there_are(server: Loopback) -> None:
    api = Api(LargeSpec(server.url, name="lrage"))
    with pytest.raises(RemoteError, match="does not serve lrage; it serves large, other"):
        api.complete(PROMPTS, 5, echo=False)
    api.close()


@pytest.mark.parametrize("left_out", [True, False])
def test_no_logprobs_is_one_clear_sentence(server: Loopback, left_out: bool) -> None:
    server.tells_logprobs = False
    if left_out:
        server.faults = [malformed(b'{"choices": [{"index": 0, "text": "a"}, {"index": 1, "text": "b"}]}')]
    api = Api(spec(server))
    with pytest.raises(RemoteError, match="answers without log-probabilities: proxy-tuning needs"):
        api.complete(PROMPTS, 5, echo=False)
    assert len(server.bodies) == 1
    api.close()


def test_the_budget_stops_before_the_request_that_would_pass_it(server: Loopback) -> None:
    api = Api(spec(server, max_requests=2))
    for _ in range(2):
        api.complete(PROMPTS, 5, echo=False)
    with pytest.raises(BudgetSpent, match=r"2 requests and 14 tokens were sent.*max_requests=2.*resume"):
        api.complete(PROMPTS, 5, echo=False)
    assert len(server.bodies) == 2
    api.close()
    api = Api(spec(server, max_tokens=6))
    with pytest.raises(BudgetSpent, match="max_tokens=6"):
        api.complete(PROMPTS, 5, echo=False)
    assert len(server.bodies) == 2
    api.close()


def test_tries_count_against_the_budget(server: Loopback) -> None:
    server.faults = [status(500)] * 9
    api = Api(spec(server, max_requests=2))
    with pytest.raises(BudgetSpent):
        api.complete(PROMPTS, 5, echo=False)
    assert len(server.bodies) == 2
    api.close()


def test_the_ledger_has_every_request_and_goes_on_after_a_kill(server: Loopback, tmp_path: Path) -> None:
    path = tmp_path / "remote.jsonl"
    server.faults = [status(500)]
    api = Api(spec(server), path)
    api.complete(PROMPTS, 5, echo=False)
    api.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["status"], row["prompts"], row["tokens"]) for row in rows] == [(500, 2, 7), (200, 2, 7)]
    assert rows[1]["up"] == len(json.dumps(server.bodies[1], separators=(",", ":")))
    assert rows[1]["down"] > 100
    with path.open("a") as file:
        file.write('{"model":"la')  # Killed in the middle of a row.
    api = Api(spec(server), path)
    assert (api.num_requests, api.num_tokens) == (3, 14)
    api.complete(PROMPTS, 5, echo=False)
    api.close()
    assert json.loads(path.read_text().splitlines()[-1])["status"] == 200


KEY = "sk-a-very-secret-key"


def test_the_key_travels_in_the_header_and_is_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("KILOFED_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    with served(model(0), key=KEY) as server:
        server.faults = [status(500), status(400, message=f"your key {KEY} is not for this")]
        api = Api(spec(server), tmp_path / "remote.jsonl")
        with pytest.raises(RemoteError) as refused:
            api.complete(PROMPTS, 5, echo=False)
        api.complete(PROMPTS, 5, echo=False)
        assert server.headers[-1]["Authorization"] == f"Bearer {KEY}"
        assert KEY not in json.dumps(server.bodies)
        api.close()
    assert "your key [key] is not for this" in str(refused.value)
    written = [str(refused.value), repr(refused.value.__context__), caplog.text, repr(vars(api)), repr(api.spec)]
    written += [path.read_text() for path in tmp_path.iterdir()]
    assert not any(KEY in text for text in written)


def test_a_wrong_key_says_which_variable_to_look_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTHER_KEY", "sk-wrong")
    with served(model(0), key=KEY) as server:
        api = Api(spec(server, key_variable="OTHER_KEY"))
        with pytest.raises(RemoteError, match=r"refused the key \(status 401\): check \$OTHER_KEY") as refused:
            api.complete(PROMPTS, 5, echo=False)
        api.close()
    assert "sk-wrong" not in str(refused.value)


def test_a_key_with_a_line_break_is_refused_without_showing_it(
    server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KILOFED_API_KEY", KEY + "\n")
    api = Api(spec(server))
    with pytest.raises(RemoteError, match="holds characters that no key has") as refused:
        api.complete(PROMPTS, 5, echo=False)
    assert KEY not in str(refused.value)
    api.close()


PLAIN = "is plain http, so that everyone on the way could read the key"


@pytest.mark.parametrize(
    "address",
    [
        "http://192.0.2.1/v1",
        "http://models.example.org/v1",
        "http://localhost.example.org:8000/v1",
        "HTTP://192.0.2.1/v1",
        "http://[2001:db8::1]:8000/v1",
    ],
)
def test_a_key_is_not_sent_in_plain_text_over_a_network(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KILOFED_API_KEY", KEY)
    with pytest.raises(RemoteError, match=PLAIN) as refused:
        Api(LargeSpec(address, name="large"))
    assert KEY not in str(refused.value)


def test_a_key_that_is_set_later_is_not_sent_in_plain_text_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KILOFED_API_KEY", raising=False)
    api = Api(LargeSpec("http://192.0.2.1/v1", name="large", max_tries=1, timeout=0.2))
    monkeypatch.setenv("KILOFED_API_KEY", KEY)
    for ask in (lambda: api.complete(PROMPTS, 5, echo=False), api.model_names):
        with pytest.raises(RemoteError, match=PLAIN):
            ask()
    assert api.num_requests == 0
    api.close()


def test_without_a_key_plain_text_may_cross_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KILOFED_API_KEY", "")
    Api(LargeSpec("http://192.0.2.1/v1", name="large")).close()


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_redirect_is_named_and_not_followed(code: int, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KILOFED_API_KEY", KEY)
    with served(model(0), key=KEY) as server, served(model(0)) as other:
        place = f"http://{host}:{other.server_port}/v1/completions?echo={KEY}"
        server.faults = [status(code, {"Location": place})]
        api = Api(spec(server))
        with pytest.raises(RemoteError, match=rf"sends requests on to http://{host}:\d+/.*status {code}") as refused:
            api.complete(PROMPTS, 5, echo=False)
        assert KEY not in str(refused.value)
        assert "set the large model's path to the address that answers" in str(refused.value)
        assert other.num_connections == 0
        api.close()


def test_a_key_for_this_machine_goes_through_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KILOFED_API_KEY", KEY)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with served(model(0), key=KEY) as server, served(model(0)) as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.server_port}")
        api = Api(spec(server))
        assert len(api.complete(PROMPTS, 5, echo=False)) == 2
        assert proxy.num_connections == 0
        api.close()


def test_no_part_of_a_key_is_left_where_a_long_message_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KILOFED_API_KEY", KEY)
    for start in range(275, 300):
        with served(model(0), key=KEY) as server:
            server.faults = [status(400, message="x" * start + KEY)]
            api = Api(spec(server))
            with pytest.raises(RemoteError) as refused:
                api.complete(PROMPTS, 5, echo=False)
            assert "sk-a" not in str(refused.value)
            api.close()


def test_what_a_stranger_says_commands_no_terminal_and_holds_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KILOFED_API_KEY", KEY)
    with served(model(0), key=KEY) as server:
        server.faults = [status(400, message=f"red \x1b[31m\nnext {KEY}")]
        api = Api(spec(server))
        with pytest.raises(RemoteError, match=r"\(red \?\[31m next \[key\]\)"):
            api.complete(PROMPTS, 5, echo=False)
        api.close()


def test_an_answer_that_is_far_too_long_is_given_up(server: Loopback) -> None:
    bomb = zlib.compress(b" " * 2**26)
    server.faults = [packed(bomb, "deflate")]
    api = Api(spec(server))
    with pytest.raises(RemoteError, match="which no answer to 2 prompts has"):
        api.complete(PROMPTS, 5, echo=False)
    assert len(server.bodies) == 1
    api.close()
