"""Function documentation of this Python installation; one client is one family of packages.

The task: given a function's qualified name and signature, write its summary line. Files are parsed, never
imported. Whether a function is held out depends only on its summary line, so the split is the same on every
machine and under every seed, and a pre-training corpus can leave out exactly the test functions.
"""

import ast
import hashlib
import importlib.util
import random
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from kilofed.data.sources import Rows

__all__ = [
    "INSTRUCTION",
    "Function",
    "clean",
    "functions",
    "held_out",
    "installed",
    "load",
    "normalise",
    "source_files",
    "summary",
]

INSTRUCTION = "Write the summary line of this Python function."
TEST_SHARE = 0.2
MAX_ROWS_PER_FILE = 12
MAX_FILE_BYTES = 400_000
MAX_SIGNATURE = 160
MAX_LINES = 4
MAX_CODE = 160
UNCLEAN = re.compile(
    r"(?i)see base class|^see |^deprecated|^todo|^inherit|^alias|^docstring|^test |^same as |^override"
    r"|:\w+:|->|>>>|http"
)
SKIPPED_FOLDERS = {"test", "tests", "testing", "_test", "_tests", "idlelib", "lib2to3", "site-packages"}
SKIPPED_FOLDERS |= {"dist-packages", "_vendor", "vendored", "__pycache__"}

STDLIB_FAMILIES = {
    "stdlib-text": """
    string re textwrap difflib html xml json csv configparser email codecs gettext locale shlex pprint reprlib
    tokenize quopri base64 uu binhex encodings stringprep plistlib netrc mailcap optparse cmd argparse getopt
    rlcompleter ast""",
    "stdlib-network": """
    http urllib socket socketserver ssl ftplib smtplib smtpd imaplib poplib nntplib telnetlib xmlrpc asyncio
    asyncore asynchat ipaddress wsgiref selectors mailbox cgi cgitb webbrowser uuid""",
    "stdlib-numeric": """
    _pydecimal decimal fractions statistics random datetime _pydatetime calendar collections heapq bisect
    numbers colorsys turtle operator functools _collections_abc _weakrefset weakref graphlib zoneinfo enum
    types copy dataclasses sched queue contextlib abc _py_abc hashlib hmac secrets""",
    "stdlib-system": """
    os posixpath ntpath genericpath pathlib shutil tempfile subprocess zipfile tarfile gzip bz2 lzma glob
    fnmatch filecmp fileinput logging threading multiprocessing concurrent signal platform sysconfig getpass
    pty tty pipes stat _pyio io linecache mimetypes shelve dbm sqlite3 wave aifc sunau""",
    "stdlib-tools": """
    inspect dis unittest doctest pdb bdb trace traceback typing importlib pkgutil zipimport modulefinder runpy
    site ensurepip venv distutils pydoc profile cProfile pstats timeit tracemalloc code codeop py_compile
    compileall ctypes pickle pickletools copyreg warnings zipapp pyclbr symtable tkinter""",
}
# Dependencies of this package only, so that development tools do not change the data.
PACKAGE_FAMILIES = [
    *("torch", "transformers", "numpy", "pandas", "matplotlib", "scipy", "sympy", "networkx", "peft"),
    *("datasets", "huggingface_hub", "numba", "pip", "setuptools"),
]


class Function(NamedTuple):
    """One documented function as its source file states it."""

    name: str
    signature: str
    lines: str
    docstring: str


def load(
    *,
    seed: int,
    num_clients: int = 5,
    train_rows: int = 200,
    test_rows: int = 40,
    families: Sequence[str] = (),
) -> Rows:
    """Read the documentation of `num_clients` package families.

    Args:
        seed: decides which families, files and functions are taken.
        num_clients: number of families; standard library and packages alternate.
        train_rows: training rows per client, at most.
        test_rows: held-out rows per client, at most.
        families: use these, in this order, instead of sampling.

    Raises:
        ValueError: a named family is not installed, or too few families have rows of both kinds.
    """
    for option, number in (
        ("num_clients", num_clients),
        ("train_rows", train_rows),
        ("test_rows", test_rows),
    ):
        if number < 1:
            raise ValueError(f"{option} is {number}, expected 1 or more")
    where = installed()
    for family in families:
        if family not in where:
            raise ValueError(f"the family {family} is not installed; installed: {', '.join(where)}")
    order = list(families) or _alternate(list(where), random.Random(f"pydocs families {seed}"))
    taken = _take(order, where, seed, len(families) or num_clients, (train_rows, test_rows))
    return Rows(
        [row for rows in taken.values() for row in rows.train],
        [row for rows in taken.values() for row in rows.test],
        "documentation of this Python installation: "
        + ", ".join(f"{family} ({len(rows.train)} train, {len(rows.test)} test)" for family, rows in taken.items()),
    )


