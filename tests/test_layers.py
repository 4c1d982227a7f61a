"""Who may import whom, read from the sources; and which commands work without importing torch."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import kilofed

ROOT = Path(kilofed.__file__).parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") or "__init__": path
    for path in sorted(ROOT.rglob("*.py"))
}

# From the ground up; a layer imports from itself and from below.
LAYERS: list[set[str]] = [
    {"errors", "files", "units", "environment", "hub", "charts", "costs"},
    {"fields", "ledger", "payload", "answered", "remote"},
    {"recipe", "wire", "states", "sums", "server_opt", "codec", "distill", "steering", "seedlog", "directions"},
    {"sources", "rows", "data", "public", "privacy", "partition"},
    {
        "heads",
        "consensus",
        "halves",
        "narrow",
        "learner",
        "tail",
        "probe",
        "models",
        "train",
        "zeroth",
        "evaluate",
        "needs",
        "teaching",
        "prospects",
        "steered",
        "decode",
        "spelling",
        "vocabulary",
        "voices",
        "speculate",
        "blackbox",
        "proxy",
    },
    {"method", "cohort", "listing", "reading", "plots", "page"},
    {"work"},
    {"methods", "engines", "report", "compare"},
    {"site", "controls", "results", "check"},
    {"about", "plan"},
    {"run"},
    {"serving", "serve", "export", "chat", "replay", "cli", "__init__", "__main__"},
]
MATHS = {
    "train",
    "zeroth",
    "distill",
    "teaching",
    "steering",
    "server_opt",
    "wire",
    "codec",
    "seedlog",
    "sums",
    "directions",
}
BOTTOM = {"errors", "files", "fields", "recipe", "payload"}
OUTSIDERS = {
    "transformers": {
        "heads",
        "models",
        "voices",
        "vocabulary",
        "proxy",
        "blackbox",
        "evaluate",
        "site",
        "run",
        "needs",
        "check",
    },
    "httpx": {"remote"},
    "tenacity": {"remote"},
    "peft": {"models", "voices"},
    "flwr": {"engines.flower"},
    "grpc": {"engines.stream"},
    "flwr_datasets": {"partition"},
    "dp_accounting": {"privacy"},
    "matplotlib": {"plots"},
    "tqdm": {"cli"},
    "fastapi": {"serving.app", "serving.service"},
    "pydantic": {"serving.asks", "serving.contents"},
    "uvicorn": {"serve"},
}


def imports(path: Path, *, at_start: bool = False) -> set[str]:
    """Names of the modules that a file imports, as `import` would find them; TYPE_CHECKING blocks do not count.

    Args:
        at_start: leave out what functions import when they are called.
    """
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
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


def own(path: Path, *, at_start: bool = False) -> set[str]:
    """The modules of kilofed that a file imports."""
    found = set()
    for name in imports(path, at_start=at_start):
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
def test_arrows_never_point_up(module: str) -> None:
    up = {other for other in own(MODULES[module]) if layer(other) > layer(module)}
    assert not up


@pytest.mark.parametrize("module", [m for m in MODULES if top(m) in MATHS | BOTTOM])
def test_maths_and_the_bottom_know_neither_methods_nor_engines(module: str) -> None:
    assert not {top(other) for other in own(MODULES[module])} & {"method", "methods", "engines", "run", "site"}


@pytest.mark.parametrize("module", [m for m in MODULES if top(m) == "methods"])
def test_methods_know_no_engine_and_no_run(module: str) -> None:
    known = {top(other) for other in own(MODULES[module])}
    assert not known & {"engines", "run", "site", "ledger", "privacy", "files"}


@pytest.mark.parametrize("module", [m for m in MODULES if top(m) == "engines"])
def test_engines_know_no_method_file_and_no_maths(module: str) -> None:
    known = {top(other) for other in own(MODULES[module])}
    assert known <= {"engines", "errors", "method", "payload", "recipe"}


@pytest.mark.parametrize(("library", "allowed"), OUTSIDERS.items())
def test_a_library_is_imported_in_its_place_only(library: str, allowed: set[str]) -> None:
    users = {module for module, path in MODULES.items() if library in {top(name) for name in imports(path)}}
    assert users <= allowed
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
