"""A run folder -> report.html, one file that needs no network; and the table that a run ends with.

A reading of the folder only: nothing here is measured, and every total is a sum of ledger rows.
"""

import math
import shutil
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

from kilofed.files import replace_file
from kilofed.records.facts import VARIES, ClientFacts, Forecast, ReplyFacts
from kilofed.records.metrics import RoundMetrics
from kilofed.records.results import Chart, PrivacySpent, Results, ScoreRow, TotalBytes, in_order
from kilofed.reports import plots
from kilofed.reports.page import render
from kilofed.reports.reading import Reading, read
from kilofed.units import count, fixed, number, operations, percent, size

MAX_SHOWN = 60
"""Clients and rounds that are listed one by one."""


def write(folder: Path) -> Path:
    """Write `report.html` into the run folder; of a folder with several seeds, the page over all of them.

    Raises:
        RunError: not a run folder, a broken line (named by its number), or the disk is full.
    """
    path = folder / "report.html"
    replace_file(path, render("report.html.jinja", _words(read(folder))).encode("utf-8", "replace"))
    return path


def table(results: Results, width: int | None = None) -> str:
    """The scores, costs and verdict of a run as plain text.

    Args:
        width: characters per line, None takes the terminal's; columns that do not fit go below.
    """
    width = _width(width)
    over = f"{len(results.seeds)} seeds" if len(results.seeds) > 1 else "clients"
    lines = [scores(results.rows, width, over=over)]
    for sentence in [_cost_line(results), *_privacy_lines(results.privacy), *results.verdict]:
        lines += textwrap.wrap(sentence, width)
    return "\n".join(lines)


def scores(rows: Mapping[str, ScoreRow], width: int | None = None, *, over: str = "clients") -> str:
    """The scores of some rows as plain text.

    Args:
        width: as in `table`.
        over: what the intervals are over, in the plural.
    """
    width, rows = _width(width), in_order(rows)
    titles = ["", *rows]
    columns = [[title, *map(show, rows.values())] for title, show in _columns(rows.values()).items()]
    blocks: list[list[list[str]]] = [[titles]]
    for column in columns:
        if len(blocks[-1]) > 1 and sum(max(map(len, c)) + 2 for c in [*blocks[-1], column]) - 2 > width:
            blocks.append([titles])
        blocks[-1].append(column)
    lines = [line for block in blocks for line in [*_align(block), ""]]
    what = "row" if _classified(rows.values()) else "response token"
    lines += textwrap.wrap(f"loss: nats per held-out {what}, with the 95 % interval over {over}", width)
    return "\n".join(lines)


def _width(wanted: int | None) -> int:
    return max(wanted or shutil.get_terminal_size((100, 24)).columns, 20)


def loss_text(loss: float | None, interval: Sequence[float] | None) -> str:
    """A loss with its 95 % interval, where it has one."""
    return fixed(loss) + (f" [{', '.join(map(fixed, interval))}]" if interval else "")


_COLUMNS: dict[str, Callable[[ScoreRow], str]] = {
    "loss": lambda row: loss_text(row.loss, row.interval),
    "accuracy": lambda row: percent(row.accuracy),
    "perplexity": lambda row: fixed(row.perplexity, 2),
    "ROUGE-L": lambda row: fixed(row.rouge_l),
    "exact match": lambda row: percent(row.exact_match),
}
_CLASS_COLUMNS: dict[str, Callable[[ScoreRow], str]] = {
    "loss": lambda row: loss_text(row.loss, row.interval),
    "accuracy": lambda row: percent(row.accuracy),
    "macro-F1": lambda row: fixed(row.macro_f1),
}


def _columns(rows: Iterable[ScoreRow]) -> dict[str, Callable[[ScoreRow], str]]:
    return _CLASS_COLUMNS if _classified(rows) else _COLUMNS


