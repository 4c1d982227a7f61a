"""The server side of a method: the two verbs, failures and quorum, forecasts."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import pytest
import torch

from kilofed.config.recipe import Recipe, TrainSpec
from kilofed.engines.inprocess import InProcess
from kilofed.errors import ClientError, NonFiniteLoss, PayloadError, PrivacyError, TooFewReplies, WrongWeights
from kilofed.federation.address import Address
from kilofed.federation.cohort import Cohort, Rules
from kilofed.federation.expected import Expected, TensorLike
from kilofed.federation.ledger import Ledger
from kilofed.federation.method import Method, forecast, handle, on_client, reads_data
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


X = Payload({"x": torch.zeros(2)})
"""A reply with two numbers and nothing else."""
WEIGHTED = Payload(X.tensors, {"weight": 1})
PROFILE = Payload({"speed": torch.zeros(2)}, {"cores": 0})


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
    rules: Rules | None = None,
    rows: Mapping[int, int] | None = None,
    round: int = 2,
) -> Cohort:
    clients = {number: client(number) for number in ids}
    made = engine(ids, lambda number, body: handle(method, policy, clients[number], body))
    return Cohort(
        ids,
        made,
        ledger or Ledger(),
        policy,
        round=round,
        rules=rules or Rules(quorum, skip),
        max_weight_of=(rows or dict.fromkeys(ids, math.inf)).__getitem__,
        reads_data=partial(reads_data, method),
    )


def three(**scalars: float) -> Probe:
    return Probe({n: Payload({"x": torch.full((2,), float(n))}, {"weight": n, **scalars}) for n in (1, 2, 3)})


# The two verbs.


def test_mean_is_weighted_by_what_clients_say() -> None:
    reply = cohort(three(loss=0.5), [1, 2, 3]).mean("tell", Payload(), Payload(X.tensors, {"weight": 1, "loss": 0.0}))
    torch.testing.assert_close(reply.tensors["x"], torch.full((2,), (1 * 1 + 2 * 2 + 3 * 3) / 6))
    assert reply.scalars == {"loss": 0.5}


def test_a_reply_without_weight_counts_one() -> None:
    method = Probe({n: Payload({"x": torch.full((1,), float(n))}, {"loss": float(n)}) for n in (1, 2)})
    reply = cohort(method, [1, 2]).mean("tell", Payload(), Payload({"x": torch.zeros(1)}, {"loss": 0.0}))
    assert reply.tensors["x"].item() == 1.5
    assert reply.scalars == {"loss": 1.5}


def test_under_central_privacy_all_clients_weigh_the_same() -> None:
    method = Probe({n: Payload({"x": torch.full((1,), n / 10)}, {"weight": 100**n}) for n in (1, 2, 3)})
    like = Payload({"x": torch.zeros(1)}, {"weight": 1})
    assert cohort(method, [1, 2, 3], CENTRAL).mean("tell", Payload(), like).tensors["x"].item() == pytest.approx(0.2)


def test_mean_is_summed_in_float64() -> None:
    values = [1.0, 1e8, -1e8, 1.0]  # In float32 a 1 is lost beside 1e8.
    method = Probe({n: Payload({"x": torch.tensor([v])}) for n, v in enumerate(values)})
    reply = cohort(method, [0, 1, 2, 3]).mean("tell", Payload(), Payload({"x": torch.zeros(1)}))
    assert reply.tensors["x"].item() == 0.5
    assert reply.tensors["x"].dtype == torch.float32


def test_mean_does_not_depend_on_who_worked_first() -> None:
    stream = torch.Generator().manual_seed(3)
    method = Probe(
        {n: Payload({"x": torch.randn(500, generator=stream) * 10**n}, {"weight": 7 - n}) for n in range(7)}
    )
    like = Payload({"x": torch.zeros(500)}, {"weight": 1})
    one, other = (
        cohort(method, list(range(7)), engine=kind).mean("tell", Payload(), like) for kind in (InProcess, Scrambled)
    )
    assert torch.equal(one.tensors["x"], other.tensors["x"])


def test_call_gives_every_reply_by_id() -> None:
    replies = cohort(three(), [3, 1, 2]).call("tell", Payload(), WEIGHTED)
    assert {number: reply.tensors["x"][0].item() for number, reply in replies.items()} == {1: 1, 2: 2, 3: 3}


def test_one_ask_per_id_asks_those_ids_only() -> None:
    ledger = Ledger()
    replies = cohort(three(), [1, 2, 3], ledger=ledger).call("tell", {3: Payload(), 1: Payload()}, WEIGHTED)
    assert sorted(replies) == [1, 3]
    assert [row.client for row in ledger.rows() if row.direction == "down"] == [1, 3]


def test_call_under_central_privacy_raises() -> None:
    with pytest.raises(PrivacyError, match=r"'tell' lets the server see single replies; privacy\.central"):
        cohort(three(), [1, 2, 3], CENTRAL, skip=True).call("tell", Payload(), WEIGHTED)


def test_an_ask_for_each_client_under_central_privacy_raises() -> None:
    with pytest.raises(PrivacyError, match="needs one ask for all clients"):
        cohort(three(), [1, 2, 3], CENTRAL).mean("tell", {1: Payload()}, WEIGHTED)


def test_what_reads_no_rows_may_be_called_under_central_privacy() -> None:
    assert sorted(cohort(three(), [1, 2], CENTRAL).call("profile", Payload(), PROFILE)) == [1, 2]


# What a reply must be.

ODD: list[tuple[Payload, str]] = [
    (
        Payload({"y": torch.ones(2)}, {"weight": 1}),
        "it sent other tensors than it was asked for: 'x' is missing, 'y' is",
    ),
    (Payload({**X.tensors, "y": torch.ones(2)}, {"weight": 1}), "it sent other tensors .*: 'y' is too many"),
    (Payload(scalars={"weight": 1}), "it sent other tensors .*: 'x' is missing"),
    (Payload({"x": torch.ones(3)}, {"weight": 1}), r"it sent x of shape \(3,\); expected \(2,\)"),
    (Payload({"x": torch.ones(1, 2)}, {"weight": 1}), r"it sent x of shape \(1, 2\); expected \(2,\)"),
    (Payload({"x": torch.ones(2).double()}, {"weight": 1}), r"it sent x as torch.float64; expected torch.float32"),
    (Payload(X.tensors), "it sent other scalars than it was asked for: 'weight' is missing"),
    (Payload(X.tensors, {"weight": 1, "round": 7}), "it sent other scalars .*: 'round' is too many"),
    (Payload(X.tensors, {"weight": "abc"}), "it sent the scalar weight='abc'; expected a number"),
    (Payload(X.tensors, {"weight": True}), "it sent the scalar weight=True; expected a number"),
    (Payload(X.tensors, {"weight": -1}), "it sent weight -1; expected a number from 0"),
    (Payload(X.tensors, {"weight": 1e9}), "it sent weight 1e.09; its rows allow at most 41"),
    (Payload(X.tensors, {"weight": 1e308}), "it sent weight 1e.308; its rows allow at most 41"),
    (Payload({"x": torch.tensor([1.0, math.nan])}, {"weight": 1}), "it sent NaN or infinite numbers in x"),
    (Payload({"x": torch.ones(5000)}, {"weight": 1}), "it sent 20[0-9]* bytes; expected at most"),
]


@pytest.mark.parametrize("liar", [1, 2, 3])
@pytest.mark.parametrize(("odd", "message"), ODD)
def test_a_reply_unlike_what_was_asked_for_is_named_and_never_enters_the_mean(
    odd: Payload, message: str, liar: int
) -> None:
    honest = {n: Payload({"x": torch.full((2,), float(n))}, {"weight": 10 * n}) for n in (1, 2, 3)}
    rows = dict.fromkeys((1, 2, 3), 41)
    with pytest.raises(ClientError, match=f"round 2: client {liar}: {message}"):
        cohort(Probe({**honest, liar: odd}), [1, 2, 3], rows=rows).mean("tell", Payload(), WEIGHTED)
    clients = cohort(Probe({**honest, liar: odd}), [1, 2, 3], rows=rows, skip=True)
    others = [n for n in (1, 2, 3) if n != liar]
    alone = cohort(Probe(honest), others).mean("tell", Payload(), WEIGHTED)
    assert torch.equal(clients.mean("tell", Payload(), WEIGHTED).tensors["x"], alone.tensors["x"])
    assert list(clients.failures) == [liar]


def test_who_was_not_asked_and_who_answers_twice_is_not_heard() -> None:
    class Echoing(InProcess):
        """Client 1 answers twice, and client 9 was never asked."""

        def exchange(self, asks: Mapping[int, bytes]) -> Iterator[tuple[int, bytes]]:
            replies = dict(super().exchange(asks))
            yield from [(1, replies[1]), (1, replies[1]), *sorted(replies.items())[1:], (9, replies[1])]

    ledger = Ledger()
    mean = cohort(three(), [1, 2, 3], engine=Echoing, ledger=ledger).mean("tell", Payload(), WEIGHTED)
    assert mean.encode() == cohort(three(), [1, 2, 3]).mean("tell", Payload(), WEIGHTED).encode()
    assert [row.client for row in ledger.rows() if row.direction == "up"] == [1, 2, 3]


def test_one_client_among_many_cannot_say_what_is_right_by_answering_first() -> None:
    liar = Payload({"x": torch.ones(2).double(), "y": torch.ones(2)}, {"weight": 1})
    clients = cohort(Probe({**three().replies, 0: liar}), [0, 1, 2, 3], skip=True)
    mean = clients.mean("tell", Payload(), WEIGHTED)
    assert list(clients.failures) == [0]
    assert mean.tensors["x"].dtype == torch.float32
    assert sorted(mean.tensors) == ["x"]


def test_a_reply_that_may_vary_in_length_is_held_to_its_limits() -> None:
    like = Expected({"x": TensorLike(torch.float32, (range(1, 3),))}, {"weight": int})
    method = Probe({n: Payload({"x": torch.ones(n)}, {"weight": 1}) for n in (0, 1, 2, 3)})
    clients = cohort(method, [0, 1, 2, 3], skip=True)
    assert sorted(clients.call("tell", Payload(), like)) == [1, 2]
    assert clients.failures[3] == "it sent x of shape (3,); expected (1 to 2,)"


def test_the_reply_to_an_earlier_round_or_exchange_is_refused() -> None:
    kept: dict[int, bytes] = {}

    class Repeating(InProcess):
        """Client 2 sends what it sent the first time."""

        def exchange(self, asks: Mapping[int, bytes]) -> Iterator[tuple[int, bytes]]:
            for number, reply in super().exchange(asks):
                yield number, kept.setdefault(number, reply) if number == 2 else reply

    for number in (1, 2):
        clients = cohort(three(), [1, 2, 3], engine=Repeating, skip=True, round=number)
        clients.mean("tell", Payload(), WEIGHTED)
        assert ("answers another message" in clients.failures.get(2, "")) == (number == 2)
    kept.clear()
    clients = cohort(three(), [1, 2, 3], engine=Repeating, skip=True)
    clients.mean("tell", Payload(), WEIGHTED)
    assert not clients.failures
    clients.mean("tell", Payload(), WEIGHTED)
    assert "answers another message" in clients.failures[2]


def test_the_reply_of_another_client_or_to_another_run_is_refused() -> None:
    class Swapping(InProcess):
        def exchange(self, asks: Mapping[int, bytes]) -> Iterator[tuple[int, bytes]]:
            replies = dict(super().exchange(asks))
            yield from {**replies, 1: replies[3], 3: replies[1]}.items()

    clients = cohort(three(), [1, 2, 3], engine=Swapping, skip=True)
    assert list(clients.call("tell", Payload(), WEIGHTED)) == [2]
    one, other = Address("tell", "mean", 2, 0, "a" * 16), Address("tell", "mean", 2, 0, "b" * 16)
    assert one.answered(1) != other.answered(1)


@pytest.mark.parametrize("kind", [PrivacyError, WrongWeights, KeyError, RuntimeError, MemoryError])
def test_no_kind_of_failure_ends_a_round_that_skips_failures_or_passes_where_it_stops(kind: type[Exception]) -> None:
    method = Probe(three().replies, {2: kind("it says")})
    clients = cohort(method, [1, 2, 3], skip=True)
    reply = clients.mean("tell", Payload(), WEIGHTED)
    assert reply.tensors["x"][0].item() == pytest.approx((1 * 1 + 3 * 3) / 4)
    assert list(clients.failures) == [2]
    assert "it says" in clients.failures[2]
    with pytest.raises(ClientError, match=r"client 2: .*it says"):
        cohort(method, [1, 2, 3]).mean("tell", Payload(), WEIGHTED)


def test_words_of_a_client_stand_on_one_line_and_command_no_terminal() -> None:
    method = Probe(three().replies, {2: ClientError("first\nsecond \x1b[31mred\x07" + "x" * 5000)})
    clients = cohort(method, [1, 2, 3], skip=True)
    clients.mean("tell", Payload(), WEIGHTED)
    assert clients.failures[2].startswith("first second ?[31mred?xxx")
    assert len(clients.failures[2]) <= 1000


# Weights and norms.


def test_a_weight_is_checked_in_a_call_too() -> None:
    method = Probe({n: Payload(X.tensors, {"weight": 10**n}) for n in (0, 1, 2)})
    clients = cohort(method, [0, 1, 2], rows=dict.fromkeys((0, 1, 2), 41), skip=True)
    assert sorted(clients.call("tell", Payload(), WEIGHTED)) == [0, 1]
    assert clients.failures[2] == "it sent weight 100; its rows allow at most 41"


def test_weights_are_lowered_to_the_recipes_largest() -> None:
    reply = cohort(three(), [1, 2, 3], rules=Rules(max_weight=2.0)).mean("tell", Payload(), WEIGHTED)
    torch.testing.assert_close(reply.tensors["x"], torch.full((2,), (1 * 1 + 2 * 2 + 2 * 3) / 5))


def test_replies_that_all_weigh_nothing_are_no_mean() -> None:
    method = Probe({n: Payload(X.tensors, {"weight": 0}) for n in (1, 2)})
    with pytest.raises(TooFewReplies, match="all 2 replies to 'tell' have weight 0"):
        cohort(method, [1, 2]).mean("tell", Payload(), WEIGHTED)


START = torch.full((2,), 5.0)


def scattered(*moves: float) -> Probe:
    """Clients 0, 1, ... that move START by so much."""
    return Probe({n: Payload({"x": START + move}, {"weight": n + 1}) for n, move in enumerate(moves)})


@pytest.mark.parametrize("liar", [0, 2, 3])
def test_an_update_far_above_the_median_is_named_and_taken_clipped_or_left_out(liar: int) -> None:
    moves = [0.1, 0.2, 0.3, 0.2]
    moves[liar] = 200.0
    ids, ask = [0, 1, 2, 3], Payload({"x": START})
    others = [n for n in ids if n != liar]

    def mean(what: str) -> tuple[Cohort, torch.Tensor]:
        clients = cohort(scattered(*moves), ids, rules=Rules(outliers=what))  # type: ignore[arg-type]
        return clients, clients.mean("tell", ask, WEIGHTED).tensors["x"]

    named, taken = mean("warn")
    assert list(named.outliers) == [liar]
    assert "over 10 times the cohort's median" in named.outliers[liar]
    assert taken[0] > 20
    left, without = mean("leave_out")
    assert list(left.failures) == [liar]
    assert torch.equal(without, cohort(scattered(*moves), others).mean("tell", ask, WEIGHTED).tensors["x"])
    clipped, limited = mean("clip")
    assert not clipped.failures
    assert "it was clipped to" in clipped.outliers[liar]
    known = sorted(abs(move) * math.sqrt(2) for move in moves)
    largest = 10 * (known[1] + known[2]) / 2 / math.sqrt(2)
    weights = [n + 1 for n in ids]
    expected = sum(w * min(move, largest) for w, move in zip(weights, moves, strict=True)) / sum(weights)
    assert limited.tolist() == pytest.approx([5 + expected] * 2, rel=1e-5)


def test_a_mean_that_may_be_clipped_has_the_bits_of_one_that_is_not_where_nobody_is_far_out() -> None:
    ask, ids = Payload({"x": START}), [0, 1, 2]
    means = [
        cohort(scattered(0.1, 0.25, 0.3), ids, rules=Rules(outliers=what)).mean("tell", ask, WEIGHTED)  # type: ignore[arg-type]
        for what in ("warn", "clip", "leave_out")
    ]
    assert len({mean.encode() for mean in means}) == 1


def test_of_two_clients_none_is_far_out() -> None:
    clients = cohort(scattered(0.1, 1000.0), [0, 1], rules=Rules(outliers="leave_out"))
    clients.mean("tell", Payload({"x": START}), WEIGHTED)
    assert not clients.failures


def test_replies_to_a_call_are_compared_as_those_of_a_mean() -> None:
    clients = cohort(scattered(0.1, 0.2, 500.0), [0, 1, 2], rules=Rules(outliers="leave_out"))
    ask = Payload({"x": START})
    assert sorted(clients.without_outliers(clients.call("tell", ask, WEIGHTED), ask)) == [0, 1]
    assert list(clients.failures) == [2]


def test_under_central_privacy_a_client_that_did_not_clip_is_clipped_and_named() -> None:
    class Unclipped(InProcess):
        """Client 2 answers as if it had no policy."""

        def exchange(self, asks: Mapping[int, bytes]) -> Iterator[tuple[int, bytes]]:
            for number, reply in super().exchange(asks):
                loud = Payload({"x": torch.tensor([300.0, 400.0])}, Payload.decode(reply).scalars)
                yield number, loud.encode() if number == 2 else reply

    small = Probe({n: Payload({"x": torch.full((2,), n / 10)}, {"weight": n}) for n in (1, 2, 3)})
    clients = cohort(small, [1, 2, 3], CENTRAL, engine=Unclipped)
    mean = clients.mean("tell", Payload(), WEIGHTED).tensors["x"]
    torch.testing.assert_close(mean, torch.tensor([(0.1 + 0.6 + 0.3) / 3, (0.1 + 0.8 + 0.3) / 3]))
    assert "clipped at the server" in clients.outliers[2]


def test_a_second_mean_of_a_round_is_another_exchange() -> None:
    ledger = Ledger()
    clients = cohort(three(), [1, 2], ledger=ledger)
    clients.mean("tell", Payload(), WEIGHTED)
    clients.mean("tell", Payload(), WEIGHTED)
    assert ledger.num_exchanges == 2
    assert {row.exchange for row in ledger.rows()} == {0, 1}


# Failures.


def test_a_failure_stops_the_round_and_names_the_client() -> None:
    method = Probe(three().replies, {2: NonFiniteLoss("the loss is nan at step 4")})
    with pytest.raises(
        ClientError, match="round 2: client 2: the loss is nan at step 4; the state of round 1 is kept"
    ):
        cohort(method, [1, 2, 3]).mean("tell", Payload(), WEIGHTED)


def test_a_failure_is_skipped_when_the_recipe_says_so(caplog: pytest.LogCaptureFixture) -> None:
    method = Probe(three().replies, {2: NonFiniteLoss("the loss is nan")})
    clients = cohort(method, [1, 2, 3], skip=True)
    with caplog.at_level(logging.WARNING, "kilofed"):
        reply = clients.mean("tell", Payload(), WEIGHTED)
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
    assert sorted(clients.call("tell", Payload(), WEIGHTED)) == [1, 3]
    assert "not a whole kilofed payload" in clients.failures[2]


def test_silence_is_a_failure_like_any_other() -> None:
    clients = cohort(three(), [1, 2, 3], engine=Deaf, skip=True)
    assert sorted(clients.call("tell", Payload(), WEIGHTED)) == [2, 3]
    assert clients.failures == {1: "no answer to 'tell'"}
    with pytest.raises(ClientError, match="round 2: client 1: no answer to 'tell'"):
        cohort(three(), [1, 2, 3], engine=Deaf).call("tell", Payload(), WEIGHTED)


@pytest.mark.parametrize("verb", ["mean", "call"])
def test_fewer_replies_than_the_quorum_raise(verb: str) -> None:
    clients = cohort(three(), [1, 2, 3], engine=Deaf, quorum=3, skip=True)
    with pytest.raises(TooFewReplies, match="2 of 3 clients are left after 'tell', quorum is 3; client 1: no answer"):
        getattr(clients, verb)("tell", Payload(), WEIGHTED)


@pytest.mark.parametrize("quorum", [2, 3])
def test_a_quorum_that_is_met_goes_on(quorum: int) -> None:
    engine = Deaf if quorum == 2 else InProcess
    clients = cohort(three(), [1, 2, 3], engine=engine, quorum=quorum, skip=True)
    assert clients.mean("tell", Payload(), WEIGHTED).tensors["x"].numel() == 2


def test_where_only_some_are_asked_the_quorum_is_over_those_who_have_not_failed() -> None:
    clients = cohort(three(), [1, 2, 3], quorum=3, skip=True)
    assert list(clients.call("tell", {2: Payload()}, WEIGHTED)) == [2]
    clients = cohort(three(), [1, 2, 3], engine=Deaf, quorum=3, skip=True)
    assert list(clients.call("tell", {2: Payload()}, WEIGHTED)) == [2]
    with pytest.raises(TooFewReplies, match="2 of 3 clients are left"):
        clients.call("tell", {1: Payload()}, WEIGHTED)


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
        asked = Payload(server.state, {"temperature": temperature, "flag": True})
        clients.mean("tell", asked, Payload(X.tensors, {"weight": 1, "loss": 0.0}))
    clients.call("profile", Payload(), PROFILE)
    assert [(one.action, one.exchanges) for one in told[1]] == [("tell", 2), ("profile", 1)]
    for number in (1, 12, 123):
        assert ledger.per_client("down")[number] == sum(one.down for one in told[number])
        assert ledger.per_client("up")[number] == sum(one.up for one in told[number])


# What privacy promises does not hang on who answers or on what they claim.


def test_under_central_privacy_a_sum_is_divided_by_all_who_were_asked() -> None:
    # Divided by those who came, the clip would no longer bound what one client adds to the mean.
    small = Probe({n: Payload({"x": torch.full((2,), n / 10)}, {"weight": n}) for n in (1, 2, 3)})
    clients = cohort(small, [1, 2, 3], CENTRAL, engine=Deaf, skip=True)
    mean = clients.mean("tell", Payload(), WEIGHTED).tensors["x"]
    torch.testing.assert_close(mean, torch.full((2,), (0.2 + 0.3) / 3))


def test_a_policy_of_equal_weights_counts_no_weight_that_a_client_claims() -> None:
    class Equal(Mechanism):
        uniform = True

    mean = cohort(three(), [1, 2, 3], Equal()).mean("tell", Payload(), WEIGHTED).tensors["x"]
    torch.testing.assert_close(mean, torch.full((2,), 2.0))


def test_under_central_privacy_a_change_is_divided_by_all_who_were_asked_and_not_what_was_sent() -> None:
    clients = cohort(scattered(0.0, 0.2, 0.3), [0, 1, 2], CENTRAL, engine=Deaf, skip=True)
    mean = clients.mean("tell", Payload({"x": START}), WEIGHTED).tensors["x"]
    torch.testing.assert_close(mean, START + 0.3 / 3)


def test_replies_that_are_left_out_do_not_count_for_the_quorum() -> None:
    three_of_four = Rules(quorum=4, outliers="leave_out")
    clients = cohort(scattered(0.1, 0.2, 0.3, 200.0), [0, 1, 2, 3], rules=three_of_four)
    with pytest.raises(TooFewReplies, match="3 of 4 clients are left after 'tell', quorum is 4; client 3: left out"):
        clients.mean("tell", Payload({"x": START}), WEIGHTED)


@pytest.mark.parametrize("claimed", [math.inf, math.nan, -1, True, "5"])
def test_what_is_no_finite_number_from_0_is_no_weight(claimed: object) -> None:
    with pytest.raises(PayloadError, match="expected a number from 0"):
        cohort(three(), [1, 2, 3]).weight(1, claimed)


def test_seconds_are_counted_where_a_reply_arrives() -> None:
    ledger = Ledger()
    cohort(three(), [1, 2], ledger=ledger).call("tell", Payload(), WEIGHTED)
    rows = list(ledger.rows())
    assert [row.seconds for row in rows if row.direction == "down"] == [0.0, 0.0]
    assert all(0 < row.seconds < 60 for row in rows if row.direction == "up")


def test_a_recipe_sets_the_rules() -> None:
    assert Rules() == Rules.of(Recipe(on_failure="stop")) == Rules(1, False, 0.0, "warn", 10.0)
    recipe = Recipe(quorum=3, on_failure="skip", max_weight=9.0, outliers="clip", outlier_ratio=4.0)
    assert Rules.of(recipe) == Rules(3, True, 9.0, "clip", 4.0)
    assert not Rules.of(Recipe(on_failure="stop")).skip_failures


@pytest.mark.parametrize(
    ("what", "factors"),
    [
        ("warn", {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}),
        ("clip", {0: 1.0, 1: 1.0, 2: 1.0, 3: 25 / 500}),
        ("leave_out", {0: 1.0, 1: 1.0, 2: 1.0}),
    ],
)
def test_norms_far_above_the_median_are_limited_as_the_rules_say(
    what: Literal["warn", "clip", "leave_out"], factors: dict[int, float]
) -> None:
    clients = cohort(three(), [0, 1, 2, 3], rules=Rules(outliers=what))
    assert clients.limited({0: 1.0, 1: 2.0, 2: 3.0, 3: 500.0}) == pytest.approx(factors)  # The median is 2.5.
    assert list(clients.failures if what == "leave_out" else clients.outliers) == [3]


def test_a_weight_of_all_its_rows_is_taken_and_a_larger_one_refused() -> None:
    clients = cohort(three(), [1, 2, 3], rows={1: 3, 2: 10, 3: 41})
    assert [clients.weight(client, rows) for client, rows in ((1, 3), (2, 10), (3, 41))] == [3.0, 10.0, 41.0]
    with pytest.raises(PayloadError, match=r"it sent weight 10\.5; its rows allow at most 10"):
        clients.weight(2, 10.5)


def test_a_method_may_ask_for_clipping_where_the_rules_only_warn() -> None:
    def mean(what: Literal["warn", "clip", "leave_out"], clip: bool) -> list[float]:
        clients = cohort(scattered(0.1, 0.2, 0.3, 200.0), [0, 1, 2, 3], rules=Rules(outliers=what))
        ask = Payload({"x": START})
        return clients.mean("tell", ask, WEIGHTED, clip_outliers=clip).tensors["x"].tolist()

    assert mean("warn", True) == mean("clip", False) == mean("clip", True) != mean("warn", False)
    assert mean("leave_out", True) == mean("leave_out", False) != mean("clip", True)
