"""The clients of one round as a method's server side sees them: two verbs, every byte counted, every reply checked.

A reply is believed only where it answers the very message that was sent (`address`), is what the method said it would
be (`expected`), and claims no more weight than its rows allow.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, Self

from kilofed.config.recipe import Recipe
from kilofed.errors import ClientError, PayloadError, PrivacyError, TooFewReplies
from kilofed.federation import outliers
from kilofed.federation.address import ADDRESS, NO_RUN, Address
from kilofed.federation.expected import Expected
from kilofed.federation.ledger import Ledger, Row
from kilofed.federation.sums import WeightedSum
from kilofed.payload import Payload
from kilofed.privacy.mechanisms import Mechanism

log = logging.getLogger("kilofed")

ERROR = "@error"
WEIGHT = "weight"

MAX_ERROR_TEXT = 1000
"""Letters of a client's error that are taken down."""
MAX_ERROR_BYTES = 8 * MAX_ERROR_TEXT
"""Longest reply that is looked at for an error where a shorter one was expected."""

Check = Callable[[int, Payload], None]
"""(client, reply): raises PayloadError where a method can tell that the reply is wrong."""


class Engine(Protocol):
    """Moves bytes between the server and numbered clients, and knows nothing else."""

    def client_ids(self) -> list[int]:
        """Numbers of the clients that can be asked, ascending."""
        ...

    def exchange(self, asks: Mapping[int, bytes]) -> Iterator[tuple[int, bytes]]:
        """Hand each client its bytes and yield (id, reply) in ascending id order; who did not answer is left out."""
        ...

    def overhead(self) -> int:
        """Bytes that it sent so far beside the messages, such as their framing; 0 where it cannot tell."""
        ...

    def close(self) -> None:
        """Let go of processes and connections."""
        ...


@dataclass(frozen=True)
class Rules:
    """What a run does about clients that fail, and about replies unlike the others; fields as in `Recipe`."""

    quorum: int = 1
    """Fewest replies with which an exchange counts."""
    skip_failures: bool = False
    """Go on without a client that failed, in whatever way; otherwise its failure stops the run."""
    max_weight: float = 0.0
    """Weights above it are lowered to it; 0 lowers none."""
    outliers: Literal["warn", "clip", "leave_out"] = "warn"
    outlier_ratio: float = 10.0

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        """The rules that a recipe sets."""
        skip = recipe.on_failure == "skip"
        return cls(recipe.quorum, skip, recipe.max_weight, recipe.outliers, recipe.outlier_ratio)


