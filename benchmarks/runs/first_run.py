"""The first thing a stranger does: how long does `make run` take, how much memory, and did the model learn?

Full: clones this repository into an empty folder, runs `make run` there (the package index or its cache must answer),
then repeats the recipe with three seeds. Quick: runs the recipe once in this environment.

    python benchmarks/runs/first_run.py [--quick] [--json]
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute on an idle machine")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        if not options.quick:
            clone = Path(folder) / "clone"
            subprocess.run(["git", "clone", "--quiet", str(HERE), str(clone)], check=True)
            began = time.perf_counter()
            subprocess.run(["make", "run"], cwd=clone, check=True, stdout=subprocess.DEVNULL)
            found["make_run_seconds"] = round(time.perf_counter() - began, 1)
        began = time.perf_counter()
        one = run(["tiny"], Path(folder) / "one")
        found["run_seconds"] = round(time.perf_counter() - began, 1)
        found["peak_memory_mib"] = round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
        found["one_seed"] = summary(one)
        if not options.quick:
            found["three_seeds"] = summary(run(["tiny", "seeds=3"], Path(folder) / "three"))
    if options.json:
        print(json.dumps(found))
        return
    if "make_run_seconds" in found:
        print(f"make run from a clean clone   {found['make_run_seconds']} s   (wanted: under 300)")
    print(f"the run itself                {found['run_seconds']} s   (wanted: under 90)")
    print(f"peak memory                   {found['peak_memory_mib']} MiB   (wanted: under 2048)")
    for name in ("one_seed", "three_seeds"):
        if name in found:
            print(f"{name}: {found[name]}")


def run(words: list[str], out: Path) -> dict[str, object]:
    """Run a recipe through the command line and return what `--json` printed."""
    kilofed = Path(sys.executable).parent / "kilofed"
    done = subprocess.run(
        [str(kilofed), "run", *words, "--json", "--out", str(out)],
        check=True,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return json.loads(done.stdout)


def summary(results: dict[str, object]) -> dict[str, object]:
    """Losses with intervals, and the share of base to centralized that the federation closes."""
    rows = results["rows"]
    losses = {name: {"loss": round(row["loss"], 4), "interval": row["interval"]} for name, row in rows.items()}
    return {"rows": losses, "closed": round(results["closed"], 3), "verdict": results["verdict"]}


if __name__ == "__main__":
    main()
