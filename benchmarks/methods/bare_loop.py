"""One client, one round of FedAvg against a bare transformers/torch loop of the same steps: equal bits, equal time?

The bare loop below imports nothing of kilofed's training: it tokenises nothing (both get the same token ids), pads,
calls the model, cross entropy, backward, AdamW. Pairs of runs alternate in one process; the ratio quoted is the median.

    python benchmarks/methods/bare_loop.py [--quick] [--json] [--model DIR]
"""

import argparse
import json
import statistics
import time
from dataclasses import replace

import torch
from torch import nn

from kilofed.config import tables
from kilofed.config.recipe import TrainSpec
from kilofed.engines.inprocess import InProcess
from kilofed.federation.cohort import Cohort
from kilofed.federation.ledger import Ledger
from kilofed.federation.parties import generator
from kilofed.models import loading
from kilofed.runs.sites import Sites


def bare(model: nn.Module, rows: list[tuple[list[int], list[int]]], spec: TrainSpec, order: list[int]) -> None:
    """Train `model` on batches of `rows` taken in `order`."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=spec.lr, weight_decay=spec.weight_decay)
    for step in range(spec.steps):
        batch = [rows[i] for i in order[step * spec.batch_size : (step + 1) * spec.batch_size]]
        width = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in batch])
        labels = torch.tensor([row + [-100] * (width - len(row)) for _, row in batch])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row, _ in batch])
        keep = (labels[:, 1:] != -100).any(0).nonzero()[:, 0]
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=keep).logits
        targets = labels[:, 1:][:, keep]
        learnt = targets != -100
        loss = nn.functional.cross_entropy(logits[learnt], targets[learnt])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--model", default="builtin:small")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pairs = 7 if options.quick else 21
    results = [measure(kind, options.model, pairs, 4 if options.quick else 12) for kind in ("lora", "full")]
    if options.json:
        print(json.dumps(results))
        return
    print(f"{'trained':8} {'bit-equal':>9} {'kilofed / bare':>15} {'min':>6} {'max':>6}  ({pairs} pairs)")
    for row in results:
        print(f"{row['trained']:8} {row['bit_equal']!s:>9} {row['ratio']:15.3f} {row['min']:6.3f} {row['max']:6.3f}")


def measure(kind: str, path: str, pairs: int, steps: int) -> dict[str, object]:
    plan = tables.load(
        "tiny",
        {
            "model.path": path,
            "adapter.kind": kind,
            "rounds": 1,
            "train.steps": steps,
            "data.partition.kind": "iid",
            "data.partition.num_clients": 1,
            "data.options": {"train_rows": 40},
        },
    )
    sites = Sites(plan)
    theirs = loading.load_model(plan.model, plan.adapter, plan.seed)
    start = loading.read_trained(theirs)
    examples = sites.corpus.train_examples(0)
    rows = [(list(e.input_ids), list(e.labels)) for e in examples]
    order = [
        i
        for epoch in range(steps * plan.train.batch_size // len(rows) + 1)
        for i in torch.randperm(len(rows), generator=generator(plan.seed, 0, 0, f"epoch {epoch}")).tolist()
    ]
    engine = InProcess([0], sites.handle)
    ratios, equal = [], True
    for number in range(pairs + 1):
        server = replace(sites.server(), state=dict(start), round=1)
        loading.write_trained(theirs, start)
        began = time.perf_counter()
        sites.method.round(server, Cohort([0], engine, Ledger(), sites.policy, round=1))
        middle = time.perf_counter()
        bare(theirs, rows, replace(plan.train), order)
        loading.read_trained(theirs)
        ended = time.perf_counter()
        equal &= all(torch.equal(server.state[name], value) for name, value in loading.read_trained(theirs).items())
        if number:  # The first pair warms up.
            ratios.append((middle - began) / (ended - middle))
    return {
        "trained": kind,
        "bit_equal": equal,
        "ratio": statistics.median(ratios),
        "min": min(ratios),
        "max": max(ratios),
        "pairs": pairs,
        "steps": steps,
    }


if __name__ == "__main__":
    main()
