"""The results of a finished run, worked out from its folder and its rows."""

import hashlib
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from kilofed.config.recipe import Recipe
from kilofed.costs import environment, measurement
from kilofed.errors import RunError
from kilofed.federation.ledger import Ledger
from kilofed.files import sha256_of
from kilofed.models.evaluation import interval
from kilofed.privacy.mechanisms import Mechanism, load_mechanism
from kilofed.records import metrics
from kilofed.records import results as results_file
from kilofed.records.results import (
    Bytes,
    Chart,
    PrivacySpent,
    Results,
    ScoreRow,
    SeedRows,
    TotalBytes,
)
from kilofed.reports.reading import hold_to_files
from kilofed.runs import commit
from kilofed.runs.journal import LEDGER, METRICS
from kilofed.runs.resuming import checked

log = logging.getLogger("kilofed")

Rows = Mapping[str, ScoreRow]
Losses = Mapping[str, Mapping[int, float]]
"""Loss by row and by client, or by seed: not every client need have been trained alone."""


def of_run(recipe: Recipe, folder: Path, rows: Rows, policy: Mechanism, charts: Sequence[Chart] = ()) -> Results:
    """The results of the finished run in `folder`, given the rows of its table."""
    rounds = list(metrics.read(folder / metrics.FILE))
    with closing(Ledger(folder / "ledger.jsonl")) as ledger:
        up, down = ledger.per_client("up"), ledger.per_client("down")
        exchanges = ledger.num_exchanges
    if (last := commit.read(folder)) is None:
        raise RunError(f"{folder / commit.FILE} is missing: resume the run")
    losses = {name: {client.id: client.loss for client in row.clients} for name, row in rows.items()}
    return Results(
        name=recipe.name,
        method=recipe.method.name,
        rounds=recipe.rounds,
        seeds=(recipe.seed,),
        rows=dict(rows),
        bytes=Bytes(_mean(up), _mean(down)),
        bytes_total=TotalBytes(sum(up.values()), sum(down.values())),
        framing_bytes=sum(done.framing_bytes for done in rounds),
        exchanges=exchanges,
        seconds=round(sum(done.seconds or 0.0 for done in rounds), 3),
        peak_memory_bytes=environment.peak_memory(),
        costs=measurement.read(folder, last.run),
        privacy=_spent(recipe, policy, last.num_means),
        closed=_closed(rows),
        verdict=tuple(verdict(losses, _closed(rows))),
        run=str(folder),
        state_sha256=last.state_sha256,
        per_seed=(),
        charts=tuple(charts),
        files={path.relative_to(folder).as_posix(): sha256_of(path) for path in _kept(folder)},
    )


def finished(folder: Path, recipe: Recipe) -> Results | None:
    """The results of the run in `folder`, if it has finished and they go with its files; else it has to go on.

    What can be worked out anew, results and adapter, need not be whole: that is said, and None is given.

    Raises:
        RunError: a file is damaged from which they would be worked out; by its name.
    """
    path = folder / results_file.FILE
    if not path.exists():
        return None
    state = checked(folder, recipe).commit
    try:
        known = results_file.read(folder)
        assert known is not None
        if state is None or state.state_sha256 != known.state_sha256:
            raise RunError(f"{path} is of another state than {folder / commit.FILE}")
        hold_to_files(folder, known.files)
    except RunError as error:
        log.warning("%s\n  it is worked out anew", error)
        return None
    return known


