"""Bytes per client and round of FedKSeed on the ledger: 10 clients, 200 steps, K = 4096 and 1024, quantised and float32.

Every message is counted whole, as the engine gets it. The paper's own format costs 17,988 bytes at K = 4096.

    python benchmarks/fedkseed_bytes.py [--quick] [--json] [--model DIR]
"""

import argparse
import json
import statistics
from collections import defaultdict

from kilofed import models, recipe
from kilofed.engines.inprocess import InProcess
from kilofed.evaluate import score
from kilofed.ledger import Ledger
from kilofed.method import Cohort, Server
from kilofed.site import Sites

TARGETS = {4096: 2000, 1024: 1000}
PAPER = 17_988


def measure(model: str, num_seeds: int, rounds: int, fields: dict[str, recipe.Value]) -> dict[str, object]:
    """Bytes of each round after the first, in which there is nothing to send down yet, and the held-out loss."""
    spec = recipe.load(
        "fedkseed",
        {
            "model": model,
            "data.partition.kind": "iid",
            "data.partition.num_clients": 10,
            "data.max_rows": 400,
            "data.max_test_rows": 4,
            "data.max_length": 64,
            "method.num_seeds": num_seeds,
            "method.steps": 200,
            "method.batch_size": 1,
            "rounds": rounds,
            **{f"method.{name}": value for name, value in fields.items()},
        },
    )
    sites, ledger = Sites(spec), Ledger()
    server = Server(spec.seed, spec.rounds, spec.train, sites.model(spec.model))
    sites.method.setup(server)
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
    tests = [example for client in sites.client_ids() for example in sites.test_examples(client)]
    down, up = (statistics.fmean(found[way]) for way in ("down", "up"))
    whole = max(len(asked.encode()) for asked in sites.method._asks(server, [10**6]).values())
    return {
        "num_seeds": num_seeds,
        "wire": "float32" if fields.get("bits_up") == 32 else "quantised",
        "down": round(down),
        "up": round(up),
        "both": round(down + up),
        "whole_state": whole,
        "target": TARGETS[num_seeds],
        "times_less_than_paper": round(PAPER / (down + up), 1),
        "loss": round(score(sites.method.deliver(server), tests, 32).loss, 5),
        "trained": sum(p.numel() for p in models.trained(server.model).values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two rounds instead of five, no float32 rows")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--model", default="builtin:small")
    options = parser.parse_args()
    rounds = 2 if options.quick else 5
    wires: list[dict[str, recipe.Value]] = [{}] if options.quick else [{}, {"bits_up": 32, "bits_down": 32}]
    rows = [measure(options.model, num_seeds, rounds, wire) for num_seeds in TARGETS for wire in wires]
    if options.json:
        print(json.dumps(rows))
        return
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
