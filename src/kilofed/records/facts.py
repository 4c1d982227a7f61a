"""run.json: what is known of a run before its first round, as types."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kilofed.records import codec

FILE = "run.json"
VARIES = -1
"""A size that differs from reply to reply."""


@dataclass(frozen=True)
class ClientFacts:
    """One client's share of the rows."""

    __pydantic_config__ = codec.STRICT

    id: int
    name: str
    train_rows: int
    test_rows: int
    labels: Mapping[str, int] = field(default_factory=dict)
    """Training rows by label; empty where there is one label, or too many to plot."""


@dataclass(frozen=True)
class ActionForecast:
    """Least and most that one client sends, receives and takes part in per round by one action."""

    __pydantic_config__ = codec.STRICT

    action: str
    down: tuple[int, int]
    """Bytes."""
    up: tuple[int, int]
    """Bytes."""
    exchanges: tuple[int, int]


@dataclass(frozen=True)
class TensorFacts:
    """A tensor without its values."""

    __pydantic_config__ = codec.STRICT

    dtype: str
    """As torch names it, such as `float32`."""
    shape: tuple[int, ...]
    """VARIES stands for a size that differs from reply to reply."""


@dataclass(frozen=True)
class ReplyFacts:
    """What leaves a client by one action."""

    __pydantic_config__ = codec.STRICT

    action: str
    tensors: Mapping[str, TensorFacts]
    scalars: tuple[str, ...]
    """Their names."""


@dataclass(frozen=True)
class Forecast:
    """What a run would cost. None is what nobody can tell before the run."""

    __pydantic_config__ = codec.STRICT

    label: str
    method: str
    leaves: str
    """What clients send."""
    exact: bool = True
    """Whether the ledger will count these very bytes; else they depend a little on what training finds, or are scaled up."""
    up: float | None = None
    """Bytes per client in the whole run."""
    down: float | None = None
    exchanges: int | None = None
    """Of the whole run."""
    client_flops: float | None = None
    """Operations per client in the first round."""
    server_flops: float | None = None
    """Operations in the first round."""
    client_memory: float | None = None
    """Bytes, the largest of the clients' processes."""
    compute_seconds: float | None = None
    """Of the whole run: the slowest client, as clients work side by side, and the server."""
    link_seconds: float | None = None
    """Of the whole run: bytes on their way, and waiting for answers."""
    refused: str = ""
    """Why it does not fit; empty if it does."""


@dataclass(frozen=True)
class RunFacts:
    """run.json; what comes after `created` is there once data and model are."""

    __pydantic_config__ = codec.STRICT

    recipe: Mapping[str, object] = field(default_factory=dict)
    """Every field, as `kilofed.config.tables.to_table` gives it."""
    created: str = ""
    """When the run began, ISO 8601, UTC."""
    kilofed: str = ""
    """Version."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Versions of libraries, and the device."""
    data_note: str = ""
    """What was read, in one line."""
    layout: str = ""
    """Which columns are learnt: response, messages, text or label."""
    clients: tuple[ClientFacts, ...] = ()
    classes: tuple[str, ...] = ()
    """Names of the classes, in the order of their numbers; empty where nothing is classified."""
    forecast: tuple[ActionForecast, ...] = ()
    """Empty where a method does not say what it sends."""
    leaves: tuple[ReplyFacts, ...] = ()
    plan: Forecast | None = None
    """Where the recipe has costs counted, and they can be foreseen."""
    num_trained: int = 0
    """Parameters that are trained."""
    num_parameters: int = 0
    sha256: str = ""
    """Digest of all the rest; "" in memory."""


def read(folder: Path) -> RunFacts:
    """The facts of a run folder. Raises RunError: there are none, or a key is unknown or of another type."""
    return codec.from_file(RunFacts, folder / FILE)
