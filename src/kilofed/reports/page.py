"""A page from its template: one file that needs no network, light and dark, wide and narrow."""

from collections.abc import Mapping
from importlib import resources

import jinja2

from kilofed.units import count, fixed, percent, size


def render(template: str, words: Mapping[str, object]) -> str:
    """The page of `template`, a file of this package, filled with `words`; they are escaped."""
    home = resources.files("kilofed.reports")
    page = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: home.joinpath(name).read_text("utf-8")),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.filters.update(size=size, count=count, fixed=fixed, percent=percent)
    style = home.joinpath("page.css").read_text("utf-8")
    return page.get_template(template).render({"style": style, **words})
