"""Plots of a run as inline SVG: same input, same bytes; colours are the page's own, so that light and dark both work.

matplotlib draws with marker colours, which are then replaced by CSS variables (`--ink`, `--grid`, `--c0` ... `--c7`)
that the page defines. Keys are given apart, as text, for the page to set.
"""

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, quantiles
from typing import Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

NUM_COLOURS = 8
MAX_BARS = 40
"""More clients than this are shown as a distribution."""
MAX_LINES = 60
MAX_COLUMNS = 60
"""More rounds than this are drawn in groups."""

_INK, _GRID = "#0b0a20", "#0b0a30"
_COLOURS = [f"#0b0a{i:02x}" for i in range(1, NUM_COLOURS + 1)]
_VARIABLES = {_INK: "--ink", _GRID: "--grid"} | {colour: f"--c{i}" for i, colour in enumerate(_COLOURS)}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kilofed",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.unicode_minus": False,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
}

Dash = Literal["solid", "dashed", "dotted", "dashdot", "fill"]


@dataclass(frozen=True)
class Entry:
    """One line of a key."""

    text: str
    colour: str
    """CSS variable."""
    dash: Dash


@dataclass(frozen=True)
class Plot:
    """A drawing and its key."""

    svg: str
    key: list[Entry]


def losses(
    name: str,
    mean: Mapping[int, float],
    *,
    parts: Mapping[str, Mapping[int, float]],
    levels: Mapping[str, float],
    label: str,
) -> Plot:
    """Loss per round: the mean in bold, each part (client or seed) thin, levels as horizontal lines.

    Args:
        name: prefix of ids in the drawing; unlike that of any other on the page.
        mean: loss by round, nats per token.
        parts: label -> loss by round; more than 60 become a band.
        levels: label -> loss, at most three.
    """
    figure, axes = _sheet()
    key = [Entry(label, "--ink", "solid")]
    if len(parts) > MAX_LINES:
        key.append(_band(axes, parts))
    else:
        coloured = len(parts) <= NUM_COLOURS
        for i, values in enumerate(parts.values()):
            colour = _COLOURS[i] if coloured else _COLOURS[0]
            axes.plot(list(values), list(values.values()), color=colour, linewidth=1.1, alpha=0.9 if coloured else 0.4)
        names = list(parts) if coloured else ["each of the others"]
        key += [Entry(part, f"--c{i}", "solid") for i, part in enumerate(names)]
    axes.plot(list(mean), list(mean.values()), color=_INK, linewidth=2.4, marker="o" if len(mean) < 30 else "")
    dashes: tuple[Dash, ...] = ("dashed", "dotted", "dashdot")
    for (level, value), dash in zip(levels.items(), dashes, strict=False):
        axes.axhline(value, color=_INK, linestyle=dash, linewidth=1.2)
        key.append(Entry(level, "--ink", dash))
    axes.set_ylabel("loss, nats per token")
    return Plot(_svg(figure, name), key)


def lines(name: str, chart: Mapping[str, Sequence[tuple[float, float]]], *, x: str, y: str) -> Plot:
    """Lines through points, one per label; at most 8."""
    figure, axes = _sheet()
    for i, points in enumerate(chart.values()):
        across, along = [[point[axis] for point in points] for axis in (0, 1)]
        axes.plot(across, along, color=_COLOURS[i], linewidth=2, marker="o" if len(points) < 30 else "", markersize=4)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.xaxis.set_major_locator(MaxNLocator(8))
    return Plot(_svg(figure, name), [Entry(label, f"--c{i}", "solid") for i, label in enumerate(chart)])


