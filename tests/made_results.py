"""Results made by hand, whole, so that a test changes what it is about."""

from dataclasses import replace

from kilofed.records.results import Bytes, ClientScore, PrivacySpent, Results, ScoreRow, TotalBytes


def row(loss: float | None, **changes: object) -> ScoreRow:
    """A row of scores whose interval is a quarter of a nat to both sides."""
    ends = None if loss is None else (loss - 0.25, loss + 0.25)
    whole = ScoreRow(loss, 0.3125, 2.5, None, None, None, ends, ())
    return replace(whole, **changes)  # type: ignore[arg-type]


def client(number: int, loss: float) -> ClientScore:
    """A client that was scored."""
    return ClientScore(number, loss, 0.5, 10 + number, None, None, None, 2.0)


MADE = Results(
    name="tiny",
    method="fedavg",
    rounds=3,
    seeds=(0,),
    rows={
        "base": row(4.5),
        "local": row(3.75, rouge_l=0.125, exact_match=0.0),
        "federated": row(3.5, rouge_l=0.25, exact_match=0.5, clients=(client(0, 3.0), client(3, 4.0))),
        "centralized": row(3.25, rouge_l=0.375, exact_match=0.25),
    },
    bytes=Bytes(1_234_567.0, 2_345_678.0),
    bytes_total=TotalBytes(15_045, 30_105),
    framing_bytes=0,
    exchanges=3,
    seconds=12.34,
    peak_memory_bytes=1_500_000_000,
    costs=None,
    privacy=PrivacySpent("none", None, None, None),
    closed=0.8,
    verdict=("federated is 0.250 nats below local-only training",),
    run="runs/tiny-1",
    state_sha256="abc123",
    per_seed=(),
    charts=(),
)


def made(**changes: object) -> Results:
    """The results of a finished run of five clients, but for `changes`."""
    return replace(MADE, **changes)  # type: ignore[arg-type]