def over_seeds(recipe: Recipe, folder: Path, every: Sequence[Results]) -> Results:
    """Means over repeats; the interval of each row's loss is over repeats too.

    Each repeat releases a model of the same rows, so what they spent of privacy is that of all means together.
    """
    seeds = tuple(recipe.seed + i for i in range(recipe.seeds))
    rows = {name: _mean_row([one.rows[name] for one in every]) for name in every[0].rows}
    losses = {
        name: {
            seed: loss
            for seed, one in zip(seeds, every, strict=True)
            if (loss := one.rows[name].loss) is not None
        }
        for name in rows
    }  # fmt: skip
    spent = [one.privacy for one in every]
    means = None if spent[0].num_means is None else sum(one.num_means or 0 for one in spent)
    return replace(
        every[0],
        seeds=seeds,
        files={},
        privacy=spent[0] if means is None else _spent(recipe, load_mechanism(recipe.privacy), means),
        rows=rows,
        per_seed=tuple(SeedRows(seed, one.rows) for seed, one in zip(seeds, every, strict=True)),
        bytes=Bytes(statistics.fmean(o.bytes.up for o in every), statistics.fmean(o.bytes.down for o in every)),
        bytes_total=TotalBytes(sum(o.bytes_total.up for o in every), sum(o.bytes_total.down for o in every)),
        framing_bytes=sum(one.framing_bytes for one in every),
        exchanges=sum(one.exchanges for one in every),
        seconds=round(sum(one.seconds for one in every), 3),
        peak_memory_bytes=max(one.peak_memory_bytes for one in every),
        closed=_closed(rows),
        verdict=tuple(verdict(losses, _closed(rows))),
        run=str(folder),
        state_sha256=hashlib.sha256("".join(one.state_sha256 for one in every).encode()).hexdigest(),
    )


def verdict(losses: Losses, closed: float | None = None) -> list[str]:
    """Plain sentences on whether the federated model beats the other rows, by paired differences of the loss.

    Args:
        closed: share of the gap from base to centralized that the federated model closes.
    """
    sentences = []
    names = {
        "base": "the untouched base model",
        "local": "local-only training",
        "centralized": "centralized training",
    }
    federated = losses.get("federated", {})
    for other, words in names.items():
        gains = [loss - federated[client] for client, loss in losses.get(other, {}).items() if client in federated]
        if not gains:
            continue
        gain, ends = statistics.fmean(gains), interval(gains)
        range_ = f" (95 % interval {ends[0]:+.3f} to {ends[1]:+.3f})" if ends else ""
        if gain <= 0 and other != "centralized":
            sentences.append(f"federated does NOT beat {words}: its held-out loss is {-gain:.3f} nats higher{range_}")
        elif ends and ends[0] <= 0 and other != "centralized":
            sentences.append(f"federated is {gain:.3f} nats below {words}, which is within the noise{range_}")
        else:
            way = "below" if gain > 0 else "above"
            sentences.append(f"federated is {abs(gain):.3f} nats {way} {words}{range_}")
    if closed is not None:
        sentences.append(f"it closes {100 * closed:.0f} % of the gap from base to centralized")
    return sentences


def _kept(folder: Path) -> list[Path]:
    """Files of a finished run whose digests its results hold."""
    alone = [folder / LEDGER, folder / METRICS, folder / "baselines.json"]
    return [path for path in alone if path.exists()] + sorted(
        p for p in (folder / "adapter").rglob("*") if p.is_file()
    )


def _mean_row(rows: Sequence[ScoreRow]) -> ScoreRow:
    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if known else None

    return ScoreRow(
        loss=mean([row.loss for row in rows]),
        accuracy=mean([row.accuracy for row in rows]),
        perplexity=mean([row.perplexity for row in rows]),
        rouge_l=mean([row.rouge_l for row in rows]),
        exact_match=mean([row.exact_match for row in rows]),
        macro_f1=mean([row.macro_f1 for row in rows]),
        interval=interval([row.loss for row in rows if row.loss is not None]),
        clients=(),
    )


def _spent(recipe: Recipe, policy: Mechanism, num_means: int) -> PrivacySpent:
    if not policy.needs_aggregate:
        return PrivacySpent(policy.kind, None, None, None)
    epsilon = policy.epsilon(num_means)
    return PrivacySpent(policy.kind, epsilon if math.isfinite(epsilon) else None, recipe.privacy.delta, num_means)


def _closed(rows: Rows) -> float | None:
    """Share of the way from base to centralized that the federated loss goes; None without both or without a gap."""
    losses = (rows[name].loss if name in rows else None for name in ("base", "federated", "centralized"))
    base, ours, best = losses
    if base is None or ours is None or best is None or base <= best:
        return None
    return (base - ours) / (base - best)


def _mean(values: Mapping[int, int]) -> float:
    return statistics.fmean(values.values()) if values else 0.0
