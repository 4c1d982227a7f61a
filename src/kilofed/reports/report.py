"""A run folder -> report.html, one file that needs no network; and the table that a run ends with.

A reading of the folder only: nothing here is measured, and every total is a sum of ledger rows.
"""

import math
import shutil
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import cast

from kilofed.files import replace_file
from kilofed.reports import plots
from kilofed.reports.page import render
from kilofed.reports.reading import Reading, Round, dig, items, read
from kilofed.units import count, fixed, number, operations, percent, size

__all__ = ["size", "table", "write"]

ROWS = {"base": "base", "local": "local-only", "federated": "federated", "central": "central"}
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


def table(results: Mapping[str, object], width: int | None = None) -> str:
    """The scores, costs and verdict of `results.json` as plain text.

    Args:
        width: characters per line, None takes the terminal's; columns that do not fit go below.
    """
    width = max(width or shutil.get_terminal_size((100, 24)).columns, 20)
    rows = _rows(results)
    titles = ["", *(title for title, _ in rows)]
    columns = [[title, *(show(row) for _, row in rows)] for title, show in _columns(results).items()]
    blocks: list[list[list[str]]] = [[titles]]
    for column in columns:
        if len(blocks[-1]) > 1 and sum(max(map(len, c)) + 2 for c in [*blocks[-1], column]) - 2 > width:
            blocks.append([titles])
        blocks[-1].append(column)
    lines = [line for block in blocks for line in [*_align(block), ""]]
    over = f"{len(items(results.get('seeds')))} seeds" if _repeated(results) else "clients"
    what = "row" if _classified(results) else "response token"
    lines += textwrap.wrap(f"loss: nats per held-out {what}, with the 95 % interval over {over}", width)
    costs = [_cost_line(results)] if "bytes" in results else []
    for sentence in [*costs, *_privacy_lines(results), *map(str, items(results.get("verdict")))]:
        lines += textwrap.wrap(sentence, width)
    return "\n".join(lines)


def _loss(row: object) -> str:
    ends = [number(end) for end in items(dig(row, "interval"))]
    return fixed(dig(row, "loss")) + (f" [{', '.join(map(fixed, ends))}]" if len(ends) == 2 else "")


_COLUMNS: dict[str, Callable[[object], str]] = {
    "loss": _loss,
    "accuracy": lambda row: percent(dig(row, "accuracy")),
    "perplexity": lambda row: fixed(dig(row, "perplexity"), 2),
    "ROUGE-L": lambda row: fixed(dig(row, "rouge_l")),
    "exact match": lambda row: percent(dig(row, "exact_match")),
}
_CLASS_COLUMNS: dict[str, Callable[[object], str]] = {
    "loss": _loss,
    "accuracy": lambda row: percent(dig(row, "accuracy")),
    "macro-F1": lambda row: fixed(dig(row, "macro_f1")),
}


def _rows(results: Mapping[str, object]) -> list[tuple[str, object]]:
    """Titles and rows of the table: the usual ones, then what the method shows beside them."""
    found = results.get("rows")
    rows = found if isinstance(found, Mapping) else {}
    names = [*ROWS, *(name for name in rows if name not in ROWS)]
    return [(ROWS.get(name, name), rows[name]) for name in names if rows.get(name) is not None]


def _columns(results: Mapping[str, object]) -> dict[str, Callable[[object], str]]:
    return _CLASS_COLUMNS if _classified(results) else _COLUMNS


def _classified(results: Mapping[str, object]) -> bool:
    """Whether the run gave classes to rows."""
    return any(dig(results, "rows", key, "macro_f1") is not None for key in ROWS)


