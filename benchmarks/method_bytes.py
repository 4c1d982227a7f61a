"""Bytes that a short run of every method leaves: what a change that should not change numbers must leave equal.

    python benchmarks/method_bytes.py > before.txt
    # change something
    python benchmarks/method_bytes.py | diff before.txt -

A line per method: the SHA-256 of the server's state, of the adapter, and of the ledger without its seconds. Two rounds on
the embedded small model and unequal clients of made-up rows (3, 10 and 41); bits depend on the machine and torch's version.
"""

import argparse
import hashlib
import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import kilofed

SHORT: dict[str, dict[str, object]] = {
    "fedavg": {},
    "fedprox": {"mu": 0.5},
    "fedavgm": {},
    "fedadam": {},
    "fedyogi": {},
    "fedkseed": {"num_seeds": 64, "steps": 3, "lr": 1e-4},
    "fedmezo": {"steps": 3, "lr": 1e-3},
    "fedpt": {"large": "builtin:large", "steps": 2, "batch_size": 4, "top_k": 8, "tolerance": 9.0},
    "kd": {"steps": 2, "client_distill_steps": 1, "batch_size": 4, "top_k": 8, "public_rows": 3},
    "split": {},
}
PUBLIC = {"fedpt", "kd"}
SIZES = (3, 10, 41)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("methods", nargs="*", default=sorted(SHORT), help="default: all")
    for name in parser.parse_args().methods:
        with tempfile.TemporaryDirectory() as folder:
            print(name, *digests(name, Path(folder)), flush=True)


def digests(name: str, folder: Path) -> list[str]:
    """Digests of what one run of a method leaves."""
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in made_up()), "utf-8")
    table = {
        "rounds": 2,
        "data": {"source": str(rows), "holdout": 0.2, "max_length": 64, "public_share": 0.2 * (name in PUBLIC)},
        "adapter": {"rank": 2},
        "train": {"steps": 2, "batch_size": 4},
        "evaluate": {"generate": 0, "baselines": []},
        "method": {"name": name, **SHORT[name]},
    }
    recipe = folder / "recipe.toml"
    recipe.write_text("\n".join(flat(table)), "utf-8")
    run = kilofed.run(recipe, out=folder / "run").folder
    adapter = [path.read_bytes() for path in sorted((run / "adapter").glob("*.safetensors"))]
    lines = [json.loads(line) for line in (run / "ledger.jsonl").read_text("utf-8").splitlines()]
    ledger = json.dumps([{key: value for key, value in line.items() if key != "seconds"} for line in lines])
    done = json.loads((run / "results.json").read_text("utf-8"))
    parts = [b"".join(adapter), ledger.encode()]
    return [done["state_sha256"][:16], *(hashlib.sha256(part).hexdigest()[:16] for part in parts)]


def made_up() -> list[dict[str, str]]:
    """Rows of three clients."""
    return [
        {"client": f"site {client}", "instruction": f"add {n} and {client}", "response": f"is {n + client}"}
        for client, size in enumerate(SIZES)
        for n in range(size)
    ]


def flat(table: dict[str, object], where: str = "") -> list[str]:
    """TOML with dotted keys."""
    lines = []
    for key, value in table.items():
        lines += flat(value, f"{where}{key}.") if isinstance(value, dict) else [f"{where}{key} = {json.dumps(value)}"]
    return lines


if __name__ == "__main__":
    main()
