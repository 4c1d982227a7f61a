"""Do the tests notice a mistake? One small change after the other is made to a module, and its tests are run.

    python benchmarks/robustness/mutants.py --quick                      # a few mutants of two small modules
    python benchmarks/robustness/mutants.py --modules federation/sums --all
    python benchmarks/robustness/mutants.py --sample 30 --seed 0         # of every module in tests_of.toml
    python benchmarks/robustness/mutants.py --named                      # mistakes that once lived, made by hand

A mutant is killed if a test fails, and survives if all pass. Sources and tests are copied first and changed in memory: the
checkout stays as it is, and may be edited meanwhile. A warm parent has the large libraries imported and forks a child per
mutant. A first run without a change tells which tests reach which lines and how long each takes; a mutant meets those
that reach its line, the module's own tests first, then the quickest. equal_mutants.toml lists, with reasons, mutants that
mean the same as the source; they do not count. POSIX only.
"""

import argparse
import ast
import contextlib
import json
import os
import random
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import children
import mutations
from children import Baseline, Job, Outcome
from named import NAMED, Named

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
QUICK = ("federation/sums", "files")


@dataclass(frozen=True)
class Told:
    """What came of one mutant."""

    module: str
    line: int
    where: str
    kind: str
    change: str
    outcome: str
    """killed, survived, unreached (no test comes to its line) or too slow (which counts as killed)."""
    seconds: float
    by: str = ""
    """The test that failed."""


def main() -> None:
    options = _options()
    tests_of: dict[str, list[str]] = tomllib.loads((HERE / "tests_of.toml").read_text("utf-8"))["tests"]
    with _copy() as copy:
        children.warm(copy)
        if options.named:
            found = _run_named(copy, options)
        else:
            modules = options.modules or (QUICK if options.quick else sorted(tests_of))
            found = [told for module in modules for told in _run_module(copy, module, tests_of[module], options)]
    if options.json:
        print(json.dumps([asdict(told) for told in found], indent=1))
    else:
        _print_table(found, options)
    sys.stdout.flush()
    os._exit(0)  # Nothing is left to do, and some libraries complain at length on their way out.


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--modules", nargs="*", help="such as federation/sums; default: all of tests_of.toml")
    parser.add_argument("--sample", type=int, default=20, help="mutants of each module, drawn by --seed")
    parser.add_argument("--all", action="store_true", help="every mutant")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="children at a time")
    parser.add_argument(
        "--timeout", type=float, default=20.0, help="processor seconds beyond five times what its tests take"
    )
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of other modules' tests for one mutant")
    parser.add_argument("--quick", action="store_true", help="five mutants of two small modules")
    parser.add_argument("--named", action="store_true", help="the mistakes that once lived, each by its name")
    parser.add_argument("--only", default="", help="mutants whose function or change holds this text")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.sample = min(options.sample, 5)
    return options


@contextlib.contextmanager
def _copy() -> Iterator[Path]:
    """A copy of sources and tests."""
    with tempfile.TemporaryDirectory(prefix="kilofed-mutants-") as folder:
        copy = Path(folder)
        skip = shutil.ignore_patterns("__pycache__")
        for part in ("src", "tests", "docs"):
            shutil.copytree(ROOT / part, copy / part, ignore=skip)
        shutil.copy(ROOT / "pyproject.toml", copy)
        yield copy


def _run_module(copy: Path, module: str, tests: list[str], options: argparse.Namespace) -> list[Told]:
    path = copy / "src" / "kilofed" / f"{module}.py"
    every = [m for m in mutations.mutants(ast.parse(path.read_text("utf-8"))) if not _means_the_same(module, m)]
    chosen = [m for m in every if options.only in f"{m.where} {m.change}"]
    if not options.all and len(chosen) > options.sample:
        drawn = random.Random(f"{options.seed}/{module}").sample(chosen, options.sample)
        chosen = sorted(drawn, key=lambda mutant: mutant.number)
    own = str(Path("tests", module).with_name(f"test_{Path(module).name}.py"))
    baseline = children.baseline(copy, module, [own, *(f"tests/{one}" for one in tests)])
    jobs, found = [], []
    for mutant in chosen:
        selected = _selected(baseline, own, mutant, options.budget)
        if not selected:
            found.append(_told(module, mutant, Outcome("unreached", 0.0)))
            continue
        limit = options.timeout + 5 * sum(baseline.seconds[test] for test in selected)
        jobs.append(Job(mutant, module, selected, limit, mutant.number))
    for job, outcome in children.run(copy, jobs, options.workers):
        found.append(_told(module, job.mutant, outcome))
        if outcome.word == "survived":
            print(f"  lives: {_line(found[-1])}", file=sys.stderr, flush=True)
    for told in found:
        if told.outcome == "unreached":
            print(f"  unreached: {_line(told)}", file=sys.stderr, flush=True)
    _say(module, len(every), found)
    return sorted(found, key=lambda told: told.line)


