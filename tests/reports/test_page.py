"""A page is one file: its style inside, what comes from outside escaped, what is missing left out."""

import re
from dataclasses import replace

from kilofed.config.recipe import ModelSpec, Recipe
from kilofed.reports import plots
from kilofed.reports.page import render

EVIL = "<script>alert('&')</script>"


def page(recipe: Recipe | None = None, label: str = "fedavg", drawn: tuple[object, ...] = ()) -> str:
    rows = [(label, "fedavg", "model", ["1.0"] * 11)]
    return render(
        "compare.html.jinja",
        {"recipe": recipe or Recipe(), "titles": ["loss"] * 11, "rows": rows, "plots": drawn},
    )


def test_a_page_is_whole_has_its_style_inside_and_loads_nothing() -> None:
    text = page()
    assert text.lstrip().startswith("<!DOCTYPE html>")
    assert text.rstrip().endswith("</html>")
    assert "prefers-color-scheme" in text.partition("</style>")[0].partition("<style>")[2]
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//|@import|url\(""", text)


def test_words_are_escaped_wherever_they_stand() -> None:
    text = page(replace(Recipe(), model=ModelSpec(path=EVIL)), label=EVIL)
    assert EVIL not in text
    assert text.count("&lt;script&gt;") >= 3  # The model, the label, and the label in a link.


def test_plots_are_drawn_and_their_words_escaped() -> None:
    plot = plots.lines("loss", {"a < b": [(1.0, 2.0), (3.0, 41.0)]}, x="round", y="loss")
    text = page(drawn=(("loss", "Loss < 3", "By round & client.", plot),))
    assert "<svg" in text
    assert "Loss &lt; 3" in text
    assert "By round &amp; client." in text
    assert "a < b" not in text


def test_numbers_are_written_with_the_units_of_the_package() -> None:
    assert "<dd>12,000</dd>" in page(replace(Recipe(), rounds=12_000))


def test_what_is_missing_is_left_out() -> None:
    assert page(drawn=()).count("<figure>") == 0
