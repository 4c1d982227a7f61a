"""Several methods on one base model, one split, one evaluation and one local budget; one table and one page of it.

Every entry is a run of its own in a process of its own, so memory is measured apart and a crash costs one entry. A
comparison that was stopped goes on where it was when it is called again.
"""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from kilofed.config import trust
from kilofed.config.fields import Table, Value
from kilofed.config.recipe import EvaluateSpec, Recipe
from kilofed.config.tables import from_table, lay_over, read_table, shipped, to_table, to_toml
from kilofed.errors import RecipeError, RunError, nearest
from kilofed.files import replace_file
from kilofed.records import facts
from kilofed.records.codec import to_json
from kilofed.records.results import TITLES as TITLES_OF
from kilofed.records.results import Results, ScoreRow
from kilofed.reports import plots
from kilofed.reports.page import render
from kilofed.reports.reading import Reading, read
from kilofed.reports.report import loss_text
from kilofed.units import count, fixed, operations, percent, size

SHARED = ("model", "data", "evaluate", "seed", "seeds", "rounds", "cohort", "train")
"""Keys of a recipe that all entries have in common, but for FREE."""
FREE = ("lr", "optimizer", "schedule", "warmup", "weight_decay", "max_grad_norm", "accumulation")
"""Keys of [train] that an entry may have to itself: what suits an adapter suits no full model."""
BASELINES = ("base", "local", "centralized")
TITLES = (
    "loss",
    "accuracy",
    "up",
    "down",
    "exchanges",
    "client compute",
    "client memory",
    "server compute",
    "time",
    "leaves the client",
    "secure sum",
)


@dataclass(frozen=True)
class Entry:
    """One line of the comparison."""

    label: str
    method: str
    """A method, or a shipped recipe, whose [method] and [adapter] are then taken."""
    words: Mapping[str, Value] = field(default_factory=dict)
    """Changes for this entry alone."""


@dataclass(frozen=True)
class Row:
    """What one entry brought and cost; per client where it says so, None where it was not measured."""

    label: str
    method: str
    loss: float | None
    interval: tuple[float, float] | None
    """95 % of the loss, over seeds, or over clients where there is one seed."""
    accuracy: float | None
    up: float
    """Bytes per client in the whole run of one seed."""
    down: float
    exchanges: float
    """Of one seed."""
    client_flops: float | None
    """Operations per client in the first round."""
    client_memory: float | None
    """Bytes, the largest client process."""
    server_flops: float | None
    seconds: float
    """Of all rounds of one seed."""
    delivered_as: str
    """What is scored."""
    leaves: str
    """What clients send."""
    secure_sum: bool
    """Whether every reply is only ever needed as part of a mean."""


@dataclass(frozen=True)
class Baseline:
    """What a row next to the entries scored."""

    loss: float | None
    interval: tuple[float, float] | None
    accuracy: float | None


@dataclass(frozen=True)
class Comparison:
    """compare.json."""

    rows: tuple[Row, ...]
    """By entry, in the order asked for."""
    baselines: Mapping[str, Baseline]
    """By name: base, local, centralized; those of the first entry."""
    seeds: int
    """Repeats of each entry."""


def entries(names: str, words: Mapping[str, Value]) -> tuple[list[Entry], dict[str, Value]]:
    """Entries of `fedavg,full=fedavg,kd` with their own `full:adapter.kind=full`, and the words that all share.

    Raises:
        RecipeError: a label twice, a word for no entry, or one that would make entries incomparable.
    """
    pairs = [name.partition("=") for name in names.split(",") if name]
    methods = {label: method or label for label, _, method in pairs}
    if len(methods) != len(pairs) or not pairs:
        raise RecipeError(
            f"--methods is {names!r}; expected names such as fedavg,kd, none twice (full=fedavg renames)"
        )
    own: dict[str, dict[str, Value]] = {label: {} for label in methods}
    common: dict[str, Value] = {}
    for key, value in words.items():
        label, colon, rest = key.partition(":")
        if not colon and key.split(".")[0] == "method":
            raise RecipeError(f"{key}: each entry has a method of its own; say whose, as in {next(iter(own))}:{key}")
        if not colon:
            common[key] = value
        elif label not in own:
            raise RecipeError(f"{key} is for {label!r}, which is not compared{nearest(label, own)}")
        elif rest.split(".")[0] in SHARED and rest not in {f"train.{name}" for name in FREE}:
            raise RecipeError(
                f"{key} would give {label} another {rest.split('.')[0]}: entries share it; leave {label}: out"
            )
        else:
            own[label][rest] = value
    return [Entry(label, method, own[label]) for label, method in methods.items()], common