def _selected(baseline: Baseline, own: str, mutant: mutations.Mutant, budget: float) -> list[str]:
    """Tests that come to the mutant's line: the module's own, then the quickest of others within `budget` seconds."""
    reached = [test for test, lines in baseline.lines.items() if lines & {mutant.line, mutant.statement}]
    if not mutant.where or mutant.line in baseline.on_import:
        # What runs on import may be read by tests that run nothing else of the module.
        reached = [test for test, lines in baseline.lines.items() if lines or test.startswith(f"{own}::")]
    seconds = baseline.seconds
    order = sorted(reached, key=lambda test: (not test.startswith(f"{own}::"), seconds[test]))
    left = budget
    selected: list[str] = []
    for test in order:
        if not test.startswith(f"{own}::"):
            left -= seconds[test]
        if left >= 0 or not selected:
            selected.append(test)
    return selected


def _told(module: str, mutant: mutations.Mutant, outcome: Outcome) -> Told:
    return Told(
        module,
        mutant.line,
        mutant.where,
        mutant.kind,
        mutant.change,
        outcome.word,
        round(outcome.seconds, 2),
        outcome.by,
    )


def _means_the_same(module: str, mutant: mutations.Mutant) -> bool:
    listed = tomllib.loads((HERE / "equal_mutants.toml").read_text("utf-8")).get(module, {})
    here = listed.get(mutant.where or "module", {})
    return mutant.change in here or f"{mutant.change.partition(' -> ')[0]} -> *" in here


def _run_named(copy: Path, options: argparse.Namespace) -> list[Told]:
    """The mistakes in `named.py`; each is met by the tests that it names."""
    jobs, found = [], []
    for one in NAMED:
        if options.only in one.name:
            jobs.append(Job(_as_mutant(copy, one), one.module, [f"tests/{test}" for test in one.tests], 600.0, one))
    for job, outcome in children.run(copy, jobs, options.workers):
        found.append(_told(job.module, job.mutant, outcome))
        print(f"{outcome.word}: {job.mutant.where} ({outcome.by})", file=sys.stderr, flush=True)
    return found


def _as_mutant(copy: Path, one: Named) -> mutations.Mutant:
    source = (copy / "src" / "kilofed" / f"{one.module}.py").read_text("utf-8")
    return mutations.Mutant(
        0, one.line(source), one.line(source), one.name, "named", one.before.strip().partition("\n")[0]
    )


def _line(told: Told) -> str:
    return f"{told.module}.py:{told.line} {told.where or 'module'}: {told.change}"


def _say(module: str, num: int, found: list[Told]) -> None:
    killed = sum(told.outcome in ("killed", "too slow") for told in found)
    print(f"{module}: {killed} of {len(found)} killed; it has {num}", file=sys.stderr, flush=True)


def _print_table(found: list[Told], options: argparse.Namespace) -> None:
    print(f"{'module':24} {'mutants':>7} {'killed':>6} {'survived':>8}")
    for module in [*sorted({told.module for told in found}), "all"]:
        mine = [told for told in found if module in (told.module, "all")]
        killed = sum(told.outcome in ("killed", "too slow") for told in mine)
        share = f"{killed / len(mine):6.1%}" if mine else ""
        print(f"{module:24} {len(mine):7} {killed:6} {len(mine) - killed:8} {share}")
    for told in found:
        if told.outcome in ("survived", "unreached"):
            print(f"{told.outcome}: {_line(told)}")
    if options.named:
        for told in found:
            print(f"{told.outcome}: {told.where} ({told.by})")


if __name__ == "__main__":
    main()
