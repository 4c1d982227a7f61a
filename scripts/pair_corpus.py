"""Corpus of the embedded pair: package documentation minus what `pydocs` holds out, and the gazetteer."""

import importlib.metadata
import importlib.util
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kilofed.data.sources import gazetteer, pydocs

# Python packages with permissive licences; a licence is checked against the installed metadata.
PACKAGES = (
    *(
        "torch",
        "transformers",
        "numpy",
        "pandas",
        "matplotlib",
        "scipy",
        "sympy",
        "networkx",
        "peft",
        "datasets",
    ),
    *("huggingface_hub", "numba", "pip", "setuptools", "ray", "flwr", "sqlalchemy", "mypy", "aiohttp"),
    *("accelerate", "nltk", "requests", "rich", "fontTools", "PIL", "jinja2", "fsspec", "click", "joblib"),
    *("seaborn", "fastapi", "starlette", "httpx", "pygments", "markdown_it", "anyio", "urllib3", "wrapt"),
)
DISTRIBUTIONS = {"PIL": "pillow", "fontTools": "fonttools", "markdown_it": "markdown-it-py"}
PERMISSIVE = re.compile(r"(?i)\b(mit|bsd|apache|psf|python software foundation|hpnd|isc|matplotlib)\b")
RESTRICTED = re.compile(r"(?i)\b(a?l?gpl|mpl|general public|mozilla|proprietary)\b")
MAX_DOCSTRING = 600
MAX_BODY = 400
MAX_COPIES = 2
"""Functions that may share one docstring; packages repeat themselves."""

QUESTIONS = (
    "Q: What does {name} do?\nA: {summary}",
    "Q: {name}{signature}: what is it for?\nA: {summary}",
    "In one line, {name}{signature} does this: {summary}",
    "{name}: {summary}",
)


@dataclass
class Corpus:
    """Training texts, held-out texts, and where they come from."""

    texts: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    packages: list[dict[str, str]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    dropped_functions: int = 0
    dropped_lines: int = 0


def documentation(*, seed: int, packages: tuple[str, ...] = PACKAGES) -> Corpus:
    """Render the functions of the standard library and of the packages that are installed and permissive."""
    corpus = Corpus()
    rng = random.Random(f"corpus {seed}")
    found: list[pydocs.Function] = []
    for name, places in _places(packages, corpus):
        before = len(found)
        for path, module in pydocs.source_files(places):
            found += pydocs.functions(path, module)
        corpus.packages[-1]["functions"] = str(len(found) - before)
        print(f"{name}: {len(found) - before} functions", file=sys.stderr)
    banned = {pydocs.normalise(pydocs.summary(item.docstring)) for item in found}
    banned = {key for key in banned if pydocs.held_out(key) and key.count(" ") >= 2}
    copies: Counter[str] = Counter()
    for function in found:
        copies[function.docstring[:200]] += 1
        if copies[function.docstring[:200]] > MAX_COPIES:
            continue
        if pydocs.held_out(pydocs.summary(function.docstring)):
            corpus.dropped_functions += 1
            corpus.held_out.append(_render(function, rng))
            continue
        text = _render(function, rng)
        kept = [line for line in text.split("\n") if not _repeats(line, banned)]
        corpus.dropped_lines += len(text.split("\n")) - len(kept)
        corpus.texts.append("\n".join(kept))
        if pydocs.clean(pydocs.summary(function.docstring)) and rng.random() < 0.15:
            corpus.texts.append(_question(function, rng))
    rng.shuffle(corpus.texts)
    rng.shuffle(corpus.held_out)
    return corpus


def _places(packages: tuple[str, ...], corpus: Corpus) -> Iterator[tuple[str, list[Path]]]:
    where = pydocs.installed()
    version = sys.version.split()[0]
    corpus.packages.append({"name": "Python standard library", "version": version, "licence": "PSF-2.0"})
    yield "stdlib", [path for family in pydocs.STDLIB_FAMILIES for path in where[family]]
    for package in packages:
        spec = importlib.util.find_spec(package)
        if not spec or not spec.submodule_search_locations:
            continue
        metadata = importlib.metadata.metadata(DISTRIBUTIONS.get(package, package))
        licence = _licence(metadata)
        if RESTRICTED.search(licence) or not PERMISSIVE.search(licence):
            corpus.refused.append(f"{package} ({licence})")
            continue
        entry = {"name": metadata["Name"], "version": metadata["Version"], "licence": licence}
        corpus.packages.append(entry)
        yield package, [Path(place) for place in spec.submodule_search_locations]


def _licence(metadata: importlib.metadata.PackageMetadata) -> str:
    """The licence in at most one line: expression, classifiers or the first line of the text."""
    expression = metadata.get("License-Expression")
    classified = [line.split(" :: ")[-1] for line in metadata.get_all("Classifier", []) if line.startswith("License")]
    text = (metadata.get("License") or "").strip().split("\n")[0][:60]
    return expression or ", ".join(classified) or text or "unknown"


def _render(function: pydocs.Function, rng: random.Random) -> str:
    docstring = function.docstring.strip()
    if len(docstring) > MAX_DOCSTRING:
        docstring = docstring[: docstring.rfind("\n", 0, MAX_DOCSTRING)].rstrip()
    if rng.random() < 0.3:
        short = function.name.rpartition(".")[2]
        head = f"# {function.name}\ndef {short}{function.signature}:"
        return f'{head}\n    """{_indented(docstring).strip()}"""\n{_indented(function.lines)}'.strip()
    if function.lines and rng.random() < 0.5:
        return f"{function.name}{function.signature}\n{docstring}\n\n{function.lines}"
    return f"{function.name}{function.signature}\n{docstring}"


def _indented(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.split("\n"))


def _question(function: pydocs.Function, rng: random.Random) -> str:
    return rng.choice(QUESTIONS).format(
        name=function.name, signature=function.signature, summary=pydocs.summary(function.docstring)
    )


def _repeats(line: str, banned: set[str]) -> bool:
    """Whether the line, or what stands after a dash, colon or comment sign in it, is a held-out summary."""
    parts = [line, *re.split(r"--|: |# |\"\"\"", line)]
    return any(pydocs.normalise(part) in banned for part in parts)


def world(*, seed: int, repeats: int, share: float) -> list[str]:
    """The gazetteer as short texts: a few sentences each, and questions on the `shown` entities."""
    rng = random.Random(f"world {seed}")
    said = gazetteer.sentences(seed=seed, repeats=repeats, share=share)
    texts = []
    while said:
        count = rng.randint(3, 8)
        texts.append(" ".join(said[:count]))
        said = said[count:]
    asked = [pair for pair in gazetteer.questions("shown") if gazetteer.in_part(pair[1], share)]
    for _ in range(max(1, repeats // 10)):
        rng.shuffle(asked)
        for start in range(0, len(asked), 3):
            texts.append("\n".join(f"Q: {text}\nA: {fact.answer}" for text, fact in asked[start : start + 3]))
    return texts
