"""What a run brought and cost, read from its folder: the content of results.json."""

import hashlib
import json
import math
import statistics
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import cast

from kilofed.config.recipe import Recipe
from kilofed.costs import environment, measurement
from kilofed.federation.ledger import Ledger
from kilofed.models.evaluation import SCORES, interval
from kilofed.privacy.mechanisms import Mechanism

Results = dict[str, object]
"""What `results.json` holds and `kilofed run --json` prints."""


def of_run(recipe: Recipe, folder: Path, rows: Mapping[str, object], policy: Mechanism) -> Results:
    """The results of the finished run in `folder`, given the rows of its table."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    with closing(Ledger(folder / "ledger.jsonl")) as ledger:
        means = {(row.round, row.exchange) for row in ledger.rows() if row.verb == "mean"}
        up, down = ledger.per_client("up"), ledger.per_client("down")
        exchanges = ledger.num_exchanges
    privacy: dict[str, object] = {"kind": policy.kind}
    if policy.needs_aggregate:
        privacy |= {
            "epsilon": _finite(policy.epsilon(len(means))),
            "delta": recipe.privacy.delta,
            "num_means": len(means),
        }
    return {
        "name": recipe.name,
        "method": recipe.method.name,
        "rounds": recipe.rounds,
        "seeds": [recipe.seed],
        "rows": dict(rows),
        "bytes": {"up": _mean(up), "down": _mean(down)},
        "bytes_total": {"up": sum(up.values()), "down": sum(down.values())},
        "framing_bytes": sum(line.get("framing_bytes", 0) for line in lines),
        "exchanges": exchanges,
        "seconds": round(sum(line.get("seconds", 0.0) for line in lines), 3),
        "peak_memory_bytes": environment.peak_memory(),
        "costs": measurement.read(folder),
        "privacy": privacy,
        "closed": _closed(rows),
        "verdict": verdict(rows),
        "run": str(folder),
        "state_sha256": hashlib.sha256((folder / "state.safetensors").read_bytes()).hexdigest(),
    }


def over_seeds(recipe: Recipe, folder: Path, every: list[Results]) -> Results:
    """Means over repeats; the interval of each row's loss is over repeats too."""
    tables = [cast(dict[str, dict[str, object]], one["rows"]) for one in every]
    rows: dict[str, object] = {}
    for name in tables[0]:
        row: dict[str, object] = {}
        for score in SCORES:
            values = [cast(float, found) for table in tables if (found := table[name].get(score)) is not None]
            row[score] = statistics.fmean(values) if values else None
        ends = interval([cast(float, table[name]["loss"]) for table in tables])
        rows[name] = {**row, "interval": list(ends) if ends else None, "clients": [
            {"loss": table[name]["loss"]} for table in tables
        ]}  # fmt: skip

    def mean(key: str, part: str) -> float:
        return statistics.fmean(cast(dict[str, float], one[key])[part] for one in every)

    return {
        **every[0],
        "seeds": [recipe.seed + i for i in range(recipe.seeds)],
        "rows": rows,
        "per_seed": [{"seed": recipe.seed + i, "rows": table} for i, table in enumerate(tables)],
        "bytes": {way: mean("bytes", way) for way in ("up", "down")},
        "bytes_total": {
            way: sum(cast(dict[str, int], o["bytes_total"])[way] for o in every) for way in ("up", "down")
        },
        "exchanges": sum(cast(int, one["exchanges"]) for one in every),
        "seconds": round(sum(cast(float, one["seconds"]) for one in every), 3),
        "peak_memory_bytes": max(cast(int, one["peak_memory_bytes"]) for one in every),
        "closed": _closed(rows),
        "verdict": verdict(rows),
        "run": str(folder),
        "state_sha256": hashlib.sha256("".join(str(one["state_sha256"]) for one in every).encode()).hexdigest(),
    }


def verdict(rows: Mapping[str, object]) -> list[str]:
    """Plain sentences on whether the federated model beats the rows beside it, by paired differences of the loss."""
    sentences = []
    names = {"base": "the untouched base model", "local": "local-only training", "central": "central training"}
    federated = _losses(rows, "federated")
    for other, words in names.items():
        beside = _losses(rows, other)
        gains = [beside[client] - federated[client] for client in beside if client in federated]
        if not gains:
            continue
        gain, ends = statistics.fmean(gains), interval(gains)
        range_ = f" (95 % interval {ends[0]:+.3f} to {ends[1]:+.3f})" if ends else ""
        if gain <= 0 and other != "central":
            sentences.append(f"federated does NOT beat {words}: its held-out loss is {-gain:.3f} nats higher{range_}")
        elif ends and ends[0] <= 0 and other != "central":
            sentences.append(f"federated is {gain:.3f} nats below {words}, which is within the noise{range_}")
        else:
            way = "below" if gain > 0 else "above"
            sentences.append(f"federated is {abs(gain):.3f} nats {way} {words}{range_}")
    if (closed := _closed(rows)) is not None:
        sentences.append(f"it closes {100 * closed:.0f} % of the gap from base to central")
    return sentences


def _losses(rows: Mapping[str, object], name: str) -> dict[float, float]:
    """Loss by client (or by repeat): not every client need have been trained alone."""
    row = cast(dict[str, list[dict[str, float]]], rows.get(name, {}))
    return {client.get("id", place): client["loss"] for place, client in enumerate(row.get("clients", []))}


def _closed(rows: Mapping[str, object]) -> float | None:
    """Share of the way from base to central that the federated loss goes; None without both or without a gap."""
    if not {"base", "federated", "central"} <= set(rows):
        return None
    base, ours, best = (cast(dict[str, float], rows[name])["loss"] for name in ("base", "federated", "central"))
    return (base - ours) / (base - best) if base > best else None


def _mean(values: Mapping[int, int]) -> float:
    return statistics.fmean(values.values()) if values else 0.0


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
