"""Which message a client has in hand, and the tag by which its reply says which message it answers."""

import hashlib
import re
from collections.abc import Mapping
from typing import NamedTuple, Self

from kilofed.errors import PayloadError
from kilofed.payload import Scalar

ADDRESS = "@"
"""Name of the scalar that tells a client what it is asked, and of the one by which a reply says what it answers."""

VERBS = ("mean", "call")
NO_RUN = "0" * 16
"""Identity of a run that has none, such as a test's."""

_TEXT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)/([a-z]+)/([0-9]{6,12})/([0-9]{6,12})/([0-9a-f]{16})", re.ASCII)


class Address(NamedTuple):
    """One exchange of one run."""

    action: str
    verb: str
    """One of VERBS."""
    round: int
    """From 1; 0 where a message is only looked at."""
    exchange: int
    """Number of the exchange in its round, from 0."""
    run: str = NO_RUN
    """The run's identity, 16 hex digits."""

    @classmethod
    def of(cls, scalars: Mapping[str, Scalar]) -> Self:
        """The address in a message's scalars.

        Raises:
            PayloadError: there is none, or it is not as `scalars` writes it.
        """
        text = scalars.get(ADDRESS)
        found = _TEXT.fullmatch(text) if isinstance(text, str) else None
        if not found:
            raise PayloadError(
                f"the message has the address {text!r:.80}: it was not written by a kilofed server of this version"
            )
        action, verb, round, exchange, run = found.groups()
        if verb not in VERBS:
            raise PayloadError(f"the message asks with the verb {verb!r:.80}; expected {' or '.join(VERBS)}")
        return cls(action, verb, int(round), int(exchange), run)

    @property
    def scalars(self) -> dict[str, Scalar]:
        """What is added to an ask; of equal length for all rounds and exchanges below a million."""
        return {ADDRESS: f"{self.action}/{self.verb}/{self.round:06d}/{self.exchange:06d}/{self.run}"}

    def answered(self, client: int) -> dict[str, Scalar]:
        """What client number `client` adds to its reply, so that a reply to another message is told apart."""
        text = f"{self.scalars[ADDRESS]}/{client}"
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return {ADDRESS: int.from_bytes(digest, "big", signed=True)}
