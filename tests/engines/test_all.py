"""The contract of engines: bytes in are bytes out, in ascending order of ids, without those who did not answer."""

import random

import pytest

from kilofed.errors import NonFiniteLoss
from kilofed.federation.cohort import Engine


def test_the_ids_are_those_given(engine: Engine) -> None:
    assert engine.client_ids() == [0, 1, 2, 3, 4, 7]


def test_bytes_come_back_as_they_were_sent(engine: Engine) -> None:
    source = random.Random(0)
    asks = {client: source.randbytes(1000 * client + 1) for client in engine.client_ids()}
    assert list(engine.exchange(asks)) == list(asks.items())


def test_an_empty_message_is_one(engine: Engine) -> None:
    assert list(engine.exchange({3: b""})) == [(3, b"")]


def test_messages_longer_than_any_pipe_pass(engine: Engine) -> None:
    body = random.Random(0).randbytes(10_000_000)
    for client, reply in engine.exchange(dict.fromkeys(engine.client_ids(), body)):
        assert reply == body, client


def test_replies_come_in_ascending_order_whoever_is_first(engine: Engine) -> None:
    asks = {7: b"quick", 4: b"quick", 3: b"quick", 0: b"slow", 2: b"slow", 1: b"quick"}
    assert list(engine.exchange(asks)) == sorted(asks.items())


def test_only_those_asked_answer(engine: Engine) -> None:
    assert list(engine.exchange({7: b"x", 2: b"y"})) == [(2, b"y"), (7, b"x")]
    assert list(engine.exchange({})) == []


def test_an_exchange_left_early_leaves_nothing_behind(engine: Engine) -> None:
    for _ in engine.exchange(dict.fromkeys(engine.client_ids(), b"old")):
        break
    assert list(engine.exchange({1: b"new", 2: b"new"})) == [(1, b"new"), (2, b"new")]


def test_an_error_of_a_client_is_raised_as_it_is(engine: Engine) -> None:
    with pytest.raises(NonFiniteLoss, match=r"^client 2: nothing to learn: at all$"):
        list(engine.exchange({1: b"x", 2: b"refuse"}))
    assert list(engine.exchange({1: b"x", 2: b"y"})) == [(1, b"x"), (2, b"y")]


def test_a_bug_in_a_client_shows_its_traceback(separate: Engine) -> None:
    with pytest.raises(RuntimeError, match=r"client 2 failed:(.|\n)*ZeroDivisionError: a bug"):
        list(separate.exchange({2: b"fail"}))


def test_handlers_are_built_from_their_arguments(separate: Engine) -> None:
    replies = dict(separate.exchange(dict.fromkeys(separate.client_ids(), b"who")))
    assert {client: reply.split()[0] for client, reply in replies.items()} == {c: b"%d" % c for c in replies}
    assert all(reply.split()[2:] == [b"1", b"a", b"b"] for reply in replies.values())


def test_a_client_whose_process_dies_is_left_out_alone(separate: Engine, caplog: pytest.LogCaptureFixture) -> None:
    asks = dict.fromkeys(separate.client_ids(), b"x") | {2: b"die"}
    assert [client for client, _ in separate.exchange(asks)] == [0, 1, 3, 4, 7]
    assert "client 2" in caplog.text
    assert "died" in caplog.text
    assert [client for client, _ in separate.exchange(dict.fromkeys(asks, b"x"))] == [0, 1, 2, 3, 4, 7]


def test_a_client_that_is_late_is_left_out(separate: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    list(separate.exchange(dict.fromkeys(separate.client_ids(), b"x")))
    with monkeypatch.context() as patch:
        patch.setattr(separate, "_timeout", 5.0)
        replies = dict(separate.exchange({1: b"x", 2: b"sleep", 3: b"x"}))
    assert replies == {1: b"x", 3: b"x"}
    assert dict(separate.exchange({1: b"y", 2: b"y"})) == {1: b"y", 2: b"y"}
