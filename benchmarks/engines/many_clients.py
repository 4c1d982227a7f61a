"""What does a client cost whose local work is empty? A round of 100, 1,000 and 10,000, by engine.

The payload is one LoRA (rank 8) of a small model. Asking, answering, counting, decoding and adding are those of every
run; states and ledger lie on the disk. "fresh" is a client that sends copies of the tensors instead of themselves.
Engines take turns round by round after a first round each, in which processes start; a time is the median of the rest.
"grows" is this process's peak of resident memory in a round above its level at the round's start, the largest of all
rounds.

    python benchmarks/engines/many_clients.py [--quick] [--json] [--model DIR] [--skip flower]
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from pathlib import Path

import torch

from kilofed.config import tables
from kilofed.config.fields import Value
from kilofed.config.recipe import Recipe
from kilofed.engines import open_engine
from kilofed.federation.cohort import Cohort
from kilofed.federation.ledger import Ledger
from kilofed.payload import Payload
from kilofed.runs.sites import Sites

os.environ["KILOFED_TRUST"] = "outside.echo"  # Its clients run code that kilofed does not bring.

Case = tuple[str, str, bool, int, int]
"""(engine, adapter targets, fresh, number of clients, rounds)."""

QUICK: list[Case] = [
    ("inprocess", "all-linear", False, 100, 9),
    ("inprocess", "all-linear", False, 1000, 5),
    ("inprocess", "all-linear", False, 10_000, 1),
    ("pool", "all-linear", False, 1000, 3),
    ("flower", "all-linear", False, 100, 3),
]
FULL: list[Case] = [(*case[:4], 2 * case[4] + 1) for case in QUICK] + [
    ("inprocess", "all-linear", True, 1000, 7),
    ("inprocess", "q_proj v_proj", False, 1000, 7),
    ("pool", "all-linear", False, 100, 11),
]
LAST: list[Case] = [("flower", "all-linear", False, 1000, 3)]
"""By itself: one process holds one simulation at a time."""


class Bench:
    """One engine, one payload, one number of clients."""

    def __init__(self, case: Case, folder: Path, model: str) -> None:
        self.case = case
        self.recipe = recipe_for(case, folder, model)
        self.sites = Sites(self.recipe, folder / "clients")
        spec = self.recipe
        self.server = self.sites.server()
        self.sites.method.setup(self.server)
        self.ledger = Ledger(folder / "ledger.jsonl")
        text = json.dumps(tables.to_table(spec))
        self.engine = open_engine(spec.engine, self.sites.client_ids(), text, folder / "clients", self.sites.handle)
        self.seconds: list[float] = []
        self.growth = 0

    def round(self) -> None:
        """One round, timed."""
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # The peak starts at the present level.
        since = time.perf_counter()
        self.server.round += 1
        ids, number = self.engine.client_ids(), self.server.round
        cohort = Cohort(ids, self.engine, self.ledger, self.sites.policy, round=number)
        self.sites.method.round(self.server, cohort)
        self.seconds.append(time.perf_counter() - since)
        assert not cohort.failures
        self.growth = max(self.growth, resident("VmHWM") - before)

    def row(self) -> dict[str, str | int | float | bool]:
        """What was measured."""
        engine, targets, fresh, num_clients, _ = self.case
        times = [1e3 * seconds / num_clients for seconds in self.seconds[1:]]
        return {
            "engine": engine,
            "targets": targets,
            "tensors": len(self.server.state),
            "bytes": Payload(self.server.state).num_bytes,
            "fresh": fresh,
            "clients": num_clients,
            "ms_per_client": statistics.median(times),
            "ms_per_client_min": min(times),
            "grows_mb": self.growth / 1e6,
            "rounds": len(times),
        }

    def close(self) -> None:
        """Let go of processes and files."""
        self.engine.close()
        self.ledger.close()


def resident(field: str) -> int:
    """Bytes of resident memory: VmRSS (present) or VmHWM (peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def recipe_for(case: Case, folder: Path, model: str) -> Recipe:
    """A run of the empty method over rows made up here, one for each client."""
    engine, targets, fresh, num_clients, _ = case
    rows = folder / "rows.jsonl"
    line = '{"instruction": "what is %d", "response": "a number"}\n'
    rows.write_text("".join(line % number for number in range(num_clients)))
    table: dict[str, Value] = {
        "model": model,
        "adapter": {"rank": 8, "targets": [*targets.split()]},
        "data": {"source": str(rows), "holdout": 0.0, "partition": {"kind": "iid", "num_clients": num_clients}},
        "method": {"name": "outside.echo", "fresh": fresh},
        "engine": {"name": engine, "workers": 2, "threads": 1},
    }
    return tables.from_table(table)


def measure(cases: list[Case], model: str) -> list[dict[str, str | int | float | bool]]:
    """Rows of the table, in the order of `cases`."""
    with ExitStack() as stack:
        benches = []
        for number, case in enumerate(cases):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / str(number)
            folder.mkdir()
            print(f"first round: {case[3]} clients, {case[0]}", file=sys.stderr)
            benches.append(stack.enter_context(closing(Bench(case, folder, model))))
            benches[-1].round()
        for turn in range(max((case[4] for case in cases), default=0)):
            for bench in benches:
                if turn < bench.case[4]:
                    bench.round()
        return [bench.row() for bench in benches]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--model", default="builtin:small", help="a model directory")
    parser.add_argument("--skip", default="", help="an engine to leave out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts = [QUICK] if options.quick else [FULL, LAST]
    rows = [row for part in parts for row in measure([c for c in part if c[0] != options.skip], options.model)]
    load = os.getloadavg()[0]
    if options.json:
        print(json.dumps({"rows": rows, "load": load}))
        return
    print(
        f"{'engine':10}{'targets':15}{'payload':>10}{'clients':>9}{'ms/client':>11}{'min':>8}{'grows':>10}{'rounds':>8}"
    )
    for row in rows:
        name = f"{row['targets']}{' fresh' if row['fresh'] else ''}"
        print(
            f"{row['engine']:10}{name:15}{row['bytes'] / 1e3:7.1f} kB{row['clients']:9}{row['ms_per_client']:11.3f}"
            f"{row['ms_per_client_min']:8.3f}{row['grows_mb']:7.1f} MB{row['rounds']:8}"
        )
    print(f"torch {torch.__version__}, one thread a process, {os.cpu_count()} cores, load average {load:.1f}")


if __name__ == "__main__":
    main()
