"""How long it takes to rebuild weights from K coefficients, against a copy of the same weights and the official replay.

    python benchmarks/zeroth/rebuild.py [--quick] [--json]

In every round all kernels of a case run in turn, so a busy machine slows them alike; ratios are medians over rounds of
the ratio within one round. The official replay (FedKSeed: `torch.normal` for every parameter and seed, in sequence) is
timed on a few seeds and multiplied by K. CPU columns are processor seconds, which waiting for a core does not add to.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from kilofed.zeroth.directions.pool import SeedPool
from kilofed.zeroth.directions.unstructured import official_rebuild

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
POOLS = (1024, 4096, 65536)
OFFICIAL_TENSOR = 1 << 24
"""Elements of one parameter in the official replay, as of a 4096 x 4096 matrix."""

PAUSE = 0.01
"""Seconds before each call: torch's threads spin for a while after their last work."""

Row = dict[str, float | int | str]


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor seconds of one call."""
    time.sleep(PAUSE)
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure_case(num_elements: int, dtype: str, num_rounds: int, num_official: int) -> Row:
    """One row of the table."""
    rng = np.random.default_rng(0)
    w0 = torch.empty(num_elements, dtype=DTYPES[dtype])
    for part in w0.split(1 << 24):
        part.normal_(0, 0.02)
    out = torch.empty_like(w0).copy_(w0)
    runs: dict[str, Callable[[], object]] = {"copy": lambda: out.copy_(w0)}
    for num_seeds in POOLS:
        here = SeedPool(num_seeds, 1).at((rng.normal(size=num_seeds) * 1e-5).astype(np.float32))
        runs[f"K={num_seeds}"] = lambda here=here: here.rebuild(w0, out=out)
    for run in runs.values():
        run()
    times = {name: [] for name in runs}
    for _ in range(num_rounds):
        for name, run in runs.items():
            times[name].append(timed(run))
    row: Row = {"parameters": num_elements, "dtype": dtype}
    copies = times["copy"]
    for name, pairs in times.items():
        row[f"{name} ms"] = 1e3 * statistics.median(wall for wall, _ in pairs)
        row[f"{name} best ms"] = 1e3 * min(wall for wall, _ in pairs)
        row[f"{name} cpu ms"] = 1e3 * statistics.median(cpu for _, cpu in pairs)
        row[f"{name} cpu / copy"] = row[f"{name} cpu ms"] / row["copy cpu ms"]
        if name != "copy":
            ratios = [wall / copy for (wall, _), (copy, _) in zip(pairs, copies, strict=True)]
            row[f"{name} / copy"] = statistics.median(ratios)
            row[f"{name} / copy best"] = min(w for w, _ in pairs) / min(w for w, _ in copies)
    pairs = zip(times["K=65536"], times["K=4096"], strict=True)
    row["K=65536 / K=4096"] = statistics.median(large / small for (large, _), (small, _) in pairs)
    if num_official:
        del out
        parameters = list(w0.split(OFFICIAL_TENSOR))
        seconds = [timed(lambda: official_rebuild(parameters, {7: 1.0}, 1e-3))[0] for _ in range(num_official + 1)]
        row["official s/seed"] = statistics.median(seconds[1:])
        row["official x4096 s"] = 4096 * statistics.median(seconds[1:])
        row["official / K=4096"] = row["official x4096 s"] / (row["K=4096 ms"] / 1e3)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10 and 100 million parameters, few rounds")
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cases = [(10_000_000, 15 if options.quick else 41, 2), (100_000_000, 7 if options.quick else 21, 1)]
    rows = []
    for num_elements, num_rounds, num_official in cases:
        for dtype in DTYPES:
            rows.append(measure_case(num_elements, dtype, num_rounds, num_official))
            print(f"measured {num_elements} {dtype}", file=sys.stderr)
    if not options.quick:
        rows.append(measure_case(1_000_000_000, "bfloat16", 7, 0))
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{options.threads} threads, torch {torch.__version__}; ms are medians of wall time\n")
    print("| parameters | dtype | copy ms | K=1024 | K=4096 | K=65536 | official s/seed | official / K=4096 |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [f"{row['parameters']:,}", row["dtype"], f"{row['copy ms']:.1f}"]
        cells += [f"{row[f'K={k} ms']:.1f} ({row[f'K={k} / copy']:.2f}x)" for k in POOLS]
        if "official s/seed" in row:
            cells += [f"{row['official s/seed']:.3f}", f"{row['official / K=4096']:,.0f}x"]
        else:
            cells += ["-", "-"]
        print("| " + " | ".join(map(str, cells)) + " |")
    print(
        "\nRatios to the copy by processor time, and of K=65536 to K=4096 (median within a round, processor time):\n"
    )
    print("| parameters | dtype | copy cpu ms | K=1024 | K=4096 | K=65536 | 65536 / 4096 | the same, cpu |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [f"{row['parameters']:,}", row["dtype"], f"{row['copy cpu ms']:.1f}"]
        cells += [f"{row[f'K={k} cpu ms']:.1f} ({row[f'K={k} cpu / copy']:.2f}x)" for k in POOLS]
        cells += [f"{row['K=65536 / K=4096']:.2f}", f"{row['K=65536 cpu ms'] / row['K=4096 cpu ms']:.2f}"]
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
