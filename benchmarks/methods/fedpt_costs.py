"""What a client of FedPT sends, computes and holds, against direct federated LoRA of the large model, same rows.

    python benchmarks/methods/fedpt_costs.py [--quick] [--json] [--small DIR] [--large DIR]

Bytes are the ledger's, per client and round. Operations are torch's count of the first round. Memory is the largest
resident set of a worker process that does nothing but the clients' side; an idle Python with torch and transformers is
given beside it, since with models as small as the embedded ones it is most of it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import kilofed
from kilofed.config.fields import Value

IDLE = "import torch, transformers, peft\nfrom kilofed.costs import environment\nprint(environment.own_peak_memory())"


def measure(name: str, words: dict[str, Value], rounds: int, folder: Path) -> dict[str, float | str]:
    shared: dict[str, Value] = {
        "rounds": rounds,
        "evaluate.costs": True,
        "evaluate.baselines": [],
        "evaluate.generate": 0,
        "engine.name": "pool",
        "engine.workers": 1,
    }
    results = kilofed.run("fedpt", {**shared, **words}, out=folder / name).results
    assert results.costs
    client = results.costs.client
    return {
        "row": name,
        "up_kB": round(results.bytes.up / rounds / 1e3, 1),
        "down_kB": round(results.bytes.down / rounds / 1e3, 1),
        "client_GFLOP": round(client.flops / 1e9, 2),
        "client_MB": round(client.peak_memory_bytes / 1e6),
        "client_s": round(client.seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round instead of two")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--small", default="builtin:small")
    parser.add_argument("--large", default="builtin:large")
    options = parser.parse_args()
    rounds = 1 if options.quick else 2
    done = subprocess.run([sys.executable, "-c", IDLE], check=True, capture_output=True, text=True)
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            measure("FedPT", {"model": options.small, "method.large.path": options.large}, rounds, Path(folder)),
            measure("direct LoRA", {"model": options.large, "method": {"name": "fedavg"}}, rounds, Path(folder)),
        ]
    ratios = {key: round(rows[1][key] / rows[0][key], 2) for key in rows[0] if key != "row"}
    idle = round(int(done.stdout) / 1e6)
    if options.json:
        print(json.dumps({"rows": rows, "direct_over_fedpt": ratios, "idle_MB": idle}))
        return
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in [*rows, {"row": "direct / FedPT", **ratios}]:
        print("| " + " | ".join(map(str, row.values())) + " |")
    print(f"an idle process with torch, transformers and peft: {idle} MB")


if __name__ == "__main__":
    main()
