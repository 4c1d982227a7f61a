"""Split learning: is it plain training, what do narrow activations cost, and what does the server read?

1. One client, cut in two, against the same steps without a cut: the largest difference of a trained tensor (wanted: 0.0).
2. Bytes of activations and gradients and held-out accuracy for each width, with one seed per repeat and the 95 % interval
   of the difference from float32 (wanted: int8 loses at most 1 % of accuracy at about a quarter of the bytes).
3. Share of a client's tokens that the server reads off the activations, at each cut.
4. With --stream: seconds per step and peak memory of a client's process against the run in one process.

    python benchmarks/split/split.py [--quick] [--json] [--stream] [--seeds 3] [--model DIR]
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from kilofed.config import tables
from kilofed.config.fields import Value
from kilofed.config.recipe import Recipe
from kilofed.costs.counter import CostCounter
from kilofed.engines.inprocess import InProcess
from kilofed.engines.opener import Opener
from kilofed.federation.cohort import Cohort, Engine
from kilofed.federation.ledger import Ledger
from kilofed.federation.parties import Server
from kilofed.models import evaluation, loading
from kilofed.models.evaluation import interval
from kilofed.runs.preview import preview_of
from kilofed.runs.sites import Sites
from kilofed.split import reconstruction

WIDTHS = "float32", "bfloat16", "int8"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--stream", action="store_true", help="measure the stream engine too")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--model", default="builtin:small")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds, steps = (1, 3) if options.quick else (options.seeds, 15)
    found: dict[str, object] = {
        "plain": [
            plain(options.model, kind, labels)
            for kind, labels in (("lora", "server"), ("lora", "client"), ("full", "client"))
        ],
        "widths": widths(options.model, seeds, steps, options.quick),
        "probe": [vars(one) for one in read(options.model, 16 if options.quick else 64)],
    }
    if options.stream:
        found["stream"] = stream(options.model, 10 if options.quick else 30)
    if options.json:
        print(json.dumps(found))
    else:
        show(found)


def plan(model: str, overrides: Mapping[str, Value]) -> Recipe:
    table: dict[str, Value] = {"model.path": model, "rounds": 1, "data.options": {"train_rows": 64}, **overrides}
    return tables.load("split", table)


def federate(asked: Recipe, engine: Engine | None = None, sites: Sites | None = None) -> tuple[Sites, Server, Ledger]:
    """All rounds of a recipe, without a run folder."""
    sites = sites or Sites(asked)
    sites.method.setup(server := sites.server())
    ledger, ids = Ledger(), sites.client_ids()
    for number in range(1, asked.rounds + 1):
        server.round = number
        cohort = Cohort(ids, engine or InProcess(ids, sites.handle), ledger, sites.policy, round=number)
        sites.method.round(server, cohort)
    return sites, server, ledger


def plain(model: str, kind: str, labels: str) -> dict[str, object]:
    """The largest difference from FedAvg with one client, which is plain training (bare_loop.py)."""
    alone = {"data.partition.kind": "iid", "data.partition.num_clients": 1, "adapter.kind": kind, "train.steps": 3}
    wire = {"method.activations": "float32", "method.gradients": "float32", "method.labels": labels}
    _, split, _ = federate(plan(model, {**alone, **wire}))
    _, whole, _ = federate(tables.changed(plan(model, alone), {"method": {"name": "fedavg"}}))
    return {"trained": kind, "labels": labels, "difference": difference(split.state, whole.state)}


def difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def widths(model: str, seeds: int, steps: int, quick: bool) -> list[dict[str, object]]:
    scores: dict[str, list[tuple[float, float]]] = {width: [] for width in WIDTHS}
    moved: dict[str, int] = {}
    for seed in range(seeds):
        for width in WIDTHS:
            narrow = {"method.activations": width, "method.gradients": width}
            size = {"rounds": 1 if quick else 2, "train.steps": steps, "data.max_test_rows": 8 if quick else 32}
            asked = plan(model, {"seed": seed, **size, **narrow})
            sites, server, ledger = federate(asked)
            found = sites.method.deliver(server)
            each = [evaluation.score(found, sites.corpus.test_examples(c), 32) for c in sites.client_ids()]
            scores[width].append((statistics.fmean(s.accuracy for s in each), statistics.fmean(s.loss for s in each)))
            moved[width] = sum(row.bytes for row in ledger.rows() if row.action == "forward" and row.exchange)
    rows = []
    for width in WIDTHS:
        lost = [base[0] - one[0] for base, one in zip(scores["float32"], scores[width], strict=True)]
        rows.append({
            "width": width,
            "bytes": moved[width] / moved["float32"],
            "accuracy": statistics.fmean(a for a, _ in scores[width]),
            "loss": statistics.fmean(loss for _, loss in scores[width]),
            "lost": statistics.fmean(lost),
            "interval": list(interval(lost) or []),
        })  # fmt: skip
    return rows


def read(model: str, rows: int) -> Iterator[reconstruction.Recovered]:
    """The base model of the recipe; the server's own text is another party's."""
    sites = Sites(plan(model, {}))
    known, secret = (sites.corpus.train_examples(client)[:rows] for client in (0, 1))
    yield from reconstruction.recover_at_every_cut(sites.store.model(sites.recipe.model), known, secret)


def stream(model: str, steps: int) -> dict[str, float]:
    """One client on loopback against the same run in this process; the first round of each warms it up."""
    from kilofed.engines.stream import Stream

    found: dict[str, float] = {}
    few = {"data.partition.kind": "iid", "data.partition.num_clients": 1, "train.steps": steps, "engine.threads": 1}
    with TemporaryDirectory() as folder:
        asked = plan(model, few)
        text = json.dumps(tables.to_table(asked))
        opener = Opener("kilofed.runs.sites:open_handler", (text, str(Path(folder, "stream"))), 1)
        for name in ("inprocess", "stream"):
            sites = Sites(asked, Path(folder, name))
            engine = Stream([0], opener) if name == "stream" else InProcess([0], sites.handle)
            federate(asked, engine, sites)
            seconds = []
            for _ in range(3):
                began = time.perf_counter()
                federate(asked, engine, sites)
                seconds.append((time.perf_counter() - began) / steps)
            found[f"{name}_seconds"] = statistics.median(seconds)
            if isinstance(engine, Stream):
                found["framing_bytes"] = engine.overhead()
                pid = engine._homes[0]._process.pid
                found["client_peak_bytes"] = peak(pid or os.getpid())
                found["runtime_bytes"] = idle()
            engine.close()
        part = loading.load_model(sites.method.client_model(asked, 0), asked.adapter, 0)  # type: ignore[arg-type]
        found["part_bytes"] = sum(p.numel() * p.element_size() for p in part.parameters())
        found["activation_bytes"] = activations(asked)
    return found


def activations(asked: Recipe) -> int:
    """Bytes that the largest batch of the client's part holds."""
    sites = Sites(asked)
    bench = CostCounter(asked.adapter, asked.train, ())
    work = sites.method.costs().client(preview_of(sites, bench), 0)
    spec = sites.method.client_model(asked, 0)
    assert work
    assert spec
    return bench.activations(work.passes, spec)


