"""How the sources are laid out, counted from their imports: modules, arrows between them, floors, circles, and sizes.

An arrow is an import of one module of kilofed by another, wherever it stands; those under TYPE_CHECKING count where a line
says so. Floors are the modules on the longest chain of arrows (a circle counts as one). A package is a folder of the root,
or a file of it. A code line is neither blank, nor a comment, nor part of a docstring.

    python benchmarks/architecture.py [--quick] [--json] [--rev REV ...]
"""

import argparse
import ast
import io
import json
import statistics
import subprocess
import tarfile
import tempfile
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LONG_FUNCTION, LONG_FILE = 60, 400
Graph = dict[str, set[str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="changes nothing: it takes seconds")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rev", action="append", default=[], help="a former commit to count too")
    options = parser.parse_args()
    found = {revision: counted(revision) for revision in options.rev} | {"now": measure(ROOT)}
    if options.json:
        print(json.dumps(found))
        return
    width = max(map(len, found["now"]))
    print(f"| {'':{width}} |", " | ".join(f"{name[:26]:>26}" for name in found), "|")
    print("|---" + "|---:" * len(found) + "|")
    for key in found["now"]:
        print(f"| {key:{width}} |", " | ".join(f"{shown(column[key]):>26}" for column in found.values()), "|")


def counted(revision: str) -> dict[str, object]:
    """`measure` of a former commit, unpacked into a folder that is thrown away."""
    packed = subprocess.run(["git", "archive", revision, "src", "tests"], cwd=ROOT, capture_output=True, check=True)
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        archive.extractall(folder, filter="data")
        return measure(Path(folder))


def measure(root: Path) -> dict[str, object]:
    """Counts of the tree below `root`; lists name the offenders."""
    home = root / "src" / "kilofed"
    modules = {dotted(path, home): path for path in sorted(home.rglob("*.py"))}
    trees = {name: ast.parse(path.read_text("utf-8")) for name, path in modules.items()}
    arrows, typed = graph(trees), graph(trees, types=True)
    packages = folded(arrows)
    sizes = {name: len(path.read_text("utf-8").splitlines()) for name, path in modules.items()}
    functions = {f"{name}.{label}": lines for name, tree in trees.items() for label, lines in spans(tree)}
    code = sum(code_lines(path) for path in modules.values())
    tests = sum(code_lines(path) for path in (root / "tests").rglob("*.py"))
    return {
        "packages and files of the root": len(packages),
        "modules": len(modules),
        "most modules in one folder": most_in_a_folder(modules),
        "arrows between modules": sum(map(len, arrows.values())),
        "arrows between packages": sum(map(len, packages.values())),
        "floors of modules": floors(arrows),
        "floors of packages": floors(packages),
        "circles of modules": circles(arrows),
        "circles of packages": circles(packages),
        "circles of modules, imports for types counted": circles(typed),
        "median file, lines": statistics.median(sizes.values()),
        "largest file, lines": max(sizes.values()),
        f"files over {LONG_FILE} lines": sorted(name for name, size in sizes.items() if size > LONG_FILE),
        "median function, lines": statistics.median(functions.values()),
        "largest function, lines": max(functions.values()),
        f"functions over {LONG_FUNCTION} lines": sorted(k for k, size in functions.items() if size > LONG_FUNCTION),
        "code lines": code,
        "test code lines": tests,
        "test lines per code line": round(tests / code, 2),
    }


def dotted(path: Path, home: Path) -> str:
    """`federation.method` of its path; a package's `__init__` has the package's name, the root's its own."""
    return ".".join(path.relative_to(home).with_suffix("").parts).removesuffix(".__init__")


def graph(trees: Mapping[str, ast.Module], *, types: bool = False) -> Graph:
    """The arrows between modules; with `types` those under TYPE_CHECKING too."""
    return {
        name: {place(found, trees) for found in imports(tree, types=types)} - {name} for name, tree in trees.items()
    }


def imports(node: ast.AST, *, types: bool) -> Iterator[str]:
    """What is imported of kilofed, as `import` would find it, without the leading `kilofed.`."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not types:
        return
    if isinstance(node, ast.Import):
        yield from (alias.name.partition(".")[2] for alias in node.names if alias.name.split(".")[0] == "kilofed")
    elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kilofed":
        inner = (node.module or "").partition(".")[2]
        yield from (f"{inner}.{alias.name}".removeprefix(".") for alias in node.names)
    for child in ast.iter_child_nodes(node):
        yield from imports(child, types=types)


def place(name: str, modules: Mapping[str, object]) -> str:
    """The module that `name` is or lies in."""
    while name not in modules and "." in name:
        name = name.rpartition(".")[0]
    return name if name in modules else "__init__"


def folded(arrows: Graph) -> Graph:
    """Arrows between packages; what stays within one is left out."""
    found: Graph = {name.partition(".")[0]: set() for name in arrows}
    for name, others in arrows.items():
        here = name.partition(".")[0]
        found[here] |= {other.partition(".")[0] for other in others} - {here}
    return found


def most_in_a_folder(modules: Mapping[str, Path]) -> int:
    folders = [path.parent for path in modules.values() if path.name != "__init__.py"]
    return max(map(folders.count, set(folders)))


def knots(arrows: Graph) -> list[set[str]]:
    """Strongly connected parts, each after those that it leads to (Tarjan 1972)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(name: str) -> None:
        number[name] = low[name] = len(number)
        stack.append(name)
        for other in sorted(arrows[name]):
            if other not in number:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], number[other])
        if low[name] == number[name]:
            at = stack.index(name)
            found.append(set(stack[at:]))
            del stack[at:]

    for name in sorted(arrows):
        if name not in number:
            visit(name)
    return found


def circles(arrows: Graph) -> list[str]:
    return sorted("-".join(sorted(knot)) for knot in knots(arrows) if len(knot) > 1)


def floors(arrows: Graph) -> int:
    """Length of the longest chain of arrows, counted in its ends and joints."""
    height: dict[str, int] = {}
    for knot in knots(arrows):
        below = {other for name in knot for other in arrows[name]} - knot
        height |= dict.fromkeys(knot, 1 + max((height[other] for other in below), default=0))
    return max(height.values())


def spans(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Name and number of lines of each function, its docstring and decorators included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(item.lineno for item in node.decorator_list)])
            yield node.name, (node.end_lineno or node.lineno) - first + 1


def code_lines(path: Path) -> int:
    """Lines with code on them."""
    text = path.read_text("utf-8")
    docs = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    idle = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    lines = {at for token in tokens if token.type not in idle for at in range(token.start[0], token.end[0] + 1)}
    return len(lines - docs)


def shown(value: object) -> str:
    """A cell of the table; of a list its length and, where they fit, its members."""
    if not isinstance(value, list):
        return f"{value:,}" if isinstance(value, int) else str(value)
    text = f"{len(value)}: {', '.join(value)}"
    return text if value and len(text) <= 26 else str(len(value))


if __name__ == "__main__":
    main()
