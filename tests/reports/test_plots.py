"""Plots are the same bytes each time, in the page's colours, and stay small however many clients there are."""

import re

from kilofed.reports import plots


def num_marks(svg: str) -> int:
    """Filled shapes that are clipped to the axes, as bars are."""
    return len(re.findall(r'clip-path="[^"]*" style="fill: var', svg))


def test_same_input_same_bytes() -> None:
    first, second = (plots.growth("a", [1, 2], [10, 20], [5, 9]).svg for _ in range(2))
    assert first == second


def test_no_colour_is_fixed() -> None:
    svg = plots.losses("a", {0: 3.0, 1: 2.0}, parts={"x": {0: 3.0, 1: 2.0}}, levels={"base": 3.0}, label="mean").svg
    assert not re.findall(r"#[0-9a-f]{3,6}\b(?=[;\"])", svg)
    assert {"var(--ink)", "var(--grid)", "var(--c0)"} <= set(re.findall(r"var\([^)]*\)", svg))


def test_bars_are_one_per_client_and_stack() -> None:
    plot = plots.bars("a", ["x", "y", "z"], {"train": [3, 2, 1], "test": [1, 1, 1]}, unit="rows")
    assert num_marks(plot.svg) == 6
    assert [entry.text for entry in plot.key] == ["train", "test"]


def test_many_clients_become_a_distribution() -> None:
    names = [f"client {i}" for i in range(1_000)]
    plot = plots.bars("a", names, {"train": list(range(1_000))}, unit="rows")
    assert num_marks(plot.svg) == 30
    assert [entry.text for entry in plot.key] == ["number of clients"]


def test_many_lines_become_a_band() -> None:
    parts = {str(i): {0: 3.0 + i, 1: 2.0 + i} for i in range(1_000)}
    plot = plots.losses("a", {0: 3.0, 1: 2.0}, parts=parts, levels={}, label="mean")
    assert [entry.text for entry in plot.key] == ["mean", "nine of ten lie within"]
    assert len(plot.svg) < 50_000


def test_of_many_rounds_the_means_of_neighbours_are_drawn() -> None:
    rounds = range(1, 602)
    plot = plots.traffic("a", rounds, [1] * 601, [2] * 601)
    assert "sent per round, means of 11" in plot.svg
    assert num_marks(plot.svg) == 2 * 55


def test_names_are_text_and_not_formulas_or_tags() -> None:
    svg = plots.bars("a", ["$x$ <b>", "系统"], {"train": [1, 2]}, unit="rows").svg
    assert "$x$ &lt;b&gt;" in svg
    assert "系统" in svg
