"""Broken recipes, overrides and data files: is every one refused in a sentence, in bounded time and memory?

    python benchmarks/robustness/inputs.py [--quick] [--json] [--seed 0] [--case recipe:17]

A recipe goes through what `kilofed run` does before its first round: the file and the words are read, the method and the
privacy policy are made, the recipe is written and read again. A data file is read, divided among clients and tokenised,
as `kilofed check` does. Each case runs in a process whose memory is bounded, and under a clock. Ends with an error where
anything but a KilofedError came out.
"""

import argparse
import json
import multiprocessing
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from input_cases import data_case, known_keys, recipe_case, recipe_texts
from kilofed.config import tables
from kilofed.config.recipe import Recipe
from kilofed.data.corpus import Corpus
from kilofed.data.readers import layout
from kilofed.errors import KilofedError
from kilofed.federation.method import with_present_names
from kilofed.models.loading import load_tokenizer
from kilofed.runs.sites import Sites

NUMBERS = {"recipe": 100_000, "file": 20_000}
BATCH = 500
SECONDS = 20
"""A case that takes longer hangs."""
MEMORY = 2 << 30
"""Bytes that a process may take on top of what it had before its first case."""


class Hang(BaseException):
    """A case took too long."""


def run_recipe(number: int, seed: int, folder: Path, kept: dict[str, list[str]]) -> str:
    """Take one broken recipe as far as it goes; what was said of it."""
    draw = random.Random(f"recipe {seed} {number}")
    if not kept:
        kept.update(texts=recipe_texts(), keys=known_keys())
    body, words = recipe_case(draw, kept["texts"], kept["keys"])
    source: str | Path = folder / "recipe.toml"
    Path(source).write_bytes(body)
    if draw.random() < 0.01:
        source = draw.choice(
            [
                "",
                ".",
                "..toml",
                ".toml",
                "a\0.toml",
                "x" * 5000 + ".toml",
                "\udcff.toml",
                str(folder),
                "tiny\0",
                "/",
                "\udcff",
            ]
        )
    recipe = tables.load(source, tables.parse_words(words))
    recipe = tables.from_table(with_present_names(tables.to_table(recipe), recipe.method.name))
    Sites(recipe)
    again = folder / "again.toml"
    again.write_bytes(tables.to_toml(recipe).encode())
    # As text, since NaN is unlike itself; with sorted keys, since TOML writes tables after words.
    if _text(tables.load(again)) != _text(recipe):
        raise AssertionError("a recipe is another one after it is written and read")
    json.dumps(tables.to_table(recipe))
    return "taken"


def _text(recipe: Recipe) -> str:
    return json.dumps(tables.to_table(recipe), sort_keys=True)


def run_file(number: int, seed: int, folder: Path, kept: dict[str, object]) -> str:
    """Read one broken source as far as it goes; what was said of it."""
    draw = random.Random(f"file {seed} {number}")
    recipe = data_case(draw, folder)
    if not kept:
        kept["tokenizer"] = load_tokenizer(recipe.model)
    corpus = Corpus(recipe, lambda spec: kept["tokenizer"], warn=lambda text: None)
    layout(recipe.data.columns, corpus.rows.train, recipe.data.task)
    for client, share in enumerate(corpus.shares):
        for row in (*share.train, *share.test):
            corpus.renderer.key(row)
        corpus.train_examples(client)
        corpus.test_examples(client)
    corpus.public_examples()
    return "taken"


RUNS: dict[str, Callable[[int, int, Path, dict], str]] = {"recipe": run_recipe, "file": run_file}


@contextmanager
def clock(seconds: float) -> Iterator[None]:
    """Raises Hang in this process after `seconds`."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise Hang(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(kind: str, number: int, seed: int, kept: dict) -> tuple[str, str]:
    """("taken", ""), the kind of the refusal and its sentence, or "WRONG" and what came out instead."""
    try:
        with tempfile.TemporaryDirectory() as folder, clock(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return RUNS[kind](number, seed, Path(folder), kept), ""
    except KilofedError as error:
        text = str(error)
        if not text.strip() or len(text) > 20_000:
            return "WRONG", f"a sentence of {len(text)} characters: {text[:200]!r}"
        return type(error).__name__, text
    except (Exception, Hang, SystemExit):
        return "WRONG", traceback.format_exc()


def work(kind: str, numbers: range, seed: int) -> tuple[Counter[str], list[str], int]:
    """Counts of outcomes, what was wrong, and the growth of this process in bytes."""
    kept: dict = {}
    outcome(kind, -1, seed, kept)  # Loads what is loaded once.
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    size = int(Path("/proc/self/statm").read_text("utf-8").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))
    counts: Counter[str] = Counter()
    wrong = []
    for number in numbers:
        said, text = outcome(kind, number, seed, kept)
        counts[said] += 1
        if said == "WRONG":
            wrong.append(f"--case {kind}:{number} --seed {seed}\n{text}")
    return counts, wrong, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - held


def fuzz(kind: str, number: int, seed: int, workers: int) -> dict[str, object]:
    """All cases of one kind, spread over processes."""
    began, counts, wrong, growth = time.monotonic(), Counter[str](), [], 0
    batches = [(kind, range(start, min(start + BATCH, number)), seed) for start in range(0, number, BATCH)]
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, context) as pool:
        for some, texts, grown in pool.map(work, *zip(*batches, strict=True)):
            counts.update(some)
            wrong += texts
            growth = max(growth, grown)
    seconds = time.monotonic() - began
    return {"cases": number, "seconds": round(seconds), "growth": growth, "outcomes": dict(counts), "wrong": wrong}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a fiftieth of the cases")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--kind", choices=RUNS, help="only these")
    parser.add_argument("--case", help="run one case in this process and say what came of it, such as recipe:17")
    options = parser.parse_args()
    if options.case:
        kind, _, number = options.case.partition(":")
        print(*outcome(kind, int(number), options.seed, {}), sep="\n")
        return
    share = 50 if options.quick else 1
    chosen = {kind: number for kind, number in NUMBERS.items() if options.kind in (None, kind)}
    found = {kind: fuzz(kind, number // share, options.seed, options.workers) for kind, number in chosen.items()}
    if options.json:
        print(json.dumps(found))
    for kind, one in found.items():
        for text in one["wrong"][:40]:
            print(text, file=sys.stderr)
        if not options.json:
            outcomes = ", ".join(f"{number:,} {name}" for name, number in sorted(one["outcomes"].items()))
            print(f"{kind}: {one['cases']:,} cases in {one['seconds']} s, {len(one['wrong'])} wrong ({outcomes}); "
                  f"a process grew by at most {one['growth'] / 1e6:.0f} MB")  # fmt: skip
    if any(one["wrong"] for one in found.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
