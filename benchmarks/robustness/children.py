"""Runs tests on a changed module in forked children of a parent that has the large libraries imported."""

import contextlib
import gc
import importlib.abc
import importlib.machinery
import importlib.util
import io
import json
import math
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import NoReturn

import pytest

import mutations
from named import Named

TraceFunction = Callable[[FrameType, str, object], object]
MOST_MEMORY = 24 * 2**30
"""Address space of a child, in bytes."""


@dataclass(frozen=True)
class Job:
    """One mutant and the tests that it meets."""

    mutant: mutations.Mutant
    module: str
    tests: Sequence[str]
    limit: float
    """Seconds of the processor; ten times as many may pass."""
    change: int | Named
    """The mutant's number, or a change of the text."""


@dataclass(frozen=True)
class Outcome:
    """What came of it."""

    word: str
    seconds: float
    by: str = ""


@dataclass(frozen=True)
class Baseline:
    """What the tests of a module reach, and how long each takes."""

    seconds: dict[str, float]
    lines: dict[str, set[int]]
    """Lines of the module that each test runs."""
    on_import: set[int] = field(default_factory=set)
    """Lines that run while the module is imported."""


def warm(copy: Path) -> None:
    """Import kilofed and its libraries from `copy`, and forget kilofed: each child imports it with its own change."""
    for name, value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "FLWR_TELEMETRY_ENABLED": "0"}.items():
        os.environ.setdefault(name, value)
    os.chdir(copy)
    sys.path[:0] = [str(copy), str(copy / "src")]
    os.environ["PYTHONPATH"] = str(copy / "src")
    import hypothesis
    import peft.tuners.lora
    import torch
    import transformers.models.bert.modeling_bert
    import transformers.models.llama.modeling_llama

    import kilofed.cli
    import kilofed.runs.compare
    import kilofed.runs.loop

    del hypothesis, peft, transformers
    assert Path(kilofed.__file__).is_relative_to(copy), f"kilofed was imported from {kilofed.__file__}"
    torch.set_num_threads(1)
    for name in [name for name in sys.modules if name.partition(".")[0] == "kilofed"]:
        del sys.modules[name]
    gc.collect()
    gc.freeze()


