"""Public rows as examples, in the columns of the private ones, with or without labels and answers."""

from collections.abc import Sequence
from dataclasses import replace

from kilofed.config.recipe import DataSpec
from kilofed.data.examples import Example, Renderer, class_names
from kilofed.data.formats import Row
from kilofed.data.readers import Rows, check_columns
from kilofed.errors import DataError


def examples(rows: Sequence[Row], spec: DataSpec, renderer: Renderer, classes: Sequence[str]) -> list[Example]:
    """The public rows as examples; labels and answers are kept if there are any.

    Raises:
        DataError: the rows lack the needed columns, or have a label that the private rows do not have.
    """
    if not rows:
        return []
    have = {name for row in rows for name in row}
    if classes:
        return _to_classify(rows, spec, renderer, classes, have)
    columns = spec.columns
    needed = {
        "response": {columns.instruction, columns.response},
        "messages": {columns.messages},
        "text": {columns.text},
    }
    kind = next((kind for kind, names in needed.items() if names <= have), "")
    if not kind:
        raise _no_column(
            have, f"{columns.instruction} and {columns.response}, or {columns.messages}, or {columns.text}"
        )
    check_columns(needed[kind], rows, "public row")
    if kind == renderer.kind:
        return renderer(rows)
    return Renderer(renderer.tokenizer, replace(spec, template=""), kind)(rows)


def _to_classify(
    rows: Sequence[Row], spec: DataSpec, renderer: Renderer, classes: Sequence[str], have: set[str]
) -> list[Example]:
    text, label = spec.columns.text, spec.columns.label
    if text not in have:
        raise _no_column(have, text)
    check_columns({text}, rows, "public row")
    labelled = [row for row in rows if row.get(label) not in (None, "")]
    if labelled:
        try:
            class_names(replace(spec, labels=tuple(classes)), Rows(labelled, [], ""))
        except DataError as error:
            raise DataError(f"the public rows have other labels than the private ones: {error}") from error
    return [renderer.classed(str(row[text]), str(row.get(label) or "")) for row in rows if row.get(text)]


def _no_column(have: set[str], wanted: str) -> DataError:
    return DataError(
        f"the public rows have the columns {', '.join(sorted(have)) or 'none'}; expected {wanted}; set data.columns"
    )
