"""Mutated messages against every decoder: what is refused is named, what is accepted keeps its promises.

    python benchmarks/robustness/fuzz.py [--quick] [--inputs N] [--seed N] [--workers N] [--json]

Honest messages of every kind (`messages.py`) are damaged (`message_damage.py`: flips, cuts, splices, lengths, headers,
numbers; checksums and lengths are right again in four of five, so that the inner decoder is reached) and decoded. Errors that
are no KilofedError, and accepted messages whose result is not what the decoder promises, are counted and printed with their
bytes.
An input is a function of the seed and its number: workers and their number change nothing.

Then the peak memory of refused bombs (`bombs.py`) against that of the honest message of the kind. The script fails on any
error, broken promise, or bomb above 2 times the honest peak.
"""

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from random import Random

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from bombs import MOST, Peak, peaks
from kilofed.errors import KilofedError
from message_damage import mutated
from messages import KINDS, BrokenPromise, Message, corpus

PER_CHUNK = 5_000
KEPT = 5
"""Failures of a chunk that are kept with their bytes."""
_corpora: dict[int, list[Message]] = {}


@dataclass
class Found:
    """What came of some inputs of one group."""

    group: str
    inputs: int = 0
    refused: int = 0
    unnamed: int = 0
    broken: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)

    def add(self, other: "Found") -> None:
        """Count `other` as well."""
        self.inputs += other.inputs
        self.refused += other.refused
        self.unnamed += other.unnamed
        self.broken += other.broken
        self.seconds += other.seconds
        self.failures = [*self.failures, *other.failures][:KEPT]


def chunk(task: tuple[int, int, int, int]) -> Found:
    """The inputs of one chunk: (number of the kind, number of the chunk, inputs, seed)."""
    number, place, inputs, seed = task
    kind = KINDS[number]
    messages = _corpora.get(number) or _corpora.setdefault(number, corpus(kind))
    rng, found = Random(f"{seed}/{number}/{place}"), Found(kind.group, inputs)
    start = time.perf_counter()
    for _ in range(inputs):
        body = mutated(rng, messages)
        try:
            kind.read(body)
        except KilofedError:
            found.refused += 1
        except BrokenPromise as error:
            found.broken += 1
            found.failures.append(f"{kind.group}: accepted, but {error}: {body.hex()[:2000]}")
        except Exception as error:
            found.unnamed += 1
            found.failures.append(f"{kind.group}: {type(error).__name__}: {error}: {body.hex()[:2000]}"[:4000])
    found.seconds = time.perf_counter() - start
    found.failures = found.failures[:KEPT]
    return found


def begin() -> None:
    """Prepare a process: a warning of numpy or torch is an error that is not named."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")


def tasks(inputs: int, seed: int) -> list[tuple[int, int, int, int]]:
    """Chunks of all groups in turn, `inputs` in all; kinds of one group share its part."""
    kinds = Counter(kind.group for kind in KINDS)
    todo = []
    for number, kind in enumerate(KINDS):
        first = [one.group for one in KINDS].index(kind.group)
        ours = number - first
        group = list(kinds).index(kind.group)
        of_group = inputs * (group + 1) // len(kinds) - inputs * group // len(kinds)
        share = of_group * (ours + 1) // kinds[kind.group] - of_group * ours // kinds[kind.group]
        full, rest = divmod(share, PER_CHUNK)
        todo += [(number, place, PER_CHUNK, seed) for place in range(full)]
        todo += [(number, full, rest, seed)] if rest else []
    return todo


def fuzz(inputs: int, *, seed: int = 0, workers: int = 1) -> dict[str, Found]:
    """What came of `inputs` mutated messages, by group."""
    total = {kind.group: Found(kind.group) for kind in KINDS}
    todo = tasks(inputs, seed)
    if workers == 1:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for task in todo:
                total[(found := chunk(task)).group].add(found)
        return total
    with multiprocessing.get_context("spawn").Pool(workers, begin) as pool:
        done = 0
        for found in pool.imap_unordered(chunk, todo):
            total[found.group].add(found)
            done += found.inputs
            if sys.stderr.isatty():
                print(f"\r{done:,} of {inputs:,}", end="", file=sys.stderr)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="100,000 inputs")
    parser.add_argument("--inputs", type=int, default=0, help="default: 10,000,000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    inputs = args.inputs or (100_000 if args.quick else 10_000_000)
    begin()
    memory, start = peaks(), time.perf_counter()
    groups = list(fuzz(inputs, seed=args.seed, workers=args.workers).values())
    wall = time.perf_counter() - start
    if args.json:
        print(json.dumps({"groups": [vars(one) for one in groups], "peaks": [vars(one) for one in memory]}))
    else:
        show(groups, memory, wall, args.seed, args.workers)
    for text in [failure for one in groups for failure in one.failures]:
        print(text, file=sys.stderr)
    if any(one.unnamed or one.broken for one in groups) or any(one.ratio > MOST for one in memory):
        raise SystemExit("there are errors without a name, broken promises or bombs that cost too much")


def show(groups: list[Found], memory: list[Peak], wall: float, seed: int, workers: int) -> None:
    """Print tables."""
    total = Found("all")
    for one in groups:
        total.add(one)
    print("| message | inputs | refused | accepted | errors without a name | broken promises | microseconds each |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for one in [*groups, total]:
        print(
            f"| {one.group} | {one.inputs:,} | {one.refused:,} | {one.inputs - one.refused - one.broken - one.unnamed:,} | "
            f"{one.unnamed:,} | {one.broken:,} | {1e6 * one.seconds / max(one.inputs, 1):.0f} |"
        )
    print(
        f"\nseed {seed}, {workers} workers, {wall:,.0f} s; Python {platform.python_version()}, torch {torch.__version__}\n"
    )
    print(
        "| message | bytes | what | peak, MB | honest bytes | honest peak, MB | times |\n|---|---:|---|---:|---:|---:|---:|"
    )
    for peak in memory:
        print(
            f"| {peak.group} | {peak.size:,} | {peak.what} | {peak.refused / 1e6:.2f} | {peak.honest_size:,} | "
            f"{peak.honest / 1e6:.2f} | {peak.ratio:.2f} |"
        )


if __name__ == "__main__":
    main()
