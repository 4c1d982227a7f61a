"""Bytes per client and round of FedKSeed on the ledger: 10 clients, 200 steps, K = 4096 and 1024, quantised and float32.

Every message is counted whole, as the engine gets it. The paper's own format costs 17,988 bytes at K = 4096.

    python benchmarks/methods/fedkseed_bytes.py [--quick] [--json] [--model DIR] [--seeds 3]
        [--pools K ...] [--wires NAME ...]
"""

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator

import torch

from kilofed.config import tables
from kilofed.engines.inprocess import InProcess
from kilofed.federation.cohort import Cohort
from kilofed.federation.ledger import Ledger
from kilofed.models import loading
from kilofed.models.evaluation import interval, score
from kilofed.runs.sites import Sites

TARGETS = {4096: 2000, 1024: 1000}
PAPER = 17_988


def measure(model: str, num_seeds: int, wire: str, seed: int, rounds: int) -> dict[str, float | int | str]:
    """Bytes of each round after the first, in which there is nothing to send down yet, and the held-out loss."""
    spec = tables.load(
        "fedkseed",
        {
            "seed": seed,
            "model": model,
            "data.partition.kind": "iid",
            "data.partition.num_clients": 10,
            "data.max_rows": 400,
            "data.max_test_rows": 20,
            "data.max_length": 64,
            "method.num_seeds": num_seeds,
            "method.steps": 200,
            "method.batch_size": 1,
            "method.lr": 3e-4,
            "rounds": rounds,
            **({"method.bits_up": 32, "method.bits_down": 32} if wire == "float32" else {}),
        },
    )
    sites, ledger = Sites(spec), Ledger()
    sites.method.setup(server := sites.server())
    tests = [example for client in sites.client_ids() for example in sites.corpus.test_examples(client)]
    base = score(server.model, tests, 32).loss
    for number in range(1, rounds + 1):
        server.round = number
        cohort = Cohort(
            sites.client_ids(), InProcess(sites.client_ids(), sites.handle), ledger, sites.policy, round=number
        )
        sites.method.round(server, cohort)
    found = defaultdict(list)
    for row in ledger.rows():
        if row.round > 1:
            found[row.direction].append(row.bytes)
    down, up = (statistics.fmean(found[way]) for way in ("down", "up"))
    return {
        "num_seeds": num_seeds,
        "wire": wire,
        "seed": seed,
        "down": round(down),
        "up": round(up),
        "both": round(down + up),
        "whole_state": max(len(asked.encode()) for asked in sites.method._asks(server, [10**6]).values()),
        "base": round(base, 5),
        "loss": round(score(sites.method.deliver(server), tests, 32).loss, 5),
        "trained": sum(p.numel() for p in loading.trained(server.model).values()),
    }


def table(rows: list[dict[str, float | int | str]]) -> Iterator[str]:
    """One line per pool and wire; means over seeds, the loss beside that of float32 with its 95 % interval."""
    yield f"{rows[0]['trained']:,} trained parameters; per client and round, after the first one; the paper: {PAPER:,}"
    yield "| K | wire | down | up | both | target | less than the paper | whole state | base | loss | minus float32 |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    by = defaultdict(dict)
    for row in rows:
        by[row["num_seeds"], row["wire"]][row["seed"]] = row
    for (num_seeds, wire), runs in by.items():
        mean = {
            key: statistics.fmean(float(run[key]) for run in runs.values())
            for key in ("down", "up", "both", "whole_state", "base", "loss")
        }
        exact = by.get((num_seeds, "float32"), {})
        apart = [float(run["loss"]) - float(exact[seed]["loss"]) for seed, run in runs.items() if seed in exact]
        ends = interval(apart)
        words = f"{statistics.fmean(apart):+.4f}" if apart else "-"
        words += f" [{ends[0]:+.4f}, {ends[1]:+.4f}]" if ends else ""
        yield (
            f"| {num_seeds} | {wire} | {mean['down']:,.0f} | {mean['up']:,.0f} | {mean['both']:,.0f} "
            f"| {TARGETS[int(num_seeds)]:,} | {PAPER / mean['both']:.1f}x | {mean['whole_state']:,.0f} "
            f"| {mean['base']:.4f} | {mean['loss']:.4f} | {words} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two rounds instead of three, one seed, no float32 rows")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--model", default="builtin:small")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pools", type=int, nargs="+", default=list(TARGETS), choices=list(TARGETS), metavar="K")
    parser.add_argument("--wires", nargs="+", default=["quantised", "float32"], choices=["quantised", "float32"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds, seeds = (2, 1) if options.quick else (3, options.seeds)
    wires = ["quantised"] if options.quick else options.wires
    rows = []
    for seed in range(seeds):
        for num_seeds in options.pools:
            for wire in wires:
                rows.append(measure(options.model, num_seeds, wire, seed, rounds))
                print(f"measured {rows[-1]}", file=sys.stderr, flush=True)
    print(json.dumps(rows) if options.json else "\n".join(table(rows)))


if __name__ == "__main__":
    main()