def recipes(source: str | Path, chosen: Sequence[Entry], common: Mapping[str, Value], seeds: int) -> dict[str, Recipe]:
    """The recipe of each entry, by label. Raises RecipeError."""
    base = read_table(source)
    lay_over(base, common)
    known = shipped()
    theirs = {entry.label: read_table(entry.method) if entry.method in known else {} for entry in chosen}
    public = _public(base, theirs)
    found = {}
    for entry in chosen:
        table = copy.deepcopy(base)
        same = _at(table, "method", "name") == entry.method
        table["method"] = theirs[entry.label].get("method", table["method"] if same else {"name": entry.method})
        if "adapter" in theirs[entry.label] and "adapter" not in _tops(common):
            table["adapter"] = theirs[entry.label]["adapter"]
        lay_over(table, {**public, **entry.words})
        baselines: list[Value] = list(EvaluateSpec().baselines) if entry is chosen[0] else []
        lay_over(table, {"name": entry.label, "seeds": seeds, "evaluate.costs": True, "evaluate.baselines": baselines})
        if _at(table, "engine", "name") in (None, "inprocess"):
            # Clients in a process apart, so that their memory is theirs.
            lay_over(table, {"engine.name": "pool", "engine.workers": 1})
        found[entry.label] = from_table(table)
    return found


def compare(
    source: str | Path, chosen: Sequence[Entry], common: Mapping[str, Value], *, out: Path, seeds: int = 1
) -> Comparison:
    """Run what is not finished under `out`, and write `compare.json` and `compare.html` there.

    Raises:
        RecipeError: an entry's recipe is wrong. RunError: `out` holds another comparison, or an entry stopped.
    """
    wanted = recipes(source, chosen, common, seeds)
    for recipe in wanted.values():
        _check_method(recipe.method.name)
    for label, recipe in wanted.items():
        _check_same(out / label, recipe)
    for label, recipe in wanted.items():
        _run(out / label, recipe)
    rows = tuple(_row(out / entry.label, entry) for entry in chosen)
    first = _finished(read(out / chosen[0].label)).rows
    beside = {name: _baseline(first[name]) for name in BASELINES if name in first}
    found = Comparison(rows, beside, seeds)
    replace_file(out / "compare.json", (json.dumps(to_json(found), indent=1) + "\n").encode())
    replace_file(out / "compare.html", _page(found, wanted[chosen[0].label]).encode("utf-8", "replace"))
    return found