def baseline(copy: Path, module: str, tests: Sequence[str]) -> Baseline:
    """Run `tests` without a change; those that fail are left out, which is said. Raises RuntimeError: none passes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "baseline.json"
        pid = os.fork()
        if not pid:
            _watch(copy, module, tests, out)
        _, status = os.waitpid(pid, 0)
        if not out.exists():
            raise RuntimeError(f"the tests of {module} do not run without any change: {status}")
        seconds, lines, failed = json.loads(out.read_text("utf-8"))
    for test in failed:
        print(f"  left out, since it fails without any change: {test}", file=sys.stderr, flush=True)
        lines.pop(test, None)
    if not lines.keys() - {""}:
        raise RuntimeError(f"no test of {module} passes without any change")
    on_import = set(lines.pop("", []))
    return Baseline(seconds, {test: set(found) for test, found in lines.items()}, on_import)


def _watch(copy: Path, module: str, tests: Sequence[str], out: Path) -> NoReturn:
    code = 1
    try:
        watcher = _Watcher(copy / "src" / "kilofed" / f"{module}.py")
        code = _tests(copy, tests, [watcher], first=False)
        lines = {test: sorted(found) for test, found in watcher.lines.items()}
        out.write_text(json.dumps([watcher.seconds, lines, sorted(watcher.failed)]), "utf-8")
    finally:
        os._exit(code)


def run(copy: Path, jobs: Sequence[Job], workers: int) -> Iterator[tuple[Job, Outcome]]:
    """What came of each job, as they end."""
    waiting = list(reversed(jobs))
    running: dict[int, tuple[Job, Path, float]] = {}
    while waiting or running:
        while waiting and len(running) < workers:
            job = waiting.pop()
            pid, folder = _start(copy, job)
            running[pid] = job, folder, time.monotonic()
        time.sleep(0.02)
        for pid, (job, folder, began) in list(running.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            seconds = time.monotonic() - began
            if not done and seconds < 10 * job.limit:
                continue
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            if not done:
                os.waitpid(pid, 0)
            by = (folder / "by").read_text("utf-8") if (folder / "by").exists() else ""
            shutil.rmtree(folder, ignore_errors=True)
            del running[pid]
            yield job, Outcome(_word(os.waitstatus_to_exitcode(status) if done else -signal.SIGXCPU), seconds, by)


def _word(code: int) -> str:
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return "too slow"
    return "killed" if code else "survived"


def _start(copy: Path, job: Job) -> tuple[int, Path]:
    folder = Path(tempfile.mkdtemp(prefix="kilofed-mutant-"))
    pid = os.fork()
    if pid:
        return pid, folder
    code = 1
    try:
        os.setpgid(0, 0)
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
        seconds = math.ceil(time.process_time() + job.limit)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        path = copy / "src" / "kilofed" / f"{job.module}.py"
        sys.meta_path.insert(0, _Changed(job.module, path, _code(path, job.change)))
        code = _tests(copy, job.tests, [_Killer(folder / "by")], first=True)
    finally:
        os._exit(code)


def _code(path: Path, change: int | Named) -> CodeType:
    source = path.read_text("utf-8")
    if isinstance(change, Named):
        return compile(change.applied(source), str(path), "exec")
    return mutations.code_of(source, str(path), change)


def _tests(copy: Path, tests: Sequence[str], plugins: list[object], *, first: bool) -> int:
    """Pytest's exit status."""
    words = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(copy), "--strict-markers"]
    # What the parent has imported cannot be rewritten: its assertions are not those of the tests.
    words += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    words += ["--tb=line", "-x"] if first else []
    words += [] if first else ["-m", "not slow"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = int(pytest.main([*words, *tests], plugins=plugins))
    return code


class _Changed(importlib.abc.MetaPathFinder, importlib.machinery.SourceFileLoader):
    """Finds one module of kilofed, and gives the changed code for it."""

    def __init__(self, module: str, path: Path, code: CodeType) -> None:
        self._wanted = "kilofed." + module.replace("/", ".")
        super().__init__(self._wanted, str(path))
        self._code = code

    def find_spec(
        self, fullname: str, path: object = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._wanted:
            return None
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self)

    def get_code(self, fullname: str) -> CodeType:
        return self._code


class _Killer:
    """Writes down which test failed."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self._path.exists():
            self._path.write_text(report.nodeid, "utf-8")


class _Watcher:
    """Takes down the lines of one file that each test runs, and its seconds."""

    def __init__(self, path: Path) -> None:
        self._path, self._method = str(path), path.stem
        self._now: set[int] = set()
        self.lines: dict[str, set[int]] = {"": self._now}
        self.seconds: dict[str, float] = {}
        self.failed: set[str] = set()
        sys.settrace(self._call)

    def _call(self, frame: FrameType, event: str, argument: object) -> TraceFunction | None:
        return self._line if frame.f_code.co_filename == self._path else None

    def _line(self, frame: FrameType, event: str, argument: object) -> TraceFunction | None:
        self._now.add(frame.f_lineno)
        return self._line

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note who fails."""
        if report.failed:
            self.failed.add(report.nodeid)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Of the tests of all methods, keep those of this one."""
        items[:] = [
            item
            for item in items
            if item.path.name != "test_all.py" or item.callspec.params.get("name") == self._method  # type: ignore[attr-defined]
        ]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._now = self.lines.setdefault(item.nodeid, set())
        began = time.process_time()
        sys.settrace(self._call)
        try:
            return (yield)
        finally:
            self.seconds[item.nodeid] = time.process_time() - began

    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        # What tests share must be made again by each, or the lines behind it would be counted to the first only.
        shared = getattr(item, "funcargs", {}).get("finished")
        if isinstance(shared, dict):
            shared.clear()