def scatter(
    name: str,
    points: Mapping[str, tuple[float, float]],
    *,
    levels: Mapping[str, float],
    x: str,
    y: str,
    unit: str,
) -> Plot:
    """A dot per label, the lower and the farther left the better, and the line through those that none beats in both.

    Args:
        points: label -> (cost above 0, loss); at most 8 have a colour of their own.
        levels: label -> loss, as horizontal lines; at most three.
        unit: of x, such as `B`; the axis is logarithmic where costs differ by more than a factor of ten.
    """
    figure, axes = _sheet(height=3.2)
    key = []
    for i, (label, (cost, loss)) in enumerate(points.items()):
        colour = _COLOURS[i % NUM_COLOURS]
        axes.plot([cost], [loss], color=colour, marker="o", markersize=8, linestyle="none")
        key.append(Entry(label, f"--c{i % NUM_COLOURS}", "fill"))
    front = pareto(points)
    axes.plot(*zip(*(points[label] for label in front), strict=True), color=_INK, linewidth=1, linestyle="dashed")
    key.append(Entry("none is better in both", "--ink", "dashed"))
    dashes: tuple[Dash, ...] = ("solid", "dotted", "dashdot")
    for (level, value), dash in zip(levels.items(), dashes, strict=False):
        axes.axhline(value, color=_INK, linestyle=dash, linewidth=0.8)
        key.append(Entry(level, "--ink", dash))
    costs = [cost for cost, _ in points.values()]
    if max(costs) > 10 * min(costs):
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(EngFormatter(unit))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return Plot(_svg(figure, name), key)


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Labels that no other is at least as good as in both numbers and better in one, by rising first number."""
    front = [
        label
        for label, (x, y) in points.items()
        if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points.values())
    ]
    return sorted(front, key=lambda label: points[label])


def traffic(name: str, rounds: Sequence[int], down: Sequence[int], up: Sequence[int]) -> Plot:
    """Bytes per round, up on top of down; of more than 60 rounds, the means of neighbours."""
    figure, axes = _sheet()
    every = math.ceil(len(rounds) / MAX_COLUMNS)
    starts = range(0, len(rounds), every)
    at = [rounds[start] for start in starts]
    low, high = ([fmean(values[start : start + every]) for start in starts] for values in (down, up))
    axes.bar(at, low, width=0.8 * every, color=_COLOURS[0])
    axes.bar(at, high, width=0.8 * every, bottom=low, color=_COLOURS[1])
    axes.yaxis.set_major_formatter(EngFormatter("B"))
    axes.set_ylabel("sent per round" if every == 1 else f"sent per round, means of {every}")
    return Plot(
        _svg(figure, name), [Entry("up, from clients", "--c1", "fill"), Entry("down, to clients", "--c0", "fill")]
    )


def growth(name: str, rounds: Sequence[int], down: Sequence[int], up: Sequence[int]) -> Plot:
    """All bytes sent up to and including each round."""
    figure, axes = _sheet()
    axes.plot(rounds, down, color=_COLOURS[0], linewidth=2)
    axes.plot(rounds, up, color=_COLOURS[1], linewidth=2, linestyle="dashed")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(EngFormatter("B"))
    axes.set_ylabel("sent so far")
    return Plot(
        _svg(figure, name), [Entry("up, from clients", "--c1", "dashed"), Entry("down, to clients", "--c0", "solid")]
    )


def bars(name: str, clients: Sequence[str], stacks: Mapping[str, Sequence[float]], *, unit: str) -> Plot:
    """One bar per client, cut into `stacks`; more than 40 clients become a distribution of their sums.

    Args:
        stacks: label -> one value per client; at most 8.
        unit: `B` for bytes, else a plain word such as `rows`.
    """
    if len(clients) > MAX_BARS:
        return _distribution(name, [sum(parts) for parts in zip(*stacks.values(), strict=True)], unit)
    figure, axes = _sheet(height=0.7 + 0.26 * max(len(clients), 2))
    left = [0.0] * len(clients)
    for i, values in enumerate(stacks.values()):
        axes.barh(range(len(clients)), values, left=left, color=_COLOURS[i], height=0.7)
        left = [start + value for start, value in zip(left, values, strict=True)]
    axes.set_yticks(range(len(clients)), [_short(client) for client in clients], parse_math=False)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    _measure(axes, unit)
    return Plot(_svg(figure, name), [Entry(label, f"--c{i}", "fill") for i, label in enumerate(stacks)])


def _distribution(name: str, sums: Sequence[float], unit: str) -> Plot:
    figure, axes = _sheet()
    axes.hist(sums, bins=30, range=(0, max(sums) or 1), color=_COLOURS[0])
    axes.set_ylabel("clients")
    _measure(axes, unit)
    return Plot(_svg(figure, name), [Entry("number of clients", "--c0", "fill")])


def _band(axes: Axes, parts: Mapping[str, Mapping[int, float]]) -> Entry:
    by_round: dict[int, list[float]] = {}
    for values in parts.values():
        for at, value in values.items():
            by_round.setdefault(at, []).append(value)
    rounds = sorted(at for at, values in by_round.items() if len(values) > 1)
    cuts = [quantiles(by_round[at], n=20) for at in rounds]
    axes.fill_between(rounds, [cut[0] for cut in cuts], [cut[-1] for cut in cuts], color=_COLOURS[0], alpha=0.4)
    return Entry("nine of ten lie within", "--c0", "fill")


def _measure(axes: Axes, unit: str) -> None:
    axes.set_xlabel("sent" if unit == "B" else unit)
    axes.xaxis.set_major_formatter(EngFormatter(unit if unit == "B" else ""))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _sheet(height: float = 2.7) -> tuple[Figure, Axes]:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.4, height), layout="constrained")
        axes = figure.subplots()
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    return figure, axes


def _svg(figure: Figure, name: str) -> str:
    file = io.StringIO()
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # Text stays text in the drawing: a glyph that matplotlib's own font lacks comes from the reader's fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    return re.sub(r"<[^<>]*>", lambda tag: _mend(tag[0], name), text)


def _mend(tag: str, name: str) -> str:
    """A tag as the page needs it: ids that are the drawing's own, colours by name."""
    if tag.startswith("<svg "):
        box = re.search(r'viewBox="[^"]*"', tag)
        assert box
        return f'<svg {box[0]} role="img" aria-labelledby="{name}-title {name}-words">'
    tag = re.sub(r' id="|xlink:href="#|url\(#', lambda start: start[0].removeprefix("xlink:") + name + "-", tag)
    return re.sub("|".join(_VARIABLES), lambda colour: f"var({_VARIABLES[colour[0]]})", tag)


def _short(text: str) -> str:
    return text if len(text) <= 22 else text[:21] + "…"