def peak(pid: int) -> int:
    """Peak resident bytes of a process (Linux)."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def idle() -> int:
    """Resident bytes of a process that has what a client has but its model: libraries, rows, one finished training step."""
    import subprocess
    import sys

    code = (
        "import kilofed.runs.sites, kilofed.engines.stream, grpc, peft\n"
        "from kilofed.config import tables\nfrom kilofed.runs.sites import Sites\n"
        "sites = Sites(tables.load('split', {'data.options': {'train_rows': 64}}))\nsites.train_examples(0)\n"
        "from kilofed.costs import counter\nprint(counter.measure().runtime)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def show(found: Mapping[str, object]) -> None:
    print("one client against plain training, largest difference of a trained tensor")
    for row in found["plain"]:  # type: ignore[attr-defined]
        print(f"  {row['trained']:5} labels at the {row['labels']:7} {row['difference']}")
    print(f"\n{'width':9} {'bytes':>7} {'accuracy':>9} {'loss':>7} {'accuracy lost':>14}  95 % interval over seeds")
    for row in found["widths"]:  # type: ignore[attr-defined]
        ends = ", ".join(f"{end:+.2%}" for end in row["interval"]) or "-"
        print(
            f"{row['width']:9} {row['bytes']:7.1%} {row['accuracy']:9.2%} {row['loss']:7.3f} {row['lost']:+14.2%}  {ends}"
        )
    print(f"\n{'cut':>3} {'nearest embedding':>18} {'linear inverter':>16}   tokens that the server reads")
    for row in found["probe"]:  # type: ignore[attr-defined]
        print(f"{row['cut']:3} {row['nearest']:18.1%} {row['inverter']:16.1%}   of {row['num_tokens']}")
    if "stream" in found:
        row = found["stream"]
        ratio = row["stream_seconds"] / row["inprocess_seconds"]  # type: ignore[index]
        print(f"\nstream: {ratio:.2f} times the seconds of a step in one process; {json.dumps(row)}")
        allowed = row["runtime_bytes"] + 1.2 * (row["part_bytes"] + row["activation_bytes"])  # type: ignore[index]
        print(f"client's peak by runtime + 1.2 (part + activations): {row['client_peak_bytes'] / allowed:.3f}")  # type: ignore[index]


if __name__ == "__main__":
    main()
