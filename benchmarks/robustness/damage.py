"""Damaged run folders: every file of a run, damaged in six ways, then resumed.

    python benchmarks/robustness/damage.py [--quick] [--json] [--seed N] [--log FILE]

A run that finished and one that was left after two of three rounds, of methods with state at clients, with noise, and of two
seeds. Each file is cut in half, has a bit flipped, is swapped with that of another run, is deleted, has two lines
swapped, or has a digit changed. Then the folder is read (as the report does), its adapter exported and its records
replayed where it is finished, and the run resumed. Right is: refused in a sentence that names the file; or repaired, which
is said with the file's name; or equal but for times, as if killed before that file was written; or never read, which are
earlier states of a client. Other bytes (or another epsilon) with exit 0 are wrong, and so is any error that is not
kilofed's. Each case runs in a forked child. --log keeps verdicts, so that a stopped run of this
script goes on.
"""

import argparse
import json
import logging
import random
import shutil
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

import kilofed
from kilofed.models import loading
from kilofed.reports import reading
from kilofed.runs import export, replay
from kilofed.runs.loop import Silent
from run_folders import RUNS, child, lasting, prepare, quiet, recipe

CHOSEN = ("kd", "fedkseed", "split", "fedavg with noise", "two seeds with noise")
KINDS = ("cut", "flip", "swap", "delete", "reorder", "digit")
RIGHT = ("refused", "repaired", "equal", "never read")