def text(found: Comparison) -> str:
    """The comparison as a plain table."""
    lines = [["", *TITLES], *([row.label, *_cells(row)] for row in found.rows)]
    lines += [[TITLES_OF[name], *_scores(row), *[""] * (len(TITLES) - 2)] for name, row in found.baselines.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _scores(row: Row | Baseline) -> list[str]:
    """Loss with its interval, and accuracy."""
    return [loss_text(row.loss, row.interval), percent(row.accuracy)]


def _cells(row: Row) -> list[str]:
    return [
        *_scores(row),
        size(row.up),
        size(row.down),
        count(row.exchanges),
        operations(row.client_flops),
        size(row.client_memory),
        operations(row.server_flops),
        fixed(row.seconds, 1) + " s",
        row.leaves,
        "yes" if row.secure_sum else "no",
    ]


def _page(found: Comparison, recipe: Recipe) -> str:
    costs: dict[str, tuple[str, str, str, Callable[[Row], float | None]]] = {
        "bytes": ("Quality against bytes", "sent and received per client", "B", lambda row: row.up + row.down),
        "compute": ("Quality against client compute", "per client and round", "FLOP", lambda row: row.client_flops),
        "memory": ("Quality against client memory", "largest client process", "B", lambda row: row.client_memory),
    }
    drawn = []
    baselines = {TITLES_OF[name]: row for name, row in found.baselines.items()}
    levels = {title: row.loss for title, row in baselines.items() if row.loss is not None}
    for name, (title, x, unit, cost) in costs.items():
        points = {row.label: (much, row.loss) for row in found.rows if (much := cost(row)) and row.loss is not None}
        if points:
            best = ", ".join(plots.pareto(points))
            words = f"Left and low is better. None is better in both than: {best}."
            plot = plots.scatter(name, points, levels=levels, x=x, y="held-out loss, nats", unit=unit)
            drawn.append((name, title, words, plot))
    return render(
        "compare.html.jinja",
        {
            "recipe": recipe,
            "titles": TITLES,
            "rows": [(row.label, row.method, row.delivered_as, _cells(row)) for row in found.rows],
            "baselines": [(title, _scores(row)) for title, row in baselines.items()],
            "plots": drawn,
        },
    )


def _tops(words: Mapping[str, Value]) -> set[str]:
    return {key.split(".")[0] for key in words}


def _public(base: Table, theirs: Mapping[str, Table]) -> dict[str, Value]:
    """Public rows are set aside before rows are split, so all entries set aside those that one of them needs."""
    keys = ("public", "public_share")
    if any(_at(base, "data", key) for key in keys):
        return {}
    for table in theirs.values():
        if found := {f"data.{key}": cast(Value, _at(table, "data", key)) for key in keys if _at(table, "data", key)}:
            return found
    return {}


def _at(table: Table, *path: str) -> object:
    """What lies at `path` in a recipe's tables; None where nothing does."""
    value: object = table
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _check_method(name: str) -> None:
    """Refuse a method that cannot be loaded before anything runs; one that can be loaded here can be in the runs."""
    from kilofed.federation.method import find_method

    find_method(name)
    if "." in name:
        trust.trust(name)


def _check_same(folder: Path, recipe: Recipe) -> None:
    if not (folder / facts.FILE).exists():
        return
    from kilofed.federation.method import with_present_names

    name = recipe.method.name
    began = with_present_names(cast(Table, facts.read(folder).recipe), name)
    if began != with_present_names(to_table(recipe), name):
        raise RunError(
            f"{folder} holds a run of another recipe (other data, base, method or settings), which cannot stand beside "
            "the others: choose another --out, or remove that folder"
        )


def _run(folder: Path, recipe: Recipe) -> None:
    if (folder / "results.json").exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    written = folder.with_suffix(".toml")
    replace_file(written, to_toml(recipe).encode())
    began = (folder / "run.json").exists()
    words = ["resume", str(folder)] if began else ["run", str(written), "--out", str(folder)]
    print(f"== {recipe.name}", file=sys.stderr, flush=True)
    # Without -P, the current folder's files could run in place of kilofed; the variable is for its children.
    command, environment = [sys.executable, "-P", "-m", "kilofed", *words], {**os.environ, "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, stdout=subprocess.DEVNULL, env=environment, check=False)
    if done.returncode:
        raise RunError(f"{recipe.name} stopped (see above); what was finished is kept, call compare again to go on")


def _finished(reading: Reading) -> Results:
    if reading.results is None:
        raise RunError(f"{reading.folder} has no results yet; call compare again to go on")
    return reading.results


def _baseline(row: ScoreRow) -> Baseline:
    return Baseline(row.loss, row.interval, row.accuracy)


def _row(folder: Path, entry: Entry) -> Row:
    from kilofed.federation.method import find_method

    found = read(folder)
    results, seeds = _finished(found), max(len(found.seeds), 1)
    scores, costs = results.rows["federated"], results.costs
    method = find_method(results.method)
    return Row(
        entry.label,
        results.method,
        scores.loss,
        scores.interval,
        scores.accuracy,
        results.bytes.up,
        results.bytes.down,
        results.exchanges / seeds,
        costs.client.flops if costs else None,
        costs.client.peak_memory_bytes if costs else None,
        costs.server.flops if costs else None,
        results.seconds / seeds,
        method.delivered_as,
        method.sends,
        all(verb == "mean" for _, verb, _ in found.traffic.by_action),
    )
