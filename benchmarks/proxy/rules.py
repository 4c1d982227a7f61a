"""FedPT's rules on the gazetteer: the recipe `fedpt` under each `method.rule`, over seeds, next to its parts alone.

Each rule is a run of its own on one split: clients tune the small model on the form of an answer, the large one knows
the facts. `realign` steers the model that clients tune, which is its own case: its reference is that model untuned.

    python benchmarks/proxy/rules.py [--quick] [--json] [--seeds 3]
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import kilofed
from kilofed.config.fields import Value
from kilofed.models.evaluation import interval
from kilofed.records.results import Results

SMALL = {"method.large": "builtin:small", "method.alpha": 0.5, "method.distillation": "none"}
RULES: dict[str, Mapping[str, Value]] = {"difference": {}, "mix": {}, "entropy_mix": {}, "realign": SMALL}
PARTS = {"federated": "steered", "large base": "large model alone", "small tuned": "small tuned model alone"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, one round")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    words: dict[str, Value] = {"evaluate.baselines": [], "seeds": options.seeds}
    if options.quick:
        words |= {"rounds": 1, "seeds": 1, "evaluate.generate": 2}
    lines = []
    for rule, own in RULES.items():
        with tempfile.TemporaryDirectory() as folder:
            done = kilofed.run("fedpt", {**words, "method.rule": rule, **own}, out=Path(folder) / "run")
            lines += [{"rule": rule, "model": title, **scores(done.results, row)} for row, title in PARTS.items()]
    print(json.dumps(lines) if options.json else table(lines))


def scores(results: Results, row: str) -> dict[str, object]:
    """Loss and exact answers of a row: means over seeds, with 95 % intervals."""
    seeds = [one.rows[row] for one in results.per_seed] or [results.rows[row]]
    losses = [one.loss for one in seeds if one.loss is not None]
    exact = [one.exact_match for one in seeds if one.exact_match is not None]
    return {
        "loss": sum(losses) / len(losses),
        "loss_interval": interval(losses),
        "exact": sum(exact) / len(exact),
        "exact_interval": interval(exact),
    }


def table(lines: list[dict[str, object]]) -> str:
    """A line per rule and model, in Markdown."""
    rows = ["| rule | model | loss | exact answers |", "|---|---|---|---|"]
    for line in lines:
        loss, exact = (spread(line[name], line[f"{name}_interval"]) for name in ("loss", "exact"))
        rows.append(f"| {line['rule']} | {line['model']} | {loss} | {exact} |")
    return "\n".join(rows)


def spread(mean: object, ends: object) -> str:
    """A mean and its interval."""
    return f"{mean:.3f}" + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if isinstance(ends, tuple) else "")


if __name__ == "__main__":
    main()
