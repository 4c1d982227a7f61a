"""What the pages and docstrings name exists: paths, modules, names, and calls that their functions take."""

import ast
import inspect
import re
from pathlib import Path

import pytest
from tests.test_layers import LAYERS

import kilofed

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src" / "kilofed"
PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not {".venv", "site", "assets", "runs", ".cache", ".pytest_cache"} & set(path.relative_to(ROOT).parts)
)
PYTHON = [
    path for folder in ("src", "benchmarks", "examples", "scripts") for path in sorted((ROOT / folder).rglob("*.py"))
]
SHOWN_AS_THE_READER_S = {"my_method.py", "my_package/my_method.py"}
"""Files that a page tells its reader to write."""

STREAM = ".Stream"
"""`kilofed.Stream` is what a gRPC service is called on the wire."""


def files() -> list[str]:
    """The repository's files, by their paths in it."""
    folders = ("src", "tests", "docs", "benchmarks", "examples", "scripts")
    return [
        path.relative_to(ROOT).as_posix() for name in folders for path in (ROOT / name).rglob("*") if path.is_file()
    ]


FILES = files()


def of_the_repository(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def exists(name: str) -> bool:
    """Whether a file's or folder's path ends in `name`, whole parts of it."""
    return (ROOT / name).exists() or any(f"/{path}".endswith(f"/{name}") for path in FILES)


@pytest.mark.parametrize("page", [*PAGES, *PYTHON], ids=of_the_repository)
def test_paths_into_the_repository_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    named = re.findall(r"(?<![\w./-])((?:src|docs|tests|benchmarks|examples|scripts)/[\w./-]*\w)", text)
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", PAGES, ids=of_the_repository)
def test_python_files_that_a_page_names_exist(page: Path) -> None:
    named = set(re.findall(r"(?<![\w./*-])((?:\w+/)*\w+\.py)\b", page.read_text("utf-8"))) - SHOWN_AS_THE_READER_S
    assert not [name for name in named if not exists(name)]


@pytest.mark.parametrize("page", [*PAGES, *PYTHON], ids=of_the_repository)
def test_dotted_names_of_kilofed_exist(page: Path) -> None:
    named = set(re.findall(r"(?<![\w./@-])kilofed((?:\.[A-Za-z_]\w*)+)", page.read_text("utf-8"))) - {STREAM}
    assert not [f"kilofed{name}" for name in named if not resolves(name.removeprefix(".").split("."))]


def resolves(parts: list[str]) -> bool:
    """Whether `kilofed.` and `parts` are a package, a module, or a name that a module binds."""
    if parts[0] in kilofed.__all__ or (len(parts) == 1 and parts[0].startswith("__")):
        return True
    place = SOURCES
    while parts and (place / parts[0]).is_dir():
        place = place / parts.pop(0)
    if not parts or (place / f"{parts[0]}.py").exists():
        module = place / (f"{parts.pop(0)}.py" if parts else "__init__.py")
    else:
        module = place / "__init__.py"
    bound = {
        node.name if isinstance(node, ast.FunctionDef | ast.ClassDef) else node.id
        for node in ast.walk(ast.parse(module.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        or (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
    }
    return not parts or parts[0] in bound


def test_calls_that_are_shown_fit_the_functions() -> None:
    checked = 0
    for path in [*PAGES, *PYTHON]:
        for line in re.findall(r"^.*?\b(kilofed\.(?:run|resume|load)\(.*\))\s*$", path.read_text("utf-8"), flags=re.M):
            try:
                call = ast.parse(line, mode="eval").body
            except SyntaxError:
                continue  # One of several lines.
            assert isinstance(call, ast.Call)
            assert isinstance(call.func, ast.Attribute)
            given = {keyword.arg or "": None for keyword in call.keywords}
            inspect.signature(getattr(kilofed, call.func.attr)).bind(*call.args, **given)
            checked += 1
    assert checked > 5


def test_the_tree_of_errors_is_that_of_the_classes() -> None:
    errors = vars(kilofed.errors)
    drawn = re.findall(r"^[│ ]*[├└]── (\w+)", kilofed.errors.__doc__ or "", flags=re.M)
    assert set(drawn) == {
        name for name, item in errors.items() if isinstance(item, type) and issubclass(item, kilofed.KilofedError)
    } - {"KilofedError"}


def table(page: str, title: str) -> list[list[str]]:
    """Cells of the table below a heading of the architecture page, without backquotes."""
    text = page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in line] for line in lines[2:]]


@pytest.mark.parametrize("title", ["The walk of a recipe", "The walk of a payload"])
def test_each_step_of_a_walk_is_a_function_of_its_file(title: str) -> None:
    steps = table((ROOT / "docs" / "architecture.md").read_text("utf-8"), title)
    assert [step[0] for step in steps] == [str(number) for number in range(1, len(steps) + 1)]
    assert len(steps) > 10
    for _, file, name, _ in steps:
        assert name in definitions(ast.parse((SOURCES / file).read_text("utf-8"))), f"{file} has no {name}"


def definitions(tree: ast.AST, above: str = "") -> set[str]:
    """Functions and classes of a file, methods as `Class.method`."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found |= {above + node.name} | definitions(node, f"{above}{node.name}.")
    return found


def test_the_packages_of_the_page_are_those_of_the_sources() -> None:
    rows = table((ROOT / "docs" / "architecture.md").read_text("utf-8"), "Packages")
    assert sorted(row[0] for row in rows) == sorted(path.parent.name for path in SOURCES.glob("*/__init__.py"))
    assert all((SOURCES / row[2]).exists() for row in rows)


def test_the_layers_of_the_page_are_those_of_the_test() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    block = page.partition("```layers\n")[2].partition("```")[0]
    assert [set(line.split()) for line in block.splitlines()] == LAYERS
