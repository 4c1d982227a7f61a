"""The engine in process: ascending order, only who is asked, one client at a time."""

import pytest

from kilofed.engines.inprocess import InProcess


def test_clients_answer_in_ascending_order_whatever_the_order_of_the_asks() -> None:
    engine = InProcess([7, 1, 30], lambda client, body: body + bytes([client]))
    assert engine.client_ids() == [1, 7, 30]
    assert list(engine.exchange({30: b"c", 1: b"a"})) == [(1, b"a\x01"), (30, b"c\x1e")]


def test_a_client_is_asked_when_its_reply_is_taken_and_not_before() -> None:
    asked: list[int] = []

    def handler(client: int, body: bytes) -> bytes:
        asked.append(client)
        return body

    replies = InProcess([0, 1, 2], handler).exchange({0: b"", 1: b"", 2: b""})
    assert asked == []
    assert next(replies) == (0, b"")
    assert asked == [0]
    assert [client for client, _ in replies] == [1, 2]


def test_the_list_of_clients_is_a_copy() -> None:
    engine = InProcess([2, 1], lambda client, body: body)
    engine.client_ids().clear()
    assert engine.client_ids() == [1, 2]


def test_an_error_of_a_client_reaches_the_caller_and_the_engine_goes_on() -> None:
    def handler(client: int, body: bytes) -> bytes:
        if body == b"bad":
            raise ValueError("no such thing")
        return body

    engine = InProcess([0, 1], handler)
    with pytest.raises(ValueError, match="no such thing"):
        list(engine.exchange({0: b"good", 1: b"bad"}))
    assert list(engine.exchange({1: b"good"})) == [(1, b"good")]


def test_nothing_is_framed() -> None:
    engine = InProcess([0], lambda client, body: body * 100)
    list(engine.exchange({0: b"x"}))
    assert engine.overhead() == 0
    engine.close()
