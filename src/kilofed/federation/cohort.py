"""The clients of one round as a method's server side sees them: two verbs, every byte counted, failures taken down."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from kilofed.errors import ClientError, PayloadError, PrivacyError, TooFewReplies, WrongWeights
from kilofed.federation.ledger import Ledger, Row
from kilofed.federation.sums import WeightedSum
from kilofed.payload import Payload, Scalar
from kilofed.privacy.mechanisms import Mechanism

log = logging.getLogger("kilofed")

ACTION, VERB, ROUND, EXCHANGE = "@action", "@verb", "@round", "@turn"
ERROR, KIND = "@error", "@kind"
WEIGHT = "weight"


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


def address(action: str, verb: str, round: int, exchange: int) -> dict[str, Scalar]:
    """The scalars that tell a client what it is asked."""
    return {ACTION: action, VERB: verb, ROUND: round, EXCHANGE: exchange}


class Cohort:
    """The clients of one round, as a method's server side sees them.

    Args:
        ids: clients drawn for this round, ascending.
        round: number of the round, from 1.
        quorum: fewest replies with which an exchange counts.
        skip_failures: go on without a client that failed; otherwise its failure stops the run.
    """

    def __init__(
        self,
        ids: list[int],
        engine: Engine,
        ledger: Ledger,
        policy: Mechanism,
        *,
        round: int,
        quorum: int = 1,
        skip_failures: bool = False,
    ) -> None:
        self.ids = sorted(ids)
        self.failures: dict[int, str] = {}
        """What went wrong in this round, by client."""
        self._engine, self._ledger, self._policy = engine, ledger, policy
        self._round, self._quorum, self._skip = round, quorum, skip_failures
        self._num_exchanges = 0

    def mean(self, action: str, ask: Payload | Mapping[int, Payload]) -> Payload:
        """The weighted mean of the replies to `action`; single replies are never shown.

        A reply's scalar `weight` is its weight (1 where absent); other scalars must be numbers. Sums run in float64
        in ascending id order, so that the result does not depend on who answered first.

        Args:
            ask: one payload for all, or one per id (then only those ids are asked).

        Raises:
            TooFewReplies: fewer clients answered than the quorum.
            ClientError: a client failed, and failures are not skipped.
            PrivacyError: a client's policy refuses it, or each client is asked another thing under a policy of means.
        """
        if self._policy.needs_aggregate and not isinstance(ask, Payload):
            raise PrivacyError(
                f"privacy.{self._policy.kind} needs one ask for all clients, {action!r} sends one to each"
            )
        when = self._round, self._num_exchanges
        total = WeightedSum()

        def take(client: int, reply: Payload) -> None:
            weight = 1.0 if self._policy.uniform else float(reply.scalars.get(WEIGHT, 1.0))
            scalars = {name: value for name, value in reply.scalars.items() if name != WEIGHT}
            total.add(Payload(reply.tensors, scalars), weight)

        self._exchange(action, "mean", ask, take)
        shared = ask if isinstance(ask, Payload) else Payload()
        # Noise meets the mean before it is rounded: on a coarse grid one client could move it by more than its clip.
        mean = total.exact_mean()
        given = self._policy.server(mean, shared, num_replies=total.num, expected=len(self.ids), when=when)
        return total.rounded(given)

    def call(self, action: str, ask: Payload | Mapping[int, Payload]) -> dict[int, Payload]:
        """Every client's reply to `action`, by id.

        Raises:
            PrivacyError: the policy allows means only.
            TooFewReplies: fewer clients answered than the quorum.
            ClientError: a client failed, and failures are not skipped.
        """
        replies: dict[int, Payload] = {}
        self._exchange(action, "call", ask, replies.__setitem__)
        return replies

    def leave_out(self, client: int, why: str) -> None:
        """Take down that a client failed, as its reply shows. Raises ClientError unless failures are skipped."""
        self._fail(client, Payload(scalars={ERROR: why}))

    def _exchange(
        self, action: str, verb: str, ask: Payload | Mapping[int, Payload], take: Callable[[int, Payload], None]
    ) -> None:
        """Ask, count bytes, hand each reply to `take`; a reply that it refuses (PayloadError) is that client's failure."""
        exchange, self._num_exchanges = self._num_exchanges, self._num_exchanges + 1
        header = address(action, verb, self._round, exchange)
        if isinstance(ask, Payload):
            asks = dict.fromkeys(self.ids, Payload(ask.tensors, {**ask.scalars, **header}).encode())
        else:
            asks = {i: Payload(one.tensors, {**one.scalars, **header}).encode() for i, one in sorted(ask.items())}
        for client, body in asks.items():
            self._ledger.add(Row(self._round, exchange, action, verb, "down", client, len(body), 0.0))
        answered = set()
        since = time.perf_counter()
        for client, body in self._engine.exchange(asks):
            now = time.perf_counter()
            self._ledger.add(Row(self._round, exchange, action, verb, "up", client, len(body), round(now - since, 6)))
            since = now
            try:
                reply = Payload.decode(body)
                if ERROR not in reply.scalars:
                    take(client, reply)
                    answered.add(client)
            except PayloadError as error:
                reply = Payload(scalars={ERROR: str(error)})
            if ERROR in reply.scalars:
                self._fail(client, reply)
        for client in sorted(set(asks) - answered - set(self.failures)):
            self.failures[client] = "no answer"
            log.warning(
                "round %d: client %d did not answer %s; the round goes on without it", self._round, client, action
            )
        # Where only some are asked, the quorum is over those who have not failed in this round.
        enough = len(answered) if len(asks) == len(self.ids) else len(set(self.ids) - set(self.failures))
        if enough < min(self._quorum, len(self.ids)):
            raise TooFewReplies(
                f"round {self._round}: {len(answered)} of {len(asks)} clients answered {action!r}, quorum is {self._quorum}"
            )

    def _fail(self, client: int, reply: Payload) -> None:
        text = str(reply.scalars[ERROR])
        if reply.scalars.get(KIND) == PrivacyError.__name__:
            raise PrivacyError(text)
        if not self._skip or reply.scalars.get(KIND) == WrongWeights.__name__:
            raise ClientError(
                f"round {self._round}: client {client}: {text}; the state of round {self._round - 1} is kept"
            )
        self.failures[client] = text
        log.warning("round %d: client %d is left out: %s", self._round, client, text)