def _align(columns: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in columns]
    lines = zip(*columns, strict=True)
    return [
        "  ".join(text.rjust(w) if i else text.ljust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]


def _repeated(results: Mapping[str, object]) -> bool:
    return len(items(results.get("seeds"))) > 1


def _cost_line(results: Mapping[str, object]) -> str:
    per_client, total = results.get("bytes"), results.get("bytes_total")
    return (
        f"per client {size(dig(per_client, 'up'))} up, {size(dig(per_client, 'down'))} down; "
        f"in all {size(dig(total, 'up'))} up, {size(dig(total, 'down'))} down; "
        f"{count(results.get('exchanges'))} exchanges, {fixed(results.get('seconds'), 1)} s, "
        f"{size(results.get('peak_memory_bytes'))} peak memory"
        + (f"; and {size(extra)} of framing by the engine" if (extra := results.get("framing_bytes")) else "")
    )


def _privacy_lines(results: Mapping[str, object]) -> list[str]:
    """What was spent; nothing where there is no mechanism."""
    spent = results.get("privacy")
    if dig(spent, "kind") in (None, "none"):
        return []
    epsilon, delta = number(dig(spent, "epsilon")), number(dig(spent, "delta"))
    if epsilon is None or not math.isfinite(epsilon):
        return [f"privacy ({dig(spent, 'kind')}): no finite epsilon, so no guarantee"]
    return [
        f"privacy ({dig(spent, 'kind')}): epsilon {epsilon:.3g} at delta {'-' if delta is None else f'{delta:g}'} "
        f"spent over {count(dig(spent, 'num_means'))} noisy means"
    ]


def _words(reading: Reading) -> dict[str, object]:
    """What the page says, by the names that it uses."""
    run, results, traffic = reading.run, reading.results, reading.traffic
    clients = items(run.get("clients"))
    names = {str(dig(client, "id")): str(dig(client, "name") or dig(client, "id")) for client in clients}
    failures = [failure for part in [reading, *reading.seeds] for failure in _failures(part, names)]
    return {
        "reading": reading,
        "name": str(dig(run, "recipe", "name") or results.get("name") or reading.folder.name),
        "sentence": _sentence(reading),
        "scores": [[title, *(show(row) for show in _columns(results).values())] for title, row in _rows(results)],
        "columns": list(_columns(results)),
        "classes": [str(name) for name in items(run.get("classes"))],
        "verdict": [str(line) for line in items(results.get("verdict"))],
        "privacy": _privacy_lines(results),
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
        "charts": [_chart(f"chart{i}", chart) for i, chart in enumerate(items(results.get("charts")))],
        "forecast": _forecast(reading),
        "costs": _costs(reading),
        "leaves": [_leaves(message) for message in items(reading.run.get("leaves"))],
        "num_rounds": len({at for at, _ in traffic.by_round}),
        "actions": sorted({(action, verb) for action, verb, _ in traffic.by_action}),
        "failures": failures[:MAX_SHOWN],
        "num_failures": len(failures),
        "verbs": {verb: sorted({a for a, v, _ in traffic.by_action if v == verb}) for verb in ("mean", "call")},
        "mismatch": not reading.seeds
        and any(number(dig(results, "bytes_total", way)) not in (None, traffic.total(way)) for way in ("up", "down")),
    }


def _failures(reading: Reading, names: Mapping[str, str]) -> list[tuple[int, str, str]]:
    """(round, client, what it said)."""
    rounds = reading.rounds
    return [
        (done.number, names.get(client, client), text) for done in rounds for client, text in done.failures.items()
    ]


def _sentence(reading: Reading) -> str:
    """The result in one sentence."""
    rows = reading.results.get("rows")
    loss = {key: number(dig(rows, key, "loss")) for key in ROWS}
    federated = loss.pop("federated")
    if federated is None:
        done = max((done.number for done in reading.rounds), default=0)
        return f"This run has not finished: {done} of {count(dig(reading.run, 'recipe', 'rounds'))} rounds are here."
    parts = []
    for key, what in (("base", "the base model's"), ("local", "that of training alone")):
        if (other := loss[key]) is not None:
            parts.append(f"{'lower' if federated < other else 'NOT lower'} than {what} ({fixed(other)})")
    if loss["central"] is not None:
        closed = number(reading.results.get("closed"))
        share = "" if closed is None else f", which closes {percent(closed)} of the way there from base"
        parts.append(f"against {fixed(loss['central'])} with all rows in one place{share}")
    return f"Held-out loss {fixed(federated)}" + "".join(f"{',' if i else ':'} {p}" for i, p in enumerate(parts)) + "."


def _series(rounds: Iterable[Round], value: Callable[[Round], float | None]) -> dict[int, float]:
    pairs = ((done.number, value(done)) for done in rounds)
    return {at: found for at, found in pairs if found is not None and math.isfinite(found)}


def _of_client(client: str) -> Callable[[Round], float | None]:
    return lambda done: done.by_client.get(client)


def _course(values: Mapping[int, float]) -> str:
    (first, start), *_, (last, end) = [*values.items()] * 2
    return f"From {fixed(start)} in round {first} to {fixed(end)} in round {last}."


def _loss_plot(reading: Reading, names: Mapping[str, str]) -> tuple[str, plots.Plot] | None:
    if reading.seeds:
        parts = {seed.folder.name: _series(seed.rounds, lambda done: done.loss) for seed in reading.seeds}
        rounds = sorted({at for values in parts.values() for at in values})
        found = {at: [values[at] for values in parts.values() if at in values] for at in rounds}
        mean, label = {at: sum(values) / len(values) for at, values in found.items()}, "federated, mean over seeds"
    else:
        ids = list(dict.fromkeys(client for done in reading.rounds for client in done.by_client))
        parts = {}
        for client in ids:
            name = names.get(client, client)
            key = f"{name} ({client})" if name in parts else name
            parts[key] = _series(reading.rounds, _of_client(client))
        mean, label = _series(reading.rounds, lambda done: done.loss), "federated, mean over clients"
    if not mean:
        return None
    levels = {title: number(dig(row, "loss")) for title, row in _rows(reading.results)}
    shown = {title: loss for title, loss in levels.items() if loss is not None and title != "federated"}
    words = _course(mean) + "".join(f" {title.capitalize()}: {fixed(loss)}." for title, loss in shown.items())
    return words, plots.losses("loss", mean, parts=parts, levels=shown, label=label)


def _train_plot(reading: Reading) -> tuple[str, plots.Plot] | None:
    mean = _series(reading.rounds, lambda done: done.train_loss)
    return (_course(mean), plots.losses("train", mean, parts={}, levels={}, label="training loss")) if mean else None


def _byte_plots(reading: Reading, names: Mapping[str, str]) -> dict[str, plots.Plot]:
    traffic = reading.traffic
    rounds, clients = sorted({at for at, _ in traffic.by_round}), sorted({client for client, _ in traffic.by_client})
    if not rounds:
        return {}
    down, up = ([traffic.by_round[at, way] for at in rounds] for way in ("down", "up"))
    shares = {
        "down, to the client": [traffic.by_client[client, "down"] for client in clients],
        "up, from the client": [traffic.by_client[client, "up"] for client in clients],
    }
    labels = [names.get(str(client), str(client)) for client in clients]
    return {
        "rounds": plots.traffic("rounds", rounds, down, up),
        "growth": plots.growth("growth", rounds, list(accumulate(down)), list(accumulate(up))),
        "clients": plots.bars("clients", labels, shares, unit="B"),
    }


def _chart(name: str, chart: object) -> tuple[str, str, str, plots.Plot]:
    """Name, title, words and drawing of what the method shows of itself."""
    lines = dig(chart, "lines")
    found: dict[str, list[tuple[float, float]]] = {}
    for label, points in lines.items() if isinstance(lines, Mapping) else ():
        pairs = ((number(point[0]), number(point[1])) for point in items(points) if isinstance(point, list))
        found[str(label)] = [(x, y) for x, y in pairs if x is not None and y is not None]
    title, words, x, y = (str(dig(chart, key)) for key in ("title", "words", "x", "y"))
    return name, title, words, plots.lines(name, found, x=x, y=y)


def _holding_plot(clients: Sequence[object], names: Mapping[str, str]) -> plots.Plot | None:
    if not clients:
        return None
    totals: dict[str, float] = {}
    for client in clients:
        labels = dig(client, "labels")
        for label, held in labels.items() if isinstance(labels, Mapping) else ():
            totals[str(label)] = totals.get(str(label), 0) + (number(held) or 0)
    ordered = sorted(totals, key=lambda label: (-totals[label], label))
    kept = ordered if len(ordered) <= plots.NUM_COLOURS else ordered[: plots.NUM_COLOURS - 1]

    def rows(client: object, *path: str) -> float:
        return number(dig(client, *path)) or 0

    stacks = {label: [rows(client, "labels", label) for client in clients] for label in kept}
    if kept != ordered:
        stacks["other labels"] = [sum(rows(c, "labels", label) for label in ordered[len(kept) :]) for c in clients]
    if not stacks:
        stacks = {
            "training": [rows(c, "train_rows") for c in clients],
            "held out": [rows(c, "test_rows") for c in clients],
        }
    return plots.bars("rows", [names[str(dig(client, "id"))] for client in clients], stacks, unit="rows")


def _forecast(reading: Reading) -> list[dict[str, object]]:
    """What was foreseen per client and round, beside the least and most that was measured."""
    found: list[dict[str, object]] = []
    for entry in items(reading.run.get("forecast")):
        action = str(dig(entry, "action"))
        for what in ("down", "up", "exchanges"):
            span = reading.traffic.spans.get((action, what))
            expected = [int(number(end) or 0) for end in items(dig(entry, what))]
            if len(expected) == 2 and span:
                row = {"action": action, "what": what, "expected": expected, "measured": list(span)}
                found.append({**row, "equal": expected == list(span)})
    return found


def _costs(reading: Reading) -> list[tuple[str, str, str, str]]:
    """(what, forecast, measured, one by the other) for each cost that was measured; empty where none was."""
    results, plan = reading.results, reading.run.get("plan")
    if not dig(results, "costs", "client"):
        return []
    exchanges = number(results.get("exchanges"))
    rows: list[tuple[str, Callable[[object], str], object, object]] = [
        ("bytes up per client", count, dig(plan, "up"), dig(results, "bytes", "up")),
        ("bytes down per client", count, dig(plan, "down"), dig(results, "bytes", "down")),
        ("exchanges", count, dig(plan, "exchanges"), exchanges and exchanges / max(len(reading.seeds), 1)),
    ]
    for whose, of in (("a client", "client"), ("the server", "server")):
        measured = dig(results, "costs", of, "flops")
        rows.append((f"operations of {whose}, round 1", operations, dig(plan, f"{of}_flops"), measured))
    peak = dig(results, "costs", "client", "peak_memory_bytes")
    rows.append(("memory of the clients' process", size, dig(plan, "client_memory"), peak))
    return [(what, show(told), show(seen), _ratio(told, seen)) for what, show, told, seen in rows]


def _ratio(told: object, seen: object) -> str:
    first, second = number(told), number(seen)
    if first is None or second is None:
        return "-"
    return "equal" if first == second else fixed(first / second) if second else "-"


def _leaves(message: object) -> dict[str, object]:
    """What one reply holds: names and shapes of its tensors, how many numbers, of which dtypes."""
    tensors = cast(dict[str, list[str | int]], dig(message, "tensors"))
    shapes = {name: [int(size) for size in rest] for name, (_, *rest) in tensors.items()}
    varies = any(size < 0 for shape in shapes.values() for size in shape)
    return {
        "action": dig(message, "action"),
        "tensors": [(name, _shape(shape)) for name, shape in shapes.items()],
        "numbers": None if varies else sum(math.prod(shape) for shape in shapes.values()),
        "dtypes": sorted({str(dtype) for dtype, *_ in tensors.values()}),
        "scalars": dig(message, "scalars"),
    }


def _shape(sizes: list[int]) -> str:
    """Sizes of a tensor; n is one that differs from reply to reply."""
    return " x ".join("n" if size < 0 else str(size) for size in sizes) or "scalar"
