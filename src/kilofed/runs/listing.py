"""What there is: methods, recipes, data sources and runs, read from files without importing torch."""

import ast
import inspect
from dataclasses import dataclass, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import cast, get_type_hints

from kilofed.config.fields import Described, describe
from kilofed.config.recipe import Recipe
from kilofed.config.tables import shipped, text_of
from kilofed.errors import RecipeError, RunError, nearest
from kilofed.records import results as results_file
from kilofed.units import fixed


@dataclass(frozen=True)
class Shown:
    """One thing explained."""

    name: str
    kind: str
    text: str
    fields: list[Described]

    def as_text(self) -> str:
        """For a terminal."""
        lines = [self.text]
        for one in self.fields:
            may_be = f"{one.kind}, {one.bounds}" if one.bounds else one.kind
            lines += ["", f"{one.name} = {one.default!r}  ({may_be})", f"    {' '.join(one.text.split())}"]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, object]:
        """For a machine."""
        rows = [
            {
                "name": one.name,
                "type": one.kind,
                "bounds": one.bounds,
                "default": _plain(one.default),
                "text": one.text,
            }
            for one in self.fields
        ]
        return {"name": self.name, "kind": self.kind, "text": self.text, "fields": rows}


def methods() -> dict[str, str]:
    """Name and first sentence of each method."""
    return _files("methods")


def methods_table() -> str:
    """The shipped methods as a table in Markdown: name, what it is, what leaves a client."""
    lines = ["| method | what it is | what leaves a client |", "|---|---|---|"]
    for name, text in methods().items():
        source = resources.files("kilofed") / "methods" / f"{name}.py"
        lines.append(f"| `{name}` | {text.rstrip('.')} | {_sends(source.read_text('utf-8'))} |")
    return "\n".join(lines)


def data() -> dict[str, str]:
    """Name and first sentence of each embedded data source, and what else can be read."""
    other = {
        "FILE or DIR": ".jsonl, .jsonl.gz, .csv, .parquet, or a folder of them",
        "HUB ID": "datasets.load_dataset",
    }
    return {**_files("data/sources"), **other}


def recipes() -> dict[str, str]:
    """Name and sentence of each shipped recipe."""
    return shipped()


def runs(folder: Path = Path("runs")) -> dict[str, str]:
    """Each run folder below `folder` and how far it got."""
    found = {}
    for path in sorted(folder.glob("*/run.json")):
        try:
            results = results_file.read(path.parent)
        except RunError as error:
            found[str(path.parent)] = f"not readable: {error}"
            continue
        if results is None:
            found[str(path.parent)] = f"not finished: kilofed resume {path.parent}"
        else:
            found[str(path.parent)] = f"finished, held-out loss {fixed(results.rows['federated'].loss)}"
    return found


def show(name: str) -> Shown:
    """A method, a recipe, or a table of a recipe such as `train`. Raises RecipeError: no such thing."""
    hints = get_type_hints(Recipe)
    tables: dict[str, type] = {
        item.name: hints[item.name] for item in fields(Recipe) if is_dataclass(hints[item.name])
    }
    if name in shipped():
        return Shown(name, "recipe", text_of(name).rstrip(), [])
    if name in tables or name == "recipe":
        cls = Recipe if name == "recipe" else tables[name]
        return Shown(name, "table", (cls.__doc__ or "").strip(), describe(cls))
    if name in methods() or "." in name:
        from kilofed.federation.method import find_method  # Imports torch: fields may come from a base class.

        cls = find_method(name)
        return Shown(name, "method", inspect.getdoc(inspect.getmodule(cls)) or "", describe(cls))
    known = [*methods(), *shipped(), *tables, "recipe"]
    raise RecipeError(f"{name} is no method, recipe or table of a recipe{nearest(name, known)}")


def _files(folder: str) -> dict[str, str]:
    found = sorted((resources.files("kilofed") / folder).iterdir(), key=lambda item: item.name)
    return {
        item.name[:-3]: " ".join(_docstring(Path(str(item))).split("\n\n")[0].split())
        for item in found
        if item.name.endswith(".py") and item.name != "__init__.py"
    }


def _sends(source: str) -> str:
    """The class variable `sends` of a method's source, or the default of all methods."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "sends":
            return str(ast.literal_eval(cast(ast.expr, node.value)))
    return "trained tensors"


def _docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""


def _plain(value: object) -> object:
    if isinstance(value, str | int | float | bool):
        return value
    return list(value) if isinstance(value, tuple) else str(value)