def installed() -> dict[str, list[Path]]:
    """Map each family that this installation has to its files and folders."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    found: dict[str, list[Path]] = {}
    for family, modules in STDLIB_FAMILIES.items():
        places = [path for name in modules.split() for path in (stdlib / name, stdlib / f"{name}.py")]
        found[family] = [path for path in places if path.exists()]
    for package in PACKAGE_FAMILIES:
        spec = importlib.util.find_spec(package)
        if spec and spec.submodule_search_locations:
            found[package] = [Path(place) for place in spec.submodule_search_locations]
    return {family: places for family, places in found.items() if places}


def _alternate(families: list[str], rng: random.Random) -> list[str]:
    stdlib = [family for family in families if family in STDLIB_FAMILIES]
    packages = [family for family in families if family not in STDLIB_FAMILIES]
    rng.shuffle(stdlib)
    rng.shuffle(packages)
    turns = [family for pair in zip(packages, stdlib, strict=False) for family in pair]
    return turns + packages[len(stdlib) :] + stdlib[len(packages) :]


def _take(
    order: list[str], where: dict[str, list[Path]], seed: int, count: int, sizes: tuple[int, int]
) -> dict[str, Rows]:
    """The first `count` families that reach both sizes; if there are too few, then the largest of the others."""
    taken: dict[str, Rows] = {}
    small: list[tuple[int, str]] = []
    seen: set[str] = set()
    for family in order:
        rows = _collect(family, where[family], seed, sizes, seen)
        if (len(rows.train), len(rows.test)) == sizes:
            taken[family] = rows
            seen |= _summaries(rows)
        else:
            small.append((-len(rows.train) - len(rows.test), family))
        if len(taken) == count:
            break
    for _, family in sorted(small)[: count - len(taken)]:
        rows = _collect(family, where[family], seed, sizes, seen)
        if rows.train and rows.test:
            taken[family] = rows
            seen |= _summaries(rows)
    if len(taken) < count:
        raise ValueError(f"only {len(taken)} of {count} package families have documentation; ask for fewer clients")
    return taken


def _summaries(rows: Rows) -> set[str]:
    return {normalise(row["response"]) for row in rows.train + rows.test}


def _collect(family: str, places: list[Path], seed: int, sizes: tuple[int, int], seen: set[str]) -> Rows:
    """Read files in a seeded order until both sizes are reached; rows beyond MAX_ROWS_PER_FILE of a file are used last."""
    rng = random.Random(f"pydocs {family} {seed}")
    files = source_files(places)
    rng.shuffle(files)
    own = set(seen)
    train: list[dict[str, str]] = []
    test: list[dict[str, str]] = []
    spare: list[dict[str, str]] = []

    def add(row: dict[str, str]) -> None:
        key = normalise(row["response"])
        rows, size = (test, sizes[1]) if held_out(row["response"]) else (train, sizes[0])
        if key not in own and len(rows) < size:
            own.add(key)
            rows.append(row)

    for path, module in files:
        rows = [_row(family, function) for function in functions(path, module) if clean(summary(function.docstring))]
        rng.shuffle(rows)
        for row in rows[:MAX_ROWS_PER_FILE]:
            add(row)
        spare += rows[MAX_ROWS_PER_FILE:]
        if (len(train), len(test)) == sizes:
            break
    for row in spare:
        add(row)
    return Rows(train, test, "")


def _row(family: str, function: Function) -> dict[str, str]:
    context = f"{function.name}{function.signature}"
    return {
        "client": family,
        "instruction": INSTRUCTION,
        "context": f"{context}\n{function.lines}" if function.lines else context,
        "response": summary(function.docstring),
        "name": function.name,
    }


def source_files(places: Iterable[Path]) -> list[tuple[Path, str]]:
    """List the Python files under the places with their module names, sorted; no tests, no vendored code."""
    found: dict[str, Path] = {}
    for place in places:
        for path in [place] if place.is_file() else place.rglob("*.py"):
            parts = path.relative_to(place.parent).with_suffix("").parts
            if not SKIPPED_FOLDERS.intersection(parts) and path.stat().st_size <= MAX_FILE_BYTES:
                module = ".".join(parts).removesuffix(".__init__")
                found[module] = path
    return [(found[module], module) for module in sorted(found)]


def functions(path: Path, module: str) -> Iterator[Function]:
    """The documented functions of a file, top to bottom; none if parsing fails."""
    try:
        text = path.read_text("utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    yield from _walk(tree.body, module, text.splitlines())


def _walk(body: Sequence[ast.stmt], prefix: str, lines: list[str]) -> Iterator[Function]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from _walk(node.body, f"{prefix}.{node.name}", lines)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield Function(f"{prefix}.{node.name}", _signature(node), _first_lines(node, lines), docstring)


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    text = f"({ast.unparse(node.args)})" + (f" -> {ast.unparse(node.returns)}" if node.returns else "")
    return text if len(text) <= MAX_SIGNATURE else text[: MAX_SIGNATURE - 3] + "..."


def _first_lines(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    """The code below the docstring if it is short, else empty."""
    if len(node.body) < 2:
        return ""
    code = lines[node.body[1].lineno - 1 : node.end_lineno]
    text = textwrap.dedent("\n".join(code)).strip()
    return text if len(code) <= MAX_LINES and len(text) <= MAX_CODE and text.isascii() else ""


def summary(docstring: str) -> str:
    """The first paragraph of a docstring in one line."""
    return " ".join(docstring.strip().split("\n\n")[0].split())


def clean(text: str) -> bool:
    """Whether a summary is a plain English line of 15 to 120 characters."""
    return (
        15 <= len(text) <= 120
        and text.isascii()
        and text[0].isupper()
        and text[-1] not in ":,;(["
        and text.count(" ") >= 2
        and sum(letter.isalpha() or letter == " " for letter in text) >= 0.85 * len(text)
        and not UNCLEAN.search(text)
    )


def normalise(text: str) -> str:
    """Lower-case words with single spaces between: what decides whether two summaries are the same."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def held_out(text: str) -> bool:
    """Whether functions with this summary are in the test split, on every machine and under every seed."""
    digest = hashlib.sha256(normalise(text).encode()).digest()
    return int.from_bytes(digest[:8], "big") < TEST_SHARE * 2**64