class Cohort:
    """The clients of one round, as a method's server side sees them.

    Args:
        ids: clients drawn for this round, ascending.
        round: number of the round, from 1.
        run: the run's identity; replies to another run's messages are refused.
        max_weight_of: largest weight that a client may claim.
        reads_data: whether the replies to an action come from clients' rows, so that the policy holds for them.
    """

    def __init__(
        self,
        ids: list[int],
        engine: Engine,
        ledger: Ledger,
        policy: Mechanism,
        *,
        round: int,
        rules: Rules = Rules(),
        run: str = NO_RUN,
        max_weight_of: Callable[[int], float] = lambda client: math.inf,
        reads_data: Callable[[str], bool] = lambda action: True,
    ) -> None:
        self.ids = sorted(ids)
        self.failures: dict[int, str] = {}
        """What went wrong in this round, by client."""
        self.outliers: dict[int, str] = {}
        """What is unlike the other clients in a reply that was taken all the same, by client."""
        self._engine, self._ledger, self._policy = engine, ledger, policy
        self._round, self._rules, self._run = round, rules, run
        self._max_weight_of, self._reads_data = max_weight_of, reads_data
        self._num_exchanges = 0

    def mean(
        self,
        action: str,
        ask: Payload | Mapping[int, Payload],
        like: Payload | Expected,
        *,
        check: Check = lambda client, reply: None,
        clip_outliers: bool = False,
    ) -> Payload:
        """The weighted mean of the replies to `action`; single replies are never shown.

        A reply's scalar `weight` is its weight (1 where `like` has none); other scalars must be numbers. Sums run in
        float64 in ascending id order, so that the result does not depend on who answered first. An update whose norm is
        far above the cohort's median is named, and taken, clipped or left out as the rules say.

        Args:
            ask: one payload for all, or one per id (then only those ids are asked).
            like: what each reply is like: names, dtypes and shapes, whatever the numbers.
            check: refuses what only the method can tell is wrong; that is the client's failure.
            clip_outliers: clip where the rules say to warn only.

        Raises:
            TooFewReplies: fewer clients answered than the quorum, or all replies weigh nothing.
            ClientError: a client failed, and failures are not skipped.
            PrivacyError: each client is asked another thing under a policy of means.
        """
        policy = self._policy
        if policy.needs_aggregate and not isinstance(ask, Payload):
            raise PrivacyError(f"privacy.{policy.kind} needs one ask for all clients, {action!r} sends one to each")
        when = self._round, self._num_exchanges
        total = self._sum(action, ask, like, check, clip_outliers=clip_outliers)
        self._enough(action, total.num)
        if not total.weight:
            raise TooFewReplies(f"round {self._round}: all {total.num} replies to {action!r} have weight 0")
        shared = ask if isinstance(ask, Payload) else Payload()
        # Noise meets the mean before it is rounded: on a coarse grid one client could move it by more than its clip.
        mean = total.exact_mean()
        given = policy.server(mean, shared, num_replies=total.num, expected=len(self.ids), when=when)
        return total.rounded(given)

    def call(
        self,
        action: str,
        ask: Payload | Mapping[int, Payload],
        like: Payload | Expected,
        *,
        check: Check = lambda client, reply: None,
    ) -> dict[int, Payload]:
        """Every client's reply to `action`, by id.

        Args:
            ask: one payload for all, or one per id (then only those ids are asked).
            like: what each reply is like: names, dtypes and shapes, whatever the numbers.
            check: refuses what only the method can tell is wrong; that is the client's failure.

        Raises:
            PrivacyError: the policy allows means only.
            TooFewReplies: fewer clients answered than the quorum.
            ClientError: a client failed, and failures are not skipped.
        """
        if self._policy.needs_aggregate and self._reads_data(action):
            raise PrivacyError(
                f"{action!r} lets the server see single replies; privacy.{self._policy.kind} allows means only\n"
                "  hint: use a method that asks for means, such as fedavg"
            )
        replies: dict[int, Payload] = {}

        def take(client: int, reply: Payload) -> None:
            check(client, reply)
            if WEIGHT in reply.scalars:
                self.weight(client, reply.scalars[WEIGHT])
            replies[client] = reply

        self._exchange(action, "call", ask, like, take)
        return replies

    def weight(self, client: int, claimed: object) -> float:
        """What a client weighs that claims the weight `claimed`: at most the rules' largest.

        Raises:
            PayloadError: it is no number, below 0, or more than its rows allow.
        """
        most = self._max_weight_of(client)
        if isinstance(claimed, bool | str) or not isinstance(claimed, int | float) or not 0 <= claimed < math.inf:
            raise PayloadError(f"it sent weight {claimed!r:.80}; expected a number from 0")
        if claimed > most:
            raise PayloadError(f"it sent weight {claimed:g}; its rows allow at most {most:g}")
        return min(float(claimed), self._rules.max_weight or math.inf)

    def limited(self, norms: Mapping[int, float]) -> dict[int, float]:
        """By what to multiply each reply whose norm is given, 1 for most; clients that the rules leave out are missing."""
        what = self._rules.outliers
        limit, far = self._far_out(norms, what)
        if what == "leave_out":
            return {client: 1.0 for client in norms if client not in far}
        return {client: limit / norm if client in far and what == "clip" else 1.0 for client, norm in norms.items()}

    def without_outliers(
        self, replies: Mapping[int, Payload], ask: Payload | Mapping[int, Payload]
    ) -> dict[int, Payload]:
        """Replies to `call` that hold updates, with those far above the cohort's median treated as in `mean`."""
        asks = {client: ask if isinstance(ask, Payload) else ask[client] for client in replies}
        passed = self.limited({client: outliers.Start(asks[client]).norm(reply) for client, reply in replies.items()})
        return {
            client: replies[client] if factor == 1 else outliers.scaled(replies[client], asks[client], factor)
            for client, factor in passed.items()
        }

    def note(self, client: int, what: str) -> None:
        """Take down that something in a client's reply is unlike the others, which was taken all the same."""
        self.outliers[client] = what
        log.warning("round %d: client %d: %s", self._round, client, what)

    def leave_out(self, client: int, why: str) -> None:
        """Take down that a client failed, as its reply shows. Raises ClientError unless failures are skipped."""
        text = _plain(why)
        if not self._rules.skip_failures:
            raise ClientError(
                f"round {self._round}: client {client}: {text}; the state of round {self._round - 1} is kept"
            )
        self.failures[client] = text
        log.warning("round %d: client %d is left out: %s", self._round, client, text)

    def _exchange(
        self, action: str, verb: str, ask: Payload | Mapping[int, Payload], like: Payload | Expected, take: Check
    ) -> None:
        """Ask, count bytes, check each reply and hand it to `take`; one that is refused is that client's failure."""
        exchange, self._num_exchanges = self._num_exchanges, self._num_exchanges + 1
        address = Address(action, verb, self._round, exchange, self._run)
        expected = self._expected(action, like)
        if isinstance(ask, Payload):
            asks = dict.fromkeys(self.ids, Payload(ask.tensors, {**ask.scalars, **address.scalars}).encode())
        else:
            asks = {
                i: Payload(one.tensors, {**one.scalars, **address.scalars}).encode() for i, one in sorted(ask.items())
            }
        for client, body in asks.items():
            self._ledger.add(Row(self._round, exchange, action, verb, "down", client, len(body), 0.0))
        answered = set()
        since = time.perf_counter()
        for client, body in self._engine.exchange(asks):
            if client not in asks or client in answered:
                log.warning("round %d: client %d answers without being asked and is not heard", self._round, client)
                continue
            now = time.perf_counter()
            self._ledger.add(Row(self._round, exchange, action, verb, "up", client, len(body), round(now - since, 6)))
            since = now
            try:
                take(client, _read(body, client, address, expected))
                answered.add(client)
            except (PayloadError, ClientError) as error:
                self.leave_out(client, str(error))
        for client in sorted(set(asks) - answered - set(self.failures)):
            self.leave_out(client, f"no answer to {action!r}")
        # Where only some are asked, the quorum is over those who have not failed in this round.
        self._enough(action, len(answered) if len(asks) == len(self.ids) else len(set(self.ids) - set(self.failures)))

    def _sum(
        self,
        action: str,
        ask: Payload | Mapping[int, Payload],
        like: Payload | Expected,
        check: Check,
        *,
        clip_outliers: bool,
    ) -> WeightedSum:
        """The weighted sum of the replies, without what the rules say of outliers."""
        policy, what = self._policy, self._rules.outliers
        what = "clip" if clip_outliers and what == "warn" else what
        streams = policy.needs_aggregate or what == "warn"  # Else all are held until their median is known.
        total = WeightedSum()
        start = outliers.Start(ask) if isinstance(ask, Payload) else None
        norms: dict[int, float] = {}
        kept: dict[int, tuple[Payload, float]] = {}

        def take(client: int, reply: Payload) -> None:
            check(client, reply)
            asked = ask if isinstance(ask, Payload) else ask[client]
            weight = 1.0 if policy.uniform else self.weight(client, reply.scalars.get(WEIGHT, 1.0))
            reply = self._clipped(client, reply, asked)
            one = Payload(reply.tensors, {name: value for name, value in reply.scalars.items() if name != WEIGHT})
            if streams:
                total.add(one, weight)
            else:
                total.check(one)
                kept[client] = one, weight
            if not policy.needs_aggregate:  # Else every update was clipped to one norm.
                norms[client] = (start or outliers.Start(asked)).norm(one)

        self._exchange(action, "mean", ask, like, take)
        limit, far = self._far_out(norms, what)
        for client, (one, weight) in kept.items():
            asked = ask if isinstance(ask, Payload) else ask[client]
            if client not in far:
                total.add(one, weight)
            elif what == "clip":
                total.add(outliers.scaled(one, asked, limit / far[client]), weight)
        return total

    def _expected(self, action: str, like: Payload | Expected) -> Expected:
        """What a reply is like once the client's policy has been at it. Raises PrivacyError: the policy refuses it."""
        found = like if isinstance(like, Expected) else Expected.like(like)
        if self._reads_data(action):
            found = found.only(self._policy.outline(found.largest))
        return Expected(found.tensors, {**found.scalars, ADDRESS: int})

    def _clipped(self, client: int, reply: Payload, ask: Payload) -> Payload:
        """The reply as the policy lets it in; a client that should have clipped and did not is named."""
        found = self._policy.arrived(reply, ask)
        if found is not reply:
            self.note(client, "its update was larger than privacy.clip and was clipped at the server")
        return found

    def _far_out(self, norms: Mapping[int, float], what: str) -> tuple[float, dict[int, float]]:
        limit, far = outliers.far_out(norms, self._rules.outlier_ratio)
        for client, norm in far.items():
            text = (
                f"the norm of its update is {norm:.3g}, over {self._rules.outlier_ratio:g} times the cohort's median"
            )
            if what == "leave_out":
                self.failures[client] = f"left out: {text}"
                log.warning("round %d: client %d is left out: %s", self._round, client, text)
            else:
                self.note(client, text if what == "warn" else f"{text}; it was clipped to {limit:.3g}")
        return limit, far

    def _enough(self, action: str, num: int) -> None:
        if num >= min(self._rules.quorum, len(self.ids)):
            return
        first = min(self.failures.items(), default=None)
        raise TooFewReplies(
            f"round {self._round}: {num} of {len(self.ids)} clients are left after {action!r}, quorum is "
            f"{self._rules.quorum}" + (f"; client {first[0]}: {first[1]}" if first else "")
        )


def _read(body: bytes, client: int, address: Address, expected: Expected) -> Payload:
    """The reply in `body` without its address.

    Raises:
        PayloadError: it is too long, damaged, answers another message, or is not what was expected.
        ClientError: the client says that it failed.
    """
    if len(body) > max(expected.max_bytes, MAX_ERROR_BYTES):
        raise PayloadError(f"it sent {len(body)} bytes; expected at most {expected.max_bytes}")
    reply = Payload.decode(body)
    if reply.scalars.get(ADDRESS) != address.answered(client)[ADDRESS]:
        raise PayloadError("its reply answers another message than the one that it was sent")
    if ERROR in reply.scalars:
        raise ClientError(str(reply.scalars[ERROR]))
    expected.check(reply)
    return Payload(reply.tensors, {name: value for name, value in reply.scalars.items() if name != ADDRESS})


def _plain(text: str) -> str:
    """A client's words on one line, cut, without anything that a terminal or a log would obey."""
    words = " ".join(text.split())
    return "".join(letter if letter.isprintable() else "?" for letter in words[:MAX_ERROR_TEXT])
