"""Faults on a seeded plan: what the wrapper does, and what a round makes of it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pytest
import torch

from kilofed.config.recipe import TrainSpec
from kilofed.engines.faulty import Faults, Faulty
from kilofed.engines.inprocess import Handler, InProcess
from kilofed.errors import ClientError, RecipeError, TooFewReplies
from kilofed.federation.cohort import Cohort, Rules
from kilofed.federation.ledger import Ledger
from kilofed.federation.method import Method, handle, on_client
from kilofed.federation.parties import Client
from kilofed.payload import Payload
from kilofed.privacy.mechanisms import Mechanism

IDS = list(range(40))


@dataclass(frozen=True)
class Counting(Method):
    """Each client sends its number and how often it was asked, as its state remembers."""

    @on_client
    def count(self, client: Client, ask: Payload) -> Payload:
        num = client.state.get("num", torch.zeros(())) + 1
        client.state["num"] = num
        return Payload({"id": torch.full((3,), float(client.id)), "num": num})


COUNTED = Payload({"id": torch.zeros(3), "num": torch.zeros(())})


def handler() -> Handler:
    method = Counting()
    clients = {i: Client(id=i, data=[], train=TrainSpec(), num_rounds=3, seed=0) for i in IDS}
    return lambda client, body: handle(method, Mechanism(), clients[client], body)


def cohort(faults: Faults, seed: int = 0, *, skip: bool = True, quorum: int = 1) -> Cohort:
    engine = Faulty(InProcess(IDS, handler()), faults, seed)
    return Cohort(IDS, engine, Ledger(), Mechanism(), round=2, rules=Rules(quorum, skip))


class Echo(InProcess):
    """Counts how often each client is asked."""

    def __init__(self) -> None:
        super().__init__(IDS, lambda client, body: body)
        self.times: list[int] = []

    def exchange(self, asks: Mapping[int, bytes]) -> Iterator[tuple[int, bytes]]:
        for client, reply in super().exchange(asks):
            self.times.append(client)
            yield client, reply


ASKS = {client: bytes(range(200)) for client in IDS}


def test_no_faults_change_nothing() -> None:
    assert list(Faulty(Echo(), Faults(), 1).exchange(ASKS)) == list(ASKS.items())


@pytest.mark.parametrize("fault", ["drop", "truncate", "corrupt", "duplicate"])
def test_a_plan_hits_its_share_and_repeats_itself(fault: str) -> None:
    def hit(seed: int) -> list[tuple[int, bytes]]:
        return list(Faulty(Echo(), Faults(**{fault: 0.25}), seed).exchange(ASKS))

    assert hit(1) == hit(1)
    if fault != "duplicate":
        assert hit(1) != hit(2)
        spared = sum(reply == ASKS[client] for client, reply in hit(1))
        assert 20 <= spared < 40


def test_a_plan_does_not_depend_on_who_else_is_asked() -> None:
    whole = dict(Faulty(Echo(), Faults(drop=0.5), 3).exchange(ASKS))
    half = dict(Faulty(Echo(), Faults(drop=0.5), 3).exchange({c: ASKS[c] for c in IDS[::2]}))
    assert half == {client: reply for client, reply in whole.items() if client % 2 == 0}


def test_a_plan_differs_from_exchange_to_exchange() -> None:
    engine = Faulty(Echo(), Faults(drop=0.5), 3)
    assert dict(engine.exchange(ASKS)) != dict(engine.exchange(ASKS))


def test_a_duplicate_is_delivered_twice_and_answered_once() -> None:
    echo = Echo()
    assert list(Faulty(echo, Faults(duplicate=1.0)).exchange({1: b"a", 2: b"b"})) == [(1, b"a"), (2, b"b")]
    assert sorted(echo.times) == [1, 1, 2, 2]


def test_a_delay_delays() -> None:
    engine = Faulty(Echo(), Faults(delay=1.0, seconds=0.0))
    assert list(engine.exchange({1: b"a"})) == [(1, b"a")]


def test_a_kill_breaks_the_exchange_off() -> None:
    with pytest.raises(ConnectionResetError, match="client 0, as planned"):
        list(Faulty(Echo(), Faults(kill=1.0)).exchange(ASKS))


@pytest.mark.parametrize("faults", [Faults(drop=-0.1), Faults(drop=0.6, corrupt=0.6)])
def test_shares_that_are_no_shares_are_refused(faults: Faults) -> None:
    with pytest.raises(RecipeError, match="at least 0 and at most 1"):
        Faulty(Echo(), faults)


@pytest.mark.parametrize("fault", ["truncate", "corrupt"])
def test_a_damaged_reply_is_its_clients_failure(fault: str) -> None:
    some = cohort(Faults(**{fault: 0.3}))
    mean = some.mean("count", Payload(), COUNTED)
    spared = [client for client in IDS if client not in some.failures]
    assert 15 < len(spared) < 40
    assert all("not a whole kilofed payload" in text for text in some.failures.values())
    torch.testing.assert_close(mean.tensors["id"], torch.full((3,), sum(spared) / len(spared)))


@pytest.mark.parametrize("fault", ["truncate", "corrupt"])
def test_a_damaged_reply_stops_a_run_that_stops(fault: str) -> None:
    with pytest.raises(ClientError, match=r"round 2: client 0: .* bytes are not a whole kilofed payload"):
        cohort(Faults(**{fault: 1.0}), skip=False).mean("count", Payload(), COUNTED)


def test_a_dropped_reply_is_no_answer() -> None:
    some = cohort(Faults(drop=0.3))
    replies = some.call("count", Payload(), COUNTED)
    assert set(some.failures.values()) == {"no answer to 'count'"}
    assert sorted(set(replies) | set(some.failures)) == IDS


def test_too_many_faults_miss_the_quorum() -> None:
    with pytest.raises(TooFewReplies, match="of 40 clients are left after 'count', quorum is 35"):
        cohort(Faults(drop=0.3, truncate=0.2), quorum=35).mean("count", Payload(), COUNTED)


def test_a_message_delivered_twice_counts_once_in_a_clients_state() -> None:
    once, twice = cohort(Faults()), cohort(Faults(duplicate=1.0))
    for number in (1, 2, 3):
        assert once.mean("count", Payload(), COUNTED).tensors["num"].item() == number
        assert twice.mean("count", Payload(), COUNTED).tensors["num"].item() == number
