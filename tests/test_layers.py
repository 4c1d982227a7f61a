"""Who may import whom, read from the sources; and which commands work without importing torch."""

import ast
import json
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import kilofed

ROOT = Path(kilofed.__file__).parent
REPO = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") or "__init__": path
    for path in sorted(ROOT.rglob("*.py"))
}

# From the ground up; a package imports from those below it alone. A file of the package's root stands for itself.
LAYERS: list[set[str]] = [
    {"errors", "units", "hub", "hosts"},
    {"files", "payload", "config", "records"},
    {"data", "privacy"},
    {"models", "generation"},
    {"federation", "zeroth", "proxy"},
    {"split", "distillation", "costs", "engines", "reports"},
    {"methods"},
    {"runs"},
    {"serving"},
    {"commands"},
    {"cli", "__init__"},
    {"__main__"},
]
CONTRACT = {"federation", "methods", "engines", "runs"}
MATHS = {
    "errors",
    "files",
    "payload",
    "config",
    "records",
    "data",
    "models",
    "generation",
    "zeroth",
    "proxy",
}
"""Packages that a federated method uses and that know of none."""
OUTSIDERS = {
    "transformers": {
        "models",
        "proxy",
        "generation.detokenizer",
        "runs.loop",
        "runs.restore",
        "runs.look",
    },
    "tokenizers": {"generation.detokenizer"},
    "httpx": {"proxy.api"},
    "tenacity": {"proxy.api"},
    "peft": {"models.loading", "proxy.logit_sources"},
    "flwr": {"engines.flower"},
    "grpc": {"engines.stream"},
    "flwr_datasets": {"data.partition"},
    "matplotlib": {"reports.plots"},
    "tqdm": {"commands.progress"},
    "fastapi": {"serving.app", "serving.service"},
    "prometheus_client": {"serving.metrics"},
    "pydantic": {"records.codec", "serving.requests", "serving.validation"},
    "uvicorn": {"serving.server"},
}


def imports(path: Path, *, at_start: bool = False, for_types: bool = False) -> set[str]:
    """Names of the modules that a file imports, as `import` would find them.

    Args:
        at_start: leave out what functions import when they are called.
        for_types: count TYPE_CHECKING blocks too.
    """
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if not for_types and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if at_start and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text("utf-8")))
    return found


def own(path: Path, *, at_start: bool = False, for_types: bool = False) -> set[str]:
    """The modules of kilofed that a file imports."""
    found = set()
    for name in imports(path, at_start=at_start, for_types=for_types):
        if name == "kilofed" or name.startswith("kilofed."):
            inner = name.removeprefix("kilofed").removeprefix(".")
            while inner not in MODULES and "." in inner:
                inner = inner.rpartition(".")[0]
            found.add(inner if inner in MODULES else "__init__")
    return found


def top(module: str) -> str:
    return module.partition(".")[0]


def layer(module: str) -> int:
    return next(number for number, names in enumerate(LAYERS) if top(module) in names)


def test_every_module_has_its_layer() -> None:
    assert {top(module) for module in MODULES} == set().union(*LAYERS)
    assert sum(map(len, LAYERS)) == len(set().union(*LAYERS))


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_down_or_stay_within_a_package(module: str) -> None:
    up = {other for other in own(MODULES[module]) if layer(other) >= layer(module) and top(other) != top(module)}
    assert not up


def test_modules_form_no_circle_not_even_of_types() -> None:
    graph = {module: own(path, for_types=True) - {module} for module, path in MODULES.items()}
    assert list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("module", MODULES)
def test_nobody_reaches_into_an_underscore_of_another_file(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text("utf-8"))
    modules = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kilofed")
        for alias in node.names
        if f"{node.module}.{alias.name}".removeprefix("kilofed.") in MODULES
    }
    taken = {name for name in imports(MODULES[module]) if name.startswith("kilofed.") and private(name)}
    reached = {
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules
        if private(node.attr)
    }
    assert not taken | reached


def private(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last.startswith("_") and not last.startswith("__")


@pytest.mark.parametrize("module", MODULES)
def test_a_name_is_imported_from_the_file_that_defines_it(module: str) -> None:
    strays = set()
    for name in imports(MODULES[module]):
        home, _, last = name.removeprefix("kilofed.").rpartition(".")
        ours = name.startswith("kilofed.") and home in MODULES and f"{home}.{last}" not in MODULES
        if ours and last not in defined(MODULES[home]):
            strays.add(name)
    assert not strays


def defined(path: Path) -> set[str]:
    """Names that a file's own statements bind, imports aside."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


@pytest.mark.parametrize("module", [m for m in MODULES if top(m) in MATHS])
def test_maths_knows_neither_methods_nor_engines(module: str) -> None:
    assert not {top(other) for other in own(MODULES[module])} & CONTRACT


@pytest.mark.parametrize("module", [m for m in MODULES if top(m) == "methods"])
def test_methods_know_no_engine_no_mechanism_and_no_file(module: str) -> None:
    known = own(MODULES[module])
    assert not {top(other) for other in known} & {"engines", "runs", "privacy", "files", "costs"}
    assert "federation.ledger" not in known


@pytest.mark.parametrize("module", [m for m in MODULES if top(m) == "engines"])
def test_engines_know_no_method_file_and_no_maths(module: str) -> None:
    known = {other for other in own(MODULES[module]) if top(other) != "engines"}
    assert known <= {"errors", "payload", "federation.cohort", "config.recipe"}


@pytest.mark.parametrize(("library", "allowed"), OUTSIDERS.items())
def test_a_library_is_imported_in_its_place_only(library: str, allowed: set[str]) -> None:
    users = {module for module, path in MODULES.items() if library in {top(name) for name in imports(path)}}
    assert {module for module in users if not {module, top(module)} & allowed} == set()
    assert users


def test_the_command_line_imports_kilofed_late() -> None:
    assert own(MODULES["cli"], at_start=True) <= {"errors", "__init__"}


@pytest.mark.parametrize(
    "words",
    [["--help"], ["ls"], ["ls", "--json"], ["show", "train"], ["show", "tiny"], ["run", "--help"]],
    ids=" ".join,
)
def test_a_command_works_without_importing_torch(words: list[str], tmp_path: Path) -> None:
    assert not heavy(words, tmp_path)


def test_report_works_without_importing_torch(tmp_path: Path) -> None:
    # An empty folder is refused, after everything that writes a report was imported.
    assert not heavy(["report", str(tmp_path)], tmp_path)


def heavy(words: list[str], folder: Path) -> list[str]:
    """The heavy libraries that `kilofed WORDS` imports."""
    code = """
import json, sys
from kilofed.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
kinds = ("torch", "transformers", "peft", "datasets", "flwr", "numba")
print(json.dumps(sorted(set(kinds) & set(sys.modules))), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=folder, check=True)
    found = json.loads(done.stderr.splitlines()[-1])
    assert isinstance(found, list)
    return found


SCRIPTS = sorted(path for folder in ("benchmarks", "examples", "scripts") for path in (REPO / folder).rglob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(REPO)))
def test_a_script_imports_names_that_are_there(path: Path) -> None:
    missing = set()
    for name in imports(path):
        home, _, last = name.removeprefix("kilofed.").rpartition(".")
        if not name.startswith("kilofed.") or f"{home}.{last}".strip(".") in MODULES:
            continue
        if (home not in MODULES and home) or last not in defined(MODULES[home or "__init__"]):
            missing.add(name)
    assert not missing
