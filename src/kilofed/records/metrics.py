"""metrics.jsonl: one line per round, with the method's own metrics among kilofed's."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kilofed.errors import RunError
from kilofed.records import codec

FILE = "metrics.jsonl"


@dataclass(frozen=True)
class ClientLoss:
    """One client's held-out rows after a round."""

    id: int
    loss: float
    """Nats per response token, or per row where rows are classified."""
    accuracy: float | None = None
    """0 to 1."""
    num_tokens: int | None = None
    """Response tokens, or rows."""


@dataclass(frozen=True)
class RoundMetrics:
    """One round; None is what was not measured, and keys that a method adds are left out."""

    __pydantic_config__ = codec.OPEN

    round: int
    """0 is the untouched base model."""
    loss: float | None = None
    """Held-out, nats, mean over clients."""
    accuracy: float | None = None
    """Held-out, 0 to 1, mean over clients."""
    train_loss: float | None = None
    """Of the rows that clients train on, while they train; nats."""
    seconds: float | None = None
    """Wall time, without evaluation."""
    framing_bytes: int = 0
    """What the engine sent around the messages, as far as it can tell."""
    clients: tuple[ClientLoss, ...] = ()
    failures: Mapping[int, str] = field(default_factory=dict)
    """What each client that failed said."""
    outliers: Mapping[int, str] = field(default_factory=dict)
    """Clients whose reply was unlike the others and was taken all the same."""

    @property
    def by_client(self) -> dict[int, float]:
        """Held-out loss of each client, nats."""
        return {client.id: client.loss for client in self.clients}


def read(path: Path) -> Iterator[RoundMetrics]:
    """The rounds in a file, none if it is absent. Raises RunError: a broken line, named by its number."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield codec.parse(RoundMetrics, line)
            except codec.Mismatch as error:
                raise RunError(
                    f"{path} line {number} is not a round's metrics ({error}); resume the run to mend it"
                ) from error
