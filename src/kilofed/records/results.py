"""results.json: what a run achieved, sent, spent and took; what `kilofed run --json` prints."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kilofed.records import codec

FILE = "results.json"
TITLES = {"base": "base", "local": "local-only", "federated": "federated", "centralized": "centralized"}
"""How the usual rows are shown, in the order in which they stand in a table."""


@dataclass(frozen=True)
class ClientScore:
    """One client's held-out rows; None is what was not measured."""

    id: int
    """Number of the client, from 0."""
    loss: float
    """Mean over response tokens, or over rows where rows are classified; nats."""
    accuracy: float
    """Share of response tokens, or of rows, that were the first guess; 0 to 1."""
    num_tokens: int
    """Response tokens; rows where rows are classified."""
    rouge_l: float | None
    """Mean ROUGE-L F of greedy answers, best over references; 0 to 1."""
    exact_match: float | None
    """Share of greedy answers that equal a reference but for case and outer white space; 0 to 1."""
    macro_f1: float | None
    """Mean F1 over classes, 0 to 1; None where tokens are written."""
    perplexity: float | None
    """exp(loss); None where rows are classified."""


@dataclass(frozen=True)
class ScoreRow:
    """One model's scores on held-out rows: means over clients, or over seeds where there are several."""

    loss: float | None
    """Nats."""
    accuracy: float | None
    """0 to 1."""
    perplexity: float | None
    """exp of the mean loss; of several seeds, the mean of theirs."""
    rouge_l: float | None
    """0 to 1."""
    exact_match: float | None
    """0 to 1."""
    macro_f1: float | None
    """0 to 1."""
    interval: tuple[float, float] | None
    """95 % interval of the loss over clients, or over seeds; nats; None of fewer than two."""
    clients: tuple[ClientScore, ...]
    """Those that have held-out rows and were scored; empty over several seeds, see `per_seed`."""


@dataclass(frozen=True)
class ScoreRows:
    """baselines.json: the rows that a run has so far, so that a resumed one does not score them again."""

    __pydantic_config__ = codec.STRICT

    rows: Mapping[str, ScoreRow]
    run: str = ""
    """Identity of the run that they are of."""
    sha256: str = ""
    """Digest of all the rest; "" in memory."""


@dataclass(frozen=True)
class Bytes:
    """Bytes of one client in the whole run, mean over clients."""

    up: float
    """From the client to the server."""
    down: float
    """From the server to the client."""


@dataclass(frozen=True)
class TotalBytes:
    """Bytes of all clients together in the whole run."""

    up: int
    """From clients to the server."""
    down: int
    """From the server to clients."""


@dataclass(frozen=True)
class PrivacySpent:
    """What the privacy mechanism was and what it spent."""

    kind: str
    """privacy.kind of the recipe."""
    epsilon: float | None
    """At `delta`; None without a mechanism whose spending is accounted, or where it is not finite."""
    delta: float | None
    """None without a mechanism whose spending is accounted."""
    num_means: int | None
    """Noisy means that were released; None without a mechanism whose spending is accounted."""


@dataclass(frozen=True)
class PartyCost:
    """What one party took in the first round; of clients the mean."""

    flops: float
    """Floating-point operations of matrix products, convolutions and attention."""
    seconds: float
    """At work, counting included."""
    num_messages: float
    """Messages that were answered."""
    peak_memory_bytes: int
    """Largest resident set of the party's process; of clients the largest."""


@dataclass(frozen=True)
class Costs:
    """What was measured where evaluate.costs is set."""

    client: PartyCost
    server: PartyCost


@dataclass(frozen=True)
class SeedRows:
    """The rows of one repeat."""

    seed: int
    rows: Mapping[str, ScoreRow]


@dataclass(frozen=True)
class Chart:
    """A drawing that the method adds to the report: at most eight lines."""

    title: str
    words: str
    """What it shows, in a sentence or two; stands under the title."""
    x: str
    """What the horizontal axis counts, with its unit."""
    y: str
    lines: Mapping[str, tuple[tuple[float, float], ...]]
    """Points (x, y) by the line's label, in order of x."""


@dataclass(frozen=True)
class Results:
    """What a run achieved, sent, spent and took."""

    __pydantic_config__ = codec.STRICT

    name: str
    """Of the recipe."""
    method: str
    rounds: int
    """Rounds that the recipe asked for."""
    seeds: tuple[int, ...]
    """One per repeat."""
    rows: Mapping[str, ScoreRow]
    """By name: base, local, federated, centralized, as far as the recipe asked for them, then the method's own."""
    bytes: Bytes
    """Per client; of several seeds the mean."""
    bytes_total: TotalBytes
    """All clients, rounds and seeds."""
    framing_bytes: int
    """What the engine sent around the messages, as far as it can tell."""
    exchanges: int
    """How often the server waited for clients, in all rounds and seeds."""
    seconds: float
    """All rounds and seeds together, wall time, without evaluation."""
    peak_memory_bytes: int
    """Largest resident set of the run's processes."""
    costs: Costs | None
    """None where the recipe did not have them measured."""
    privacy: PrivacySpent
    closed: float | None
    """Share of the way from base to centralized that the federated loss goes; None without both, or without a gap."""
    verdict: tuple[str, ...]
    """Sentences on whether the federated model beats the other rows."""
    run: str
    """The run folder."""
    state_sha256: str
    """Of the server's last state; of several seeds, of their digests."""
    per_seed: tuple[SeedRows, ...]
    """The rows of each repeat; empty for one seed."""
    charts: tuple[Chart, ...]
    """What the method shows of itself."""
    files: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of the run's other files when it finished, by path; of several seeds, each has its own."""
    sha256: str = ""
    """Digest of all the rest; "" in memory."""

    def to_json(self) -> dict[str, object]:
        """As results.json holds it."""
        return codec.to_json(self)

    @classmethod
    def from_json(cls, text: codec.Text, where: str = FILE) -> "Results":
        """The results in a JSON text. Raises RunError: not JSON, or a key that is unknown, missing or of another type."""
        return codec.from_text(cls, text, where)


def read(folder: Path) -> Results | None:
    """The results of the run in `folder`, None while it has not finished. Raises RunError: as `Results.from_json`."""
    path = folder / FILE
    return codec.from_file(Results, path) if path.exists() else None


def in_order(rows: Mapping[str, ScoreRow]) -> dict[str, ScoreRow]:
    """The usual rows by their titles, then those of the method's own by their names."""
    names = [*(name for name in TITLES if name in rows), *(name for name in rows if name not in TITLES)]
    return {TITLES.get(name, name): rows[name] for name in names}
