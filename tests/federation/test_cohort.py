"""The server side of a method: the two verbs, failures and quorum, forecasts."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pytest
import torch

from kilofed.config.recipe import Recipe, TrainSpec
from kilofed.engines.inprocess import InProcess
from kilofed.errors import ClientError, NonFiniteLoss, PrivacyError, TooFewReplies
from kilofed.federation.cohort import Cohort
from kilofed.federation.ledger import Ledger
from kilofed.federation.method import Method, forecast, handle, on_client
from kilofed.federation.parties import Client, Server
from kilofed.federation.workload import Message, RunPreview
from kilofed.payload import Payload
from kilofed.privacy.mechanisms import CentralGaussian, Mechanism

OPEN = Mechanism()
CENTRAL = CentralGaussian(1.0, 0.0, 1e-5, "0" * 32)


@dataclass(frozen=True)
class Probe(Method):
    """A method whose clients answer from tables, so that every reply is known."""

    replies: Mapping[int, Payload] = field(default_factory=dict)
    broken: Mapping[int, Exception] = field(default_factory=dict)

    @on_client
    def tell(self, client: Client, ask: Payload) -> Payload:
        if client.id in self.broken:
            raise self.broken[client.id]
        return self.replies[client.id]

    @on_client(reads_data=False)
    def profile(self, client: Client, ask: Payload) -> Payload:
        return Payload({"speed": torch.full((2,), 100.0 * client.id)}, {"cores": client.id})


def client(number: int) -> Client:
    return Client(id=number, data=[], train=TrainSpec(), num_rounds=3, seed=0)


class Scrambled(InProcess):
    """Works through the clients in descending order and yields, as promised, in ascending order."""

    def exchange(self, asks: Mapping[int, bytes]) -> Iterator[tuple[int, bytes]]:
        found = {number: self._handler(number, asks[number]) for number in sorted(asks, reverse=True)}
        yield from sorted(found.items())


class Deaf(InProcess):
    """Client 1 never answers."""

    def exchange(self, asks: Mapping[int, bytes]) -> Iterator[tuple[int, bytes]]:
        yield from super().exchange({number: body for number, body in asks.items() if number != 1})


def cohort(
    method: Method,
    ids: list[int],
    policy: Mechanism = OPEN,
    *,
    engine: Callable[..., InProcess] = InProcess,
    quorum: int = 1,
    skip: bool = False,
    ledger: Ledger | None = None,
) -> Cohort:
    clients = {number: client(number) for number in ids}
    made = engine(ids, lambda number, body: handle(method, policy, clients[number], body))
    return Cohort(ids, made, ledger or Ledger(), policy, round=2, quorum=quorum, skip_failures=skip)


def three(**scalars: float) -> Probe:
    return Probe({n: Payload({"x": torch.full((2,), float(n))}, {"weight": n, **scalars}) for n in (1, 2, 3)})


# The two verbs.


def test_mean_is_weighted_by_what_clients_say() -> None:
    reply = cohort(three(loss=0.5), [1, 2, 3]).mean("tell", Payload())
    torch.testing.assert_close(reply.tensors["x"], torch.full((2,), (1 * 1 + 2 * 2 + 3 * 3) / 6))
    assert reply.scalars == {"loss": 0.5}


def test_a_reply_without_weight_counts_one() -> None:
    method = Probe({n: Payload({"x": torch.full((1,), float(n))}, {"loss": float(n)}) for n in (1, 2)})
    reply = cohort(method, [1, 2]).mean("tell", Payload())
    assert reply.tensors["x"].item() == 1.5
    assert reply.scalars == {"loss": 1.5}


def test_under_central_privacy_all_clients_weigh_the_same() -> None:
    method = Probe({n: Payload({"x": torch.full((1,), n / 10)}, {"weight": 100**n}) for n in (1, 2, 3)})
    assert cohort(method, [1, 2, 3], CENTRAL).mean("tell", Payload()).tensors["x"].item() == pytest.approx(0.2)


def test_mean_is_summed_in_float64() -> None:
    values = [1.0, 1e8, -1e8, 1.0]  # In float32 a 1 is lost beside 1e8.
    method = Probe({n: Payload({"x": torch.tensor([v])}) for n, v in enumerate(values)})
    reply = cohort(method, [0, 1, 2, 3]).mean("tell", Payload())
    assert reply.tensors["x"].item() == 0.5
    assert reply.tensors["x"].dtype == torch.float32


def test_mean_does_not_depend_on_who_worked_first() -> None:
    stream = torch.Generator().manual_seed(3)
    method = Probe(
        {n: Payload({"x": torch.randn(500, generator=stream) * 10**n}, {"weight": 7 - n}) for n in range(7)}
    )
    one, other = (
        cohort(method, list(range(7)), engine=kind).mean("tell", Payload()) for kind in (InProcess, Scrambled)
    )
    assert torch.equal(one.tensors["x"], other.tensors["x"])


def test_call_gives_every_reply_by_id() -> None:
    replies = cohort(three(), [3, 1, 2]).call("tell", Payload())
    assert {number: reply.tensors["x"][0].item() for number, reply in replies.items()} == {1: 1, 2: 2, 3: 3}


def test_one_ask_per_id_asks_those_ids_only() -> None:
    ledger = Ledger()
    replies = cohort(three(), [1, 2, 3], ledger=ledger).call("tell", {3: Payload(), 1: Payload()})
    assert sorted(replies) == [1, 3]
    assert [row.client for row in ledger.rows() if row.direction == "down"] == [1, 3]


def test_call_under_central_privacy_raises() -> None:
    with pytest.raises(PrivacyError, match=r"'tell' in Probe lets the server see single replies; privacy\.central"):
        cohort(three(), [1, 2, 3], CENTRAL, skip=True).call("tell", Payload())


def test_an_ask_for_each_client_under_central_privacy_raises() -> None:
    with pytest.raises(PrivacyError, match="needs one ask for all clients"):
        cohort(three(), [1, 2, 3], CENTRAL).mean("tell", {1: Payload()})


def test_what_reads_no_rows_may_be_called_under_central_privacy() -> None:
    assert sorted(cohort(three(), [1, 2], CENTRAL).call("profile", Payload())) == [1, 2]


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (Payload({"y": torch.ones(2)}), r"client 2: it sent other tensors than the clients before it: \['x', 'y'\]"),
        (Payload({"x": torch.ones(3)}), r"client 2: it sent x of shape \(3,\), others \(2,\)"),
        (Payload({"x": torch.ones(2)}, {"weight": -1}), r"client 2: it sent weight -1\.0; expected a number from 0"),
        (
            Payload({"x": torch.ones(2)}, {"word": "hm"}),
            r"client 2: it sent the scalar word='hm'; a mean takes numbers",
        ),
    ],
)
def test_a_reply_that_does_not_fit_is_named(odd: Payload, message: str) -> None:
    method = Probe({1: Payload({"x": torch.ones(2)}), 2: odd})
    with pytest.raises(ClientError, match=message):
        cohort(method, [1, 2]).mean("tell", Payload())


def test_a_reply_that_does_not_fit_is_left_out_before_it_enters_the_sum() -> None:
    method = Probe({1: Payload({"x": torch.ones(2)}), 2: Payload({"x": torch.tensor([1.0, float("nan")])})})
    clients = cohort(method, [1, 2], skip=True)
    assert clients.mean("tell", Payload()).tensors["x"].tolist() == [1.0, 1.0]
    assert "NaN" in clients.failures[2]


def test_a_second_mean_of_a_round_is_another_exchange() -> None:
    ledger = Ledger()
    clients = cohort(three(), [1, 2], ledger=ledger)
    clients.mean("tell", Payload())
    clients.mean("tell", Payload())
    assert ledger.num_exchanges == 2
    assert {row.exchange for row in ledger.rows()} == {0, 1}


# Failures.


def test_a_failure_stops_the_round_and_names_the_client() -> None:
    method = Probe(three().replies, {2: NonFiniteLoss("the loss is nan at step 4")})
    with pytest.raises(
        ClientError, match="round 2: client 2: the loss is nan at step 4; the state of round 1 is kept"
    ):
        cohort(method, [1, 2, 3]).mean("tell", Payload())


def test_a_failure_is_skipped_when_the_recipe_says_so(caplog: pytest.LogCaptureFixture) -> None:
    method = Probe(three().replies, {2: NonFiniteLoss("the loss is nan")})
    clients = cohort(method, [1, 2, 3], skip=True)
    with caplog.at_level(logging.WARNING, "kilofed"):
        reply = clients.mean("tell", Payload())
    assert reply.tensors["x"][0].item() == pytest.approx((1 * 1 + 3 * 3) / 4)
    assert clients.failures == {2: "the loss is nan"}
    assert "round 2: client 2 is left out: the loss is nan" in caplog.text


@pytest.mark.parametrize("body", [b"", b"rubbish" * 3])
def test_a_damaged_reply_is_that_clients_failure(body: bytes) -> None:
    class Damaging(InProcess):
        def exchange(self, asks: Mapping[int, bytes]) -> Iterator[tuple[int, bytes]]:
            for number, reply in super().exchange(asks):
                yield number, body if number == 2 else reply

    clients = cohort(three(), [1, 2, 3], engine=Damaging, skip=True)
    assert sorted(clients.call("tell", Payload())) == [1, 3]
    assert "not a whole kilofed payload" in clients.failures[2]


def test_silence_is_a_failure_that_the_round_survives() -> None:
    clients = cohort(three(), [1, 2, 3], engine=Deaf)
    assert sorted(clients.call("tell", Payload())) == [2, 3]
    assert clients.failures == {1: "no answer"}


@pytest.mark.parametrize("verb", ["mean", "call"])
def test_fewer_replies_than_the_quorum_raise(verb: str) -> None:
    clients = cohort(three(), [1, 2, 3], engine=Deaf, quorum=3)
    with pytest.raises(TooFewReplies, match="round 2: 2 of 3 clients answered 'tell', quorum is 3"):
        getattr(clients, verb)("tell", Payload())


def test_a_quorum_that_is_met_goes_on() -> None:
    assert cohort(three(), [1, 2, 3], engine=Deaf, quorum=2).mean("tell", Payload()).tensors["x"].numel() == 2


# Forecasts.


@dataclass(frozen=True)
class Talkative(Probe):
    """Two means and a call per round, with scalars of every kind in the asks."""

    def messages(self, preview: RunPreview) -> dict[int, Sequence[Message]]:
        tell = Payload({"x": torch.zeros(2)}, {"weight": 1, "loss": 0.0})
        asked = Payload(preview.server.state, {"temperature": 0.0, "flag": False})
        profile = Message("profile", "call", Payload(), self._profile())
        return preview.alike(Message("tell", "mean", asked, tell, times=2), profile)

    def _profile(self) -> Payload:
        return Payload({"speed": torch.zeros(2)}, {"cores": 0})


@pytest.mark.parametrize("policy", [OPEN, CENTRAL])
def test_the_forecast_is_what_the_ledger_counts(policy: Mechanism) -> None:
    method = Talkative(
        {n: Payload({"x": torch.randn(2)}, {"weight": 10 ** (n % 18), "loss": math.pi * n}) for n in (1, 12, 123)}
    )
    server = Server(0, 3, TrainSpec(), state={"w": torch.randn(5, 3)})
    preview = RunPreview(Recipe(), server, lambda _: [], lambda _: [], ids=[1, 12, 123])
    told = forecast(method, preview, policy)
    assert sorted(told) == [1, 12, 123]
    ledger = Ledger()
    clients = cohort(method, [1, 12, 123], policy, ledger=ledger)
    for temperature in (0.1, 1e300):
        clients.mean("tell", Payload(server.state, {"temperature": temperature, "flag": True}))
    clients.call("profile", Payload())
    assert [(one.action, one.exchanges) for one in told[1]] == [("tell", 2), ("profile", 1)]
    for number in (1, 12, 123):
        assert ledger.per_client("down")[number] == sum(one.down for one in told[number])
        assert ledger.per_client("up")[number] == sum(one.up for one in told[number])