def _classified(rows: Iterable[ScoreRow]) -> bool:
    """Whether the run gave classes to rows."""
    return any(row.macro_f1 is not None for row in rows)


def _align(columns: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in columns]
    lines = zip(*columns, strict=True)
    return [
        "  ".join(text.rjust(w) if i else text.ljust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]


def _cost_line(results: Results) -> str:
    total, extra = results.bytes_total, results.framing_bytes
    return (
        f"per client {size(results.bytes.up)} up, {size(results.bytes.down)} down; "
        f"in all {size(total.up)} up, {size(total.down)} down; "
        f"{count(results.exchanges)} exchanges, {fixed(results.seconds, 1)} s, "
        f"{size(results.peak_memory_bytes)} peak memory"
        + (f"; and {size(extra)} of framing by the engine" if extra else "")
    )


def _privacy_lines(spent: PrivacySpent) -> list[str]:
    """What was spent; nothing where there is no mechanism."""
    if spent.kind == "none":
        return []
    if spent.epsilon is None or spent.delta is None:
        return [f"privacy ({spent.kind}): no finite epsilon, so no guarantee"]
    return [
        f"privacy ({spent.kind}): epsilon {spent.epsilon:.3g} at delta {spent.delta:g} "
        f"spent over {count(spent.num_means)} noisy means"
    ]


def _words(reading: Reading) -> dict[str, object]:
    """What the page says, by the names that it uses."""
    facts, results, traffic = reading.facts, reading.results, reading.traffic
    clients = facts.clients
    names = {client.id: client.name or str(client.id) for client in clients}
    rows = in_order(results.rows) if results else {}
    every = [done for part in [reading, *reading.seeds] for done in part.rounds]
    failures = _by_client(((done.round, done.failures) for done in every), names)
    outliers = _by_client(((done.round, done.outliers) for done in every), names)
    return {
        "reading": reading,
        "name": str(facts.recipe.get("name") or reading.folder.name),
        "sentence": _sentence(reading),
        "scores": [[title, *(show(row) for show in _columns(rows.values()).values())] for title, row in rows.items()],
        "columns": list(_columns(rows.values())),
        "classes": facts.classes,
        "verdict": results.verdict if results else (),
        "privacy": _privacy_lines(results.privacy) if results else [],
        "num_runs": max(len(reading.seeds), 1),
        "num_clients": len(clients) or len({client for client, _ in traffic.by_client}),
        "names": names,
        "clients": clients[:MAX_SHOWN],
        "max_shown": MAX_SHOWN,
        "last_losses": next((done.by_client for done in reversed(reading.rounds) if done.by_client), {}),
        "loss_plot": _loss_plot(reading, names),
        "train_plot": _train_plot(reading),
        "byte_plots": _byte_plots(reading, names),
        "holding_plot": _holding_plot(clients, names),
        "charts": [_chart(f"chart{i}", chart) for i, chart in enumerate(results.charts if results else ())],
        "forecast": _forecast(reading),
        "costs": _costs(reading),
        "leaves": [_leaves(reply) for reply in facts.leaves],
        "num_rounds": len({at for at, _ in traffic.by_round}),
        "actions": sorted({(action, verb) for action, verb, _ in traffic.by_action}),
        "failures": failures[:MAX_SHOWN],
        "num_failures": len(failures),
        "outliers": outliers[:MAX_SHOWN],
        "num_outliers": len(outliers),
        "verbs": {verb: sorted({a for a, v, _ in traffic.by_action if v == verb}) for verb in ("mean", "call")},
        "mismatch": not reading.seeds
        and results is not None
        and results.bytes_total != TotalBytes(traffic.total("up"), traffic.total("down")),
    }


def _by_client(
    rounds: Iterable[tuple[int, Mapping[int, str]]], names: Mapping[int, str]
) -> list[tuple[int, str, str]]:
    """(round, client's name, text) of texts by client."""
    return [(number, names.get(client, str(client)), text) for number, told in rounds for client, text in told.items()]


def _sentence(reading: Reading) -> str:
    """The result in one sentence."""
    results = reading.results
    loss = {name: row.loss for name, row in results.rows.items()} if results else {}
    federated = loss.get("federated")
    if results is None or federated is None:
        done = max((done.round for done in reading.rounds), default=0)
        return f"This run has not finished: {done} of {count(reading.recipe.rounds)} rounds are here."
    parts = []
    for key, what in (("base", "the base model's"), ("local", "that of training alone")):
        if (other := loss.get(key)) is not None:
            parts.append(f"{'lower' if federated < other else 'NOT lower'} than {what} ({fixed(other)})")
    if (best := loss.get("centralized")) is not None:
        share = (
            "" if results.closed is None else f", which closes {percent(results.closed)} of the way there from base"
        )
        parts.append(f"against {fixed(best)} with all rows in one place{share}")
    return f"Held-out loss {fixed(federated)}" + "".join(f"{',' if i else ':'} {p}" for i, p in enumerate(parts)) + "."


def _series(rounds: Iterable[RoundMetrics], value: Callable[[RoundMetrics], float | None]) -> dict[int, float]:
    pairs = ((done.round, value(done)) for done in rounds)
    return {at: found for at, found in pairs if found is not None and math.isfinite(found)}


def _of_client(client: int) -> Callable[[RoundMetrics], float | None]:
    return lambda done: done.by_client.get(client)


def _course(values: Mapping[int, float]) -> str:
    (first, start), *_, (last, end) = [*values.items()] * 2
    return f"From {fixed(start)} in round {first} to {fixed(end)} in round {last}."


def _loss_plot(reading: Reading, names: Mapping[int, str]) -> tuple[str, plots.Plot] | None:
    if reading.seeds:
        parts = {seed.folder.name: _series(seed.rounds, lambda done: done.loss) for seed in reading.seeds}
        rounds = sorted({at for values in parts.values() for at in values})
        found = {at: [values[at] for values in parts.values() if at in values] for at in rounds}
        mean, label = {at: sum(values) / len(values) for at, values in found.items()}, "federated, mean over seeds"
    else:
        ids = list(dict.fromkeys(client for done in reading.rounds for client in done.by_client))
        parts = {}
        for client in ids:
            name = names.get(client, str(client))
            key = f"{name} ({client})" if name in parts else name
            parts[key] = _series(reading.rounds, _of_client(client))
        mean, label = _series(reading.rounds, lambda done: done.loss), "federated, mean over clients"
    if not mean:
        return None
    levels = in_order(reading.results.rows) if reading.results else {}
    shown = {title: row.loss for title, row in levels.items() if row.loss is not None and title != "federated"}
    words = _course(mean) + "".join(f" {title.capitalize()}: {fixed(loss)}." for title, loss in shown.items())
    return words, plots.losses("loss", mean, parts=parts, levels=shown, label=label)


def _train_plot(reading: Reading) -> tuple[str, plots.Plot] | None:
    mean = _series(reading.rounds, lambda done: done.train_loss)
    return (_course(mean), plots.losses("train", mean, parts={}, levels={}, label="training loss")) if mean else None


def _byte_plots(reading: Reading, names: Mapping[int, str]) -> dict[str, plots.Plot]:
    traffic = reading.traffic
    rounds, clients = sorted({at for at, _ in traffic.by_round}), sorted({client for client, _ in traffic.by_client})
    if not rounds:
        return {}
    down, up = ([traffic.by_round[at, way] for at in rounds] for way in ("down", "up"))
    shares = {
        "down, to the client": [traffic.by_client[client, "down"] for client in clients],
        "up, from the client": [traffic.by_client[client, "up"] for client in clients],
    }
    labels = [names.get(client, str(client)) for client in clients]
    return {
        "rounds": plots.traffic("rounds", rounds, down, up),
        "growth": plots.growth("growth", rounds, list(accumulate(down)), list(accumulate(up))),
        "clients": plots.bars("clients", labels, shares, unit="B"),
    }


def _chart(name: str, chart: Chart) -> tuple[str, str, str, plots.Plot]:
    """Name, title, words and drawing of what the method shows of itself."""
    return name, chart.title, chart.words, plots.lines(name, chart.lines, x=chart.x, y=chart.y)


def _holding_plot(clients: Sequence[ClientFacts], names: Mapping[int, str]) -> plots.Plot | None:
    if not clients:
        return None
    totals: Counter[str] = Counter()
    for client in clients:
        totals.update(client.labels)
    ordered = sorted(totals, key=lambda label: (-totals[label], label))
    kept = ordered if len(ordered) <= plots.NUM_COLOURS else ordered[: plots.NUM_COLOURS - 1]
    others = ordered[len(kept) :]
    stacks = {label: [float(client.labels.get(label, 0)) for client in clients] for label in kept}
    if others:
        stacks["other labels"] = [float(sum(c.labels.get(label, 0) for label in others)) for c in clients]
    if not stacks:
        stacks = {
            "training": [float(client.train_rows) for client in clients],
            "held out": [float(client.test_rows) for client in clients],
        }
    return plots.bars("rows", [names[client.id] for client in clients], stacks, unit="rows")


def _forecast(reading: Reading) -> list[dict[str, object]]:
    """What was foreseen per client and round, beside the least and most that was measured."""
    found: list[dict[str, object]] = []
    for one in reading.facts.forecast:
        for what, expected in (("down", one.down), ("up", one.up), ("exchanges", one.exchanges)):
            if span := reading.traffic.spans.get((one.action, what)):
                row = {"action": one.action, "what": what, "expected": expected, "measured": span}
                found.append({**row, "equal": expected == span})
    return found


def _costs(reading: Reading) -> list[tuple[str, str, str, str]]:
    """(what, forecast, measured, one by the other) for each cost that was measured; empty where none was."""
    results, plan = reading.results, reading.facts.plan or Forecast("", "", "")
    if results is None or results.costs is None:
        return []
    client, server = results.costs.client, results.costs.server
    rows: list[tuple[str, Callable[[object], str], object, object]] = [
        ("bytes up per client", count, plan.up, results.bytes.up),
        ("bytes down per client", count, plan.down, results.bytes.down),
        ("exchanges", count, plan.exchanges, results.exchanges / max(len(reading.seeds), 1)),
        ("operations of a client, round 1", operations, plan.client_flops, client.flops),
        ("operations of the server, round 1", operations, plan.server_flops, server.flops),
        ("memory of the clients' process", size, plan.client_memory, client.peak_memory_bytes),
    ]
    return [(what, show(told), show(seen), _ratio(told, seen)) for what, show, told, seen in rows]


def _ratio(told: object, seen: object) -> str:
    first, second = number(told), number(seen)
    if first is None or second is None:
        return "-"
    return "equal" if first == second else fixed(first / second) if second else "-"


def _leaves(reply: ReplyFacts) -> dict[str, object]:
    """What one reply holds: names and shapes of its tensors, how many numbers, of which dtypes."""
    tensors = reply.tensors.values()
    varies = any(VARIES in tensor.shape for tensor in tensors)
    return {
        "action": reply.action,
        "tensors": [(name, _shape(tensor.shape)) for name, tensor in reply.tensors.items()],
        "numbers": None if varies else sum(math.prod(tensor.shape) for tensor in tensors),
        "dtypes": sorted({tensor.dtype for tensor in tensors}),
        "scalars": reply.scalars,
    }


def _shape(sizes: Sequence[int]) -> str:
    """Sizes of a tensor; n is one that differs from reply to reply."""
    return " x ".join("n" if size == VARIES else str(size) for size in sizes) or "scalar"