class Copying(Silent):
    """Copies a run's folder as it is after round two; of several seeds, of the last one."""

    def __init__(self, copy: Path) -> None:
        self._copy, self._folder = copy, copy

    def begin(self, folder: Path) -> None:
        self._folder = folder

    def round(self, number: int, total: int, metrics: Mapping[str, object]) -> None:
        if number == 2:
            shutil.rmtree(self._copy, ignore_errors=True)
            shutil.copytree(self._folder, self._copy, ignore=shutil.ignore_patterns("run.lock"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one case in ten")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seed", type=int, default=0, help="of the places that are damaged")
    parser.add_argument("--log", type=Path, help="verdicts so far, a line per case")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    args = parser.parse_args()
    quiet()
    with tempfile.TemporaryDirectory() as name:
        found = judged(prepare(Path(name)), args)
    table = Counter((one["kind"], one["verdict"]) for one in found)
    wrong = [one for one in found if one["verdict"] not in RIGHT]
    if args.json:
        print(json.dumps({"cases": len(found), "wrong": wrong, "table": [[*key, n] for key, n in table.items()]}))
    else:
        words = [*RIGHT, *sorted({verdict for _, verdict in table} - set(RIGHT))]
        print("| damage | cases | " + " | ".join(words) + " |\n|---|" + "---:|" * (len(words) + 1))
        for kind in KINDS:
            counts = [table[kind, word] for word in words]
            print(f"| {kind} | {sum(counts)} | " + " | ".join(map(str, counts)) + " |")
        print(f"\n{len(found)} cases, {len(wrong)} wrong")
        for one in wrong:
            print(f"{one['case']}: {one['verdict']}: {one['said']}")
    raise SystemExit(1 if wrong or not found else 0)


def judged(work: Path, args: argparse.Namespace) -> list[dict[str, str]]:
    """The verdict on every case."""
    known = {}
    if args.log and args.log.exists():
        known = {one["case"]: one for one in map(json.loads, args.log.read_text("utf-8").splitlines())}
    found = []
    for name in CHOSEN:
        folders = {"finished": (whole := made(work, name)), "left": whole.with_name(f"{whole.name}, left")}
        other = made(work, name, "other", seed=0 if "noise" in name else 7)  # Noise has another secret.
        honest = lasting(folders["finished"])
        weights = replayed(folders["finished"]) if name == "fedkseed" else ""
        for stage in ("finished", "left"):
            for file in sorted(path for path in folders[stage].rglob("*") if path.is_file()):
                for kind in KINDS:
                    inner = file.relative_to(folders[stage]).as_posix()
                    case = f"{name}, {stage}, {inner}, {kind}"
                    draw = zlib.crc32(f"{args.seed} {case}".encode())
                    if args.only not in case or (args.quick and draw % 10):
                        continue
                    if case not in known:
                        spoilt = Path(shutil.copytree(folders[stage], work / "spoilt"))
                        if damage(spoilt / inner, kind, other / inner, random.Random(draw)):
                            known[case] = {"case": case, "kind": kind} | verdict(spoilt, inner, honest, weights)
                            if args.log:
                                with args.log.open("a", encoding="utf-8") as log:
                                    log.write(json.dumps(known[case]) + "\n")
                        shutil.rmtree(spoilt)
                    if case in known:
                        found.append(known[case])
    return found


def made(work: Path, name: str, label: str = "whole", seed: int = 0) -> Path:
    """A run in a folder of its own, beside a copy of it (", left") as it was after its second round."""
    folder = work / f"{name}, {label}"

    def begin() -> dict[str, object]:
        kilofed.run(recipe(work, name, seed=seed), out=folder, watch=Copying(work / f"{folder.name}, left"))
        return {}

    answer = child(begin)[1]()
    assert not answer, answer
    return folder


def damage(path: Path, kind: str, other: Path, draw: random.Random) -> bool:
    """Damage one file; False where that changes nothing."""
    before = path.read_bytes()
    if kind == "delete":
        path.unlink()
        return True
    if kind == "swap":
        if not other.exists():
            return False
        path.write_bytes(other.read_bytes())
    elif kind == "cut":
        path.write_bytes(before[: len(before) // 2])
    elif kind == "flip":
        content = bytearray(before)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
    elif kind == "reorder":
        lines = before.splitlines(keepends=True)
        if len(lines) < 2:
            return False
        one = draw.randrange(len(lines) - 1)
        lines[one], lines[one + 1] = lines[one + 1], lines[one]
        path.write_bytes(b"".join(lines))
    else:
        places = [place for place, byte in enumerate(before) if 48 <= byte <= 57]
        if not places:
            return False
        content = bytearray(before)
        place = draw.choice(places)
        content[place] = 48 + (content[place] - 47) % 10
        path.write_bytes(content)
    return path.read_bytes() != before


def verdict(folder: Path, inner: str, honest: dict[str, str], weights: str) -> dict[str, str]:
    """What reading, exporting, replaying and resuming make of a damaged folder."""

    path = folder / inner
    # The newest that is left beside the one in hand, which may have been deleted.
    superseded = "clients/" in inner and any(other.name > path.name for other in path.parent.glob("round-*"))

    def work() -> dict[str, object]:
        said = Said()
        logging.getLogger("kilofed").addHandler(said)
        readers = [attempt(step) for step in steps(folder, honest, weights)]
        ended = attempt(lambda: kilofed.resume(folder) and "")
        return {"readers": readers, "ended": ended, "said": said.lines}

    answer = child(work)[1]()
    if "crash" in answer:
        return {"verdict": "crash", "said": str(answer["crash"])[-600:]}
    readers, ended = answer["readers"], str(answer["ended"])
    assert isinstance(readers, list)
    text = "\n".join([ended, *map(str, answer["said"])])  # type: ignore[call-overload]
    if bad := [one for one in [*readers, ended] if one.startswith("unnamed") or one == "other bytes"]:
        return {"verdict": "unnamed error" if bad[0] != "other bytes" else "a reader gave other bytes", "said": bad[0]}
    names_file = Path(inner).name in text or ("seed-" in inner and inner.split("/")[0] in text and "recipe" in inner)
    if ended:
        return {"verdict": "refused" if names_file else "refused without the file's name", "said": text}
    now = lasting(folder)
    wrong = sorted(name for name in {*now, *honest} if now.get(name) != honest.get(name))
    if superseded and wrong in ([], [inner]):
        return {"verdict": "never read", "said": text}
    if wrong:
        return {"verdict": "OTHER BYTES", "said": f"{wrong} {text}"}
    if inner.endswith("report.html"):
        return {"verdict": "repaired", "said": "made anew with every resume"}
    return {"verdict": "repaired" if names_file else "equal", "said": text}


class Said(logging.Handler):
    """Keeps what was logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def attempt(step: Callable[[], object]) -> str:
    """ "" if it went well; a refusal's sentence; an error that has no name of kilofed's; or what the step itself says."""
    try:
        return str(step() or "")
    except kilofed.KilofedError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"unnamed {type(error).__name__}: {error}"


def steps(folder: Path, honest: dict[str, str], weights: str) -> list[Callable[[], object]]:
    """What is done with a run beside resuming it; each gives "other bytes" where it believed damage."""

    def exported() -> str:
        out = folder.with_name("exported")
        shutil.rmtree(out, ignore_errors=True)
        export.adapter(folder, out)
        first = "seed-0/" if any(name.startswith("seed-0/") for name in honest) else ""
        ours = {f"{first}adapter/{name}": digest for name, digest in lasting(out).items()}
        return "" if all(honest[name] == digest for name, digest in ours.items()) else "other bytes"

    def again() -> str:
        return "" if replayed(folder) == weights else "other bytes"

    return [lambda: reading.read(folder) and "", exported, *([again] if weights else [])]


def replayed(folder: Path) -> str:
    """Digest of the weights after round 2."""
    weights = loading.read_trained(replay.replay(folder, round=2).model)
    return str(zlib.crc32(b"".join(weights[name].contiguous().numpy().tobytes() for name in sorted(weights))))


if __name__ == "__main__":
    began = time.monotonic()
    torch.set_num_threads(1)
    assert set(CHOSEN) <= set(RUNS)
    main()
