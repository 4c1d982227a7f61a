"""Runs that are killed and resumed, and runs whose disk is full: equal bytes in the end.

    python benchmarks/robustness/kills.py [--kills 200] [--disks 12] [--quick] [--json] [--seed N] [--log FILE]

Every method on every engine, three rounds of three unequal clients. A kill is SIGKILL of the run's process at a random
instant, or inside its n-th write, fsync or rename; of one worker process; or of the whole process group. Then the run is
resumed until it ends (up to three kills in one run). Where a worker was killed under on_failure=stop, the run may end in
one of kilofed's named errors first. State, adapter, client states, ledger, metrics and results (without their times) must
be those of a run that was left alone, in process.

A full disk is a file system of memory of a given size, where mounting is allowed, else a limit on the size of a file: the
run must end in a named error, and with room again resume to equal bytes. --log keeps what was found, so that a stopped run
of this script goes on.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import kilofed
from run_folders import METHODS, RUNS, child, lasting, prepare, quiet, recipe

RECIPES = ("recipe.toml", "run.json")
"""They say which engine it was."""
CALLS = ("write", "fsync", "replace")
ENGINES = {"inprocess": 0.75, "pool": 0.12, "stream": 0.1, "flower": 0.03}
"""Share of the kills that each engine gets."""
DISKS = ("fedavg", "kd", "fedkseed", "split")
Result = dict[str, object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--disks", type=int, default=12, help="sizes of a full disk")
    parser.add_argument("--quick", action="store_true", help="ten kills, two disks, without Flower")
    parser.add_argument("--engines", default=",".join(ENGINES), help="which of them; empty for full disks alone")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="what was found so far, a line per run")
    args = parser.parse_args()
    if args.quick:
        args.kills, args.disks, args.engines = 10, 2, args.engines.replace(",flower", "")
    quiet()
    with tempfile.TemporaryDirectory() as name:
        found = list(judged(prepare(Path(name)), args))
    kills = sum(int(str(one["hits"])) for one in found if one["engine"] != "disk")
    wrong = [one for one in found if one["verdict"] not in ("equal", "named, then equal")]
    if args.json:
        print(json.dumps({"kills": kills, "runs": len(found), "wrong": wrong}))
    else:
        table(found)
        print(f"\n{kills} kills, {sum(one['engine'] == 'disk' for one in found)} full disks, {len(wrong)} wrong")
        for one in wrong:
            print(f"{one['case']}: {one['verdict']}: {one['said']}")
    raise SystemExit(1 if wrong or not found else 0)


def table(found: list[Result]) -> None:
    """Print what became of the runs, by engine."""
    print("| engine | runs | kills | equal | named, then equal | wrong |\n|---|---:|---:|---:|---:|---:|")
    for engine in [*ENGINES, "disk"]:
        rows = [one for one in found if one["engine"] == engine]
        words = Counter(one["verdict"] for one in rows)
        right = words["equal"] + words["named, then equal"]
        hits = sum(int(str(one["hits"])) for one in rows) if engine != "disk" else 0
        print(
            f"| {engine} | {len(rows)} | {hits} | {words['equal']} | {words['named, then equal']} | {len(rows) - right} |"
        )


def judged(work: Path, args: argparse.Namespace) -> Iterator[Result]:
    """Every run and what became of it."""
    known: dict[str, Result] = {}
    if args.log and args.log.exists():
        known = {one["case"]: one for one in map(json.loads, args.log.read_text("utf-8").splitlines())}
    honest: dict[str, tuple[dict[str, str], float, dict[str, int]]] = {}

    def reference(name: str) -> tuple[dict[str, str], float, dict[str, int]]:
        if name not in honest:
            honest[name] = left_alone(work, name)
        return honest[name]

    for engine, share in ENGINES.items():
        if engine not in args.engines.split(","):
            continue
        hits, number, wanted = 0, 0, max(2, round(share * args.kills))
        while hits < wanted and number < 10 * wanted:
            names = list(RUNS) if engine == "inprocess" else list(METHODS)
            case = f"{engine}, {names[number % len(names)]}, {number}, seed {args.seed}"
            if case not in known:
                known[case] = {"case": case, "engine": engine} | survived(
                    work, names[number % len(names)], engine, random.Random(case), reference
                )
                note(args.log, known[case])
            hits, number = hits + int(str(known[case]["hits"])), number + 1
            yield known[case]
    for number in range(args.disks):
        name = DISKS[number % len(DISKS)]
        case = f"disk, {name}, {number}"
        if case not in known:
            whole = reference(name)[0]
            share = (number + 1) / (args.disks + 1)
            known[case] = {"case": case, "engine": "disk", "hits": 0} | full(work, name, share, whole)
            note(args.log, known[case])
        yield known[case]


def note(log: Path | None, one: Result) -> None:
    if log:
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(one) + "\n")


def own_words(name: str) -> dict[str, object]:
    """A stated secret where there is noise: runs with their own are not equal."""
    return {"privacy.noise_key": "ab" * 16} if "noise" in name else {}


def left_alone(work: Path, name: str) -> tuple[dict[str, str], float, dict[str, int]]:
    """What a run in process comes to, its seconds, and how often it writes."""
    folder = work / f"whole {name}"
    began = time.monotonic()
    answer = child(lambda: go(folder, work, name, "inprocess"))[1]()
    assert "calls" in answer, answer
    return lasting(folder, RECIPES), time.monotonic() - began, answer["calls"]  # type: ignore[return-value]


def survived(
    work: Path,
    name: str,
    engine: str,
    draw: random.Random,
    reference: Callable[[str], tuple[dict[str, str], float, dict[str, int]]],
) -> Result:
    """Kill a run up to three times, and let it end."""
    whole, seconds, calls = reference(name)
    folder, hits, named = work / "killed", 0, []
    seconds = seconds if engine == "inprocess" else 6 * seconds + 20
    for _ in range(draw.randint(1, 3)):
        answer, hit = killed(folder, work, name, engine, draw, seconds, calls)
        hits += hit
        if "named" in answer:
            named.append(str(answer["named"]))
        elif answer:  # It ended, before it could be killed or in spite of it.
            break
    answer = child(lambda: go(folder, work, name, engine))[1]()
    verdict, said = compared(answer, folder, whole)
    shutil.rmtree(folder, ignore_errors=True)
    return {
        "hits": hits,
        "verdict": f"named, then {verdict}" if named and verdict == "equal" else verdict,
        "said": said,
    }


def compared(answer: Result, folder: Path, whole: dict[str, str]) -> tuple[str, str]:
    if "calls" not in answer:
        return ("ended in an error" if "named" in answer else "CRASH"), str(answer)[-800:]
    now = lasting(folder, RECIPES)
    wrong = sorted(name for name in {*now, *whole} if now.get(name) != whole.get(name))
    return ("OTHER BYTES", str(wrong)) if wrong else ("equal", "")


def killed(
    folder: Path, work: Path, name: str, engine: str, draw: random.Random, seconds: float, calls: dict[str, int]
) -> tuple[Result, bool]:
    """Run or resume, and kill; what the run said if it lived, and whether a kill hit."""
    kind = draw.choice(["instant", *CALLS]) if engine == "inprocess" else draw.choice(["instant", "worker", "group"])
    if kind in CALLS:
        number = draw.randint(1, max(1, calls[kind]))
        answer = child(lambda: go(folder, work, name, engine, kind, number))[1]()
        return answer, not answer
    pid, wait = child(lambda: go(folder, work, name, engine), group=True)
    until = time.monotonic() + draw.uniform(0, 0.8) * seconds
    while time.monotonic() < until and alive(pid):
        time.sleep(0.01)
    hit = False
    with contextlib.suppress(ProcessLookupError):
        if kind == "group":
            os.killpg(pid, signal.SIGKILL)
        elif kind == "instant":
            os.kill(pid, signal.SIGKILL)
        elif workers := below(pid):
            os.kill(draw.choice(workers), signal.SIGKILL)
            hit = True
    answer = wait()
    return answer, hit or not answer


def alive(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def below(pid: int) -> list[int]:
    """The worker processes of a run that are up, helpers of multiprocessing left out."""
    found = []
    for child_pid in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with contextlib.suppress(FileNotFoundError):
            words = Path(f"/proc/{child_pid}/cmdline").read_text()
            found += [int(child_pid)] if "resource_tracker" not in words else []
    return found


def go(folder: Path, work: Path, name: str, engine: str, call: str = "", number: int = 0) -> Result:
    """The child: run or resume; dies by its own hand inside the call `call` with that number."""
    calls: Counter[str] = Counter()
    fsync, replace = os.fsync, os.replace
    durable = {str(file.resolve()): file.stat().st_size for file in folder.rglob("*") if file.is_file()}

    def counted(what: str) -> bool:
        calls[what] += 1
        return call == what and number == calls[what]

    def dying_fsync(handle: int) -> None:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            return fsync(handle)
        file, size = os.readlink(f"/proc/self/fd/{handle}"), os.fstat(handle).st_size
        if counted("write"):  # Half of what no fsync has covered yet reached the disk.
            os.ftruncate(handle, (durable.get(file, 0) + size) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(handle)
        durable[file] = size
        if counted("fsync"):
            os.kill(os.getpid(), signal.SIGKILL)
        return None

    def dying_replace(source: str, target: str) -> None:
        replace(source, target)
        durable[str(Path(target).resolve())] = Path(target).stat().st_size
        if counted("replace"):
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync, os.replace = dying_fsync, dying_replace  # type: ignore[assignment]
    try:
        if (folder / "run.json").exists():
            kilofed.resume(folder)
        else:
            words = {"engine.name": engine, "engine.workers": 2, **own_words(name)}
            kilofed.run(recipe(work, name, **words), out=folder)
    except kilofed.KilofedError as error:
        return {"named": f"{type(error).__name__}: {error}"}
    return {"calls": dict(calls)}


def full(work: Path, name: str, share: float, whole: dict[str, str]) -> Result:
    """A run on a disk that holds that share of what the run needs, and which then gets room."""
    needs = sum(-(-path.stat().st_size // 4096) or 1 for path in (work / f"whole {name}").rglob("*"))
    size = 4096 * max(2, int(share * needs))
    mounted = work / f"disk {name} {share}"
    mounted.mkdir()
    folder = mounted / "run"
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mounted)]
    has_disk = subprocess.run(command, capture_output=True, check=False).returncode == 0
    most = 0 if has_disk else int(3000 * share)
    try:
        first = child(lambda: limited(most, lambda: go(folder, work, name, "inprocess")))[1]()
        if has_disk:
            subprocess.run(["mount", "-o", "remount,size=64m", str(mounted)], check=True)
        answer = child(lambda: go(folder, work, name, "inprocess"))[1]()
        verdict, said = compared(answer, folder, whole)
    finally:
        if has_disk:
            subprocess.run(["umount", "-l", str(mounted)], check=True)
    if "crash" in first:
        return {"verdict": "CRASH", "said": str(first["crash"])[-800:]}
    if verdict == "equal" and "named" in first:
        return {"verdict": "named, then equal", "said": f"{size} bytes: {first['named']}"}
    return {"verdict": verdict if verdict != "equal" else "equal", "said": said or "the disk was large enough"}


def limited(most: int, work: Callable[[], Result]) -> Result:
    """`work` where no file may grow beyond `most` bytes; 0 for no limit."""
    if most:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    return work()


if __name__ == "__main__":
    main()
