"""Quality on natural text: does a large model, steered by a small one that clients tuned, beat its parts?

For each data set and seed, held-out loss and accuracy of: large and small base; small tuned on all rows in one place and
by FedAvg; FedPT without and with distillation (the steered model and the small one); the large model tuned directly,
federated and in one place. Beside them the verdict that `kilofed check` gives before the run, and the bytes.

Each finished part of a data set and seed is a line of --out, and is not measured again. Parts: `steered` is all but
`direct`, the large model tuned directly, which takes half of the time.

    python benchmarks/proxy/proxy_text.py [--quick] [--json] [--datasets dolly,banking77] [--seeds 3] [--parts steered,direct]
"""

import argparse
import gzip
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import nn

from kilofed.config.recipe import Recipe
from kilofed.config.tables import from_table
from kilofed.data.examples import Example
from kilofed.data.formats import Row
from kilofed.engines.inprocess import InProcess
from kilofed.federation.cohort import Cohort
from kilofed.federation.ledger import Ledger
from kilofed.federation.parties import generator
from kilofed.methods.fedpt import FedPT
from kilofed.models import evaluation, loading, training
from kilofed.proxy.combination import Difference
from kilofed.proxy.trial import ProxyParts, sweep
from kilofed.runs.sites import Sites

ROUNDS, CLIENTS, BATCH = 4, 6, 4
TEST_ROWS = 120
ALPHAS = (0.5, 0.75, 1.0, 1.5)
ROWS = (
    "large base",
    "small base",
    "small central",
    "small FedAvg",
    "FedPT",
    "FedPT, distilled",
    "small, distilled",
    "large FedAvg",
    "large central",
)


@dataclass(frozen=True)
class Text:
    """A data set as rows of instruction, context, response and the label that clients differ in."""

    folder: str
    test: str = "test"
    template: str = "plain"
    pair: str = "shared"
    """shared: small and large of ../shared/models; builtin: the embedded pair."""
    rows: int = 600
    """Training rows, of which clients see each about once."""


Figures = Mapping[str, float]
Line = dict[str, object]

TEXTS = {
    "dolly": Text("dolly", rows=2000),
    "sgd_plain": Text("sgd_response", template="bare"),
    "sgd_instruction": Text("sgd_response", template="alpaca"),
    "natural_instructions": Text("natural_instructions", test="test_seen_tasks"),
    "banking77": Text("banking77", template="question"),
    "pydocs": Text("", template="", pair="builtin"),
}


def main() -> None:
    """Measure what is missing, then print the table or the lines as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one data set, one seed, few rows; under a minute")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--datasets", default="", help="comma-separated; default all that are there")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parts", default="steered,direct", help="comma-separated")
    parser.add_argument("--shared", type=Path, default=Path(__file__).resolve().parents[3] / "shared")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "proxy_text.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(1)
    there = [
        name for name, text in TEXTS.items() if not text.folder or (options.shared / "data" / text.folder).exists()
    ]
    names = options.datasets.split(",") if options.datasets else there
    parts = options.parts.split(",")
    if options.quick:
        lines = [measure("pydocs", 0, part, options.shared, quick=True) for part in parts]
    else:
        lines = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
        done = {(line["dataset"], line["seed"], line["part"]) for line in lines}
        for seed, part, name in itertools.product(range(options.seeds), parts, names):
            if (name, seed, part) not in done:
                lines.append(measure(name, seed, part, options.shared))
                with options.out.open("a") as out:
                    out.write(json.dumps(lines[-1]) + "\n")
        lines = [line for line in lines if line["dataset"] in names and line["seed"] < options.seeds]
    print(json.dumps(lines) if options.json else table(lines))


def measure(name: str, seed: int, part: str, shared: Path, *, quick: bool = False) -> dict[str, object]:
    """All rows of one part of one data set and seed."""
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        recipe = make_recipe(name, seed, shared, Path(folder))
        if quick:
            recipe = replace(recipe, rounds=1, data=replace(recipe.data, max_length=48))
        found = PARTS[part](recipe, 24 if quick else TEST_ROWS)
    seconds = round(time.process_time() - began, 1)
    return {"dataset": name, "seed": seed, "part": part, **found, "cpu_seconds": seconds}


def steered(recipe: Recipe, test_rows: int) -> dict[str, object]:
    """Small models, the large base, the steered models, the forecast before them and the strengths after."""
    plain, distilled = (Job(changed(recipe, distillation=kind)) for kind in ("none", "forward"))
    held_out = plain.held_out(test_rows)
    fedpt = cast(FedPT, plain.sites.method)
    rows: dict[str, evaluation.Scores] = {}

    def score(row: str, model: nn.Module) -> None:
        rows[row] = evaluation.score(model, held_out, 16)

    large = fedpt.presentation().extra_models(plain.server)["large base"]
    score("large base", large)
    score("small base", plain.server.model)
    trial_rows = [e for client in plain.sites.client_ids() for e in plain.sites.corpus.train_examples(client)[:80]]
    trial = fedpt.trial(plain.server, trial_rows, held_out[::2])
    score("small central", plain.central())
    plain.rounds()
    distilled.rounds()
    small = fedpt.trained(plain.server)
    score("small FedAvg", small)
    by_alpha = sweep(ProxyParts(large, small), held_out, {alpha: Difference(alpha) for alpha in ALPHAS})
    score("FedPT", fedpt.deliver(plain.server))
    score("small, distilled", cast(FedPT, distilled.sites.method).trained(distilled.server))
    score("FedPT, distilled", distilled.sites.method.deliver(distilled.server))
    return {
        **both(rows),
        "by_alpha": {str(alpha): loss for alpha, loss in by_alpha.items()},
        "forecast": {**vars(trial), "pays": trial.pays},
        "pays": rows["FedPT"].loss < min(rows["small FedAvg"].loss, rows["large base"].loss),
        "kept": [bool(row[3]) for row in distilled.server.state["server.phases"].tolist()],
        "bytes_per_client": plain.bytes,
    }


def direct(recipe: Recipe, test_rows: int) -> dict[str, object]:
    """The large model tuned itself."""
    large = replace(recipe.model, path=str(recipe.method.fields["large"]))
    job = Job(replace(recipe, model=large, method=replace(recipe.method, name="fedavg", fields={})))
    held_out = job.held_out(test_rows)
    rows = {"large central": evaluation.score(job.central(), held_out, 16)}
    job.rounds()
    rows["large FedAvg"] = evaluation.score(job.sites.method.deliver(job.server), held_out, 16)
    return {**both(rows), "bytes_per_client": job.bytes}


PARTS = {"steered": steered, "direct": direct}


def both(rows: Mapping[str, evaluation.Scores]) -> dict[str, object]:
    """Loss and accuracy by row."""
    return {name: {row: vars(scores)[name] for row, scores in rows.items()} for name in ("loss", "accuracy")}


class Job:
    """A federation in this process, without files."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.sites, self.ledger = recipe, Sites(recipe), Ledger()
        self.server = self.sites.server()
        self.sites.method.setup(self.server)

    def rounds(self) -> None:
        """All rounds."""
        for number in range(1, self.recipe.rounds + 1):
            self.round(number)

    def round(self, number: int) -> None:
        """One round."""
        ids = self.sites.client_ids()
        self.server.round = number
        cohort = Cohort(ids, InProcess(ids, self.sites.handle), self.ledger, self.sites.policy, round=number)
        self.sites.method.round(self.server, cohort)

    def central(self) -> nn.Module:
        """The model tuned on all rows in one place, as many of them as the federation sees."""
        model, recipe = self.server.model, self.recipe
        loading.write_trained(model, loading.read_trained(self.fresh()))
        rows = [e for client in self.sites.client_ids() for e in self.sites.corpus.train_examples(client)]
        steps = recipe.rounds * recipe.train.steps
        spec = replace(recipe.train, steps=steps, batch_size=recipe.train.batch_size * CLIENTS, accumulation=CLIENTS)

        def order(name: str) -> torch.Generator:
            return generator(recipe.seed, 0, 0, name)

        training.fit_round(model, rows, spec, round=1, num_rounds=1, order=order, dropout=order("dropout"))
        return model

    def fresh(self) -> nn.Module:
        """The model before any training."""
        return loading.load_model(self.recipe.model, self.recipe.adapter, self.recipe.seed)

    def held_out(self, number: int) -> list[Example]:
        """The same rows for every seed."""
        rows = [row for share in self.sites.corpus.shares for row in share.test]
        rows.sort(key=lambda row: json.dumps(dict(row), sort_keys=True))
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        return self.sites.corpus.renderer([rows[at] for at in order[:number]])

    @property
    def bytes(self) -> float:
        """Bytes that a client sent and received in the whole run, mean over clients."""
        ways = (self.ledger.per_client(way) for way in ("up", "down"))
        return sum(statistics.fmean(by_client.values()) for by_client in ways)


def changed(recipe: Recipe, *, distillation: str) -> Recipe:
    """The recipe with another server phase."""
    return replace(
        recipe, method=replace(recipe.method, fields={**recipe.method.fields, "distillation": distillation})
    )


def make_recipe(name: str, seed: int, shared: Path, folder: Path) -> Recipe:
    """FedPT on the data set: six clients skewed by its label, 15 % of the rows at the server."""
    text = TEXTS[name]
    steps = round(0.85 * text.rows / (ROUNDS * CLIENTS * BATCH))
    pair = {
        "shared": (str(shared / "models" / "small"), str(shared / "models" / "large")),
        "builtin": ("builtin:small", "builtin:large"),
    }[text.pair]
    data: dict[str, object] = {"max_length": 128, "public_share": 0.15, "template": text.template}
    if text.folder:
        for split, file, number in (("train", "train", text.rows), ("test", text.test, 2 * TEST_ROWS)):
            rows = read(shared / "data" / text.folder / f"{file}.jsonl.gz")
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed if split == "train" else 0))
            chosen = [usual(rows[at], text.template) for at in order[:number].tolist()]
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
        part = {"kind": "dirichlet", "column": "label", "num_clients": CLIENTS, "alpha": 1.0, "min_rows": 16}
        data |= {"source": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl"), "partition": part}
    else:
        part = {"kind": "dirichlet", "column": "client", "num_clients": CLIENTS, "alpha": 1.0, "min_rows": 16}
        data |= {"source": "pydocs", "options": {"train_rows": 96, "test_rows": 48}, "partition": part}
    table = {
        "name": name,
        "seed": seed,
        "rounds": ROUNDS,
        "model": {"path": pair[0]},
        "data": data,
        "method": {"name": "fedpt", "large": pair[1], "steps": 8},
        "train": {"steps": steps, "batch_size": BATCH, "lr": 2e-3},
    }
    return from_table(table)  # type: ignore[arg-type]


def read(path: Path) -> list[Row]:
    """The rows of a packed JSON-lines file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def usual(row: Row, template: str) -> dict[str, str]:
    """A row of any of the data sets in the usual columns; talks are continued where the template is bare, else asked for."""
    if "label_name" in row:
        words = str(row["label_name"]).replace("_", " ")
        return {"instruction": str(row["text"]), "response": words, "label": str(row["label_name"])}
    if "definition" in row:
        answers = cast(list[str], row["output"])
        return {
            "instruction": str(row["definition"]),
            "context": str(row["input"]),
            "response": answers[0],
            "label": str(row["task"]),
        }
    if "services" in row:
        said, label = str(row["context"]), str(cast(list[str], row["services"])[0])
        asked = {"instruction": "Write the assistant's next reply in this talk.", "context": said}
        if template == "bare":
            asked = {"instruction": f"{said}\nAssistant:"}
        return {**asked, "response": str(row["response"]), "label": label}
    return {**{key: str(row[key]) for key in ("instruction", "context", "response")}, "label": str(row["category"])}


def table(lines: list[dict[str, object]]) -> str:
    """Means over seeds with 95 % intervals, the share of the gap, and forecast beside truth."""
    out, right, judged = [], 0, 0
    for name in TEXTS:
        parts = {part: {line["seed"]: line for line in lines if (line["dataset"], line["part"]) == (name, part)}
                 for part in PARTS}  # fmt: skip
        some, large = parts["steered"], parts["direct"]
        if not some:
            continue
        out.append(f"{name}, {len(some)} seeds ({len(large)} direct): loss (nats per token), accuracy")
        for row in ROWS:
            of = [line for part in (some, large) for line in part.values() if row in cast(Figures, line["loss"])]
            if of:
                shares = spread([100 * number(line, "accuracy", row) for line in of], 1)
                out.append(f"  {row:<18}{spread([number(line, 'loss', row) for line in of])}  {shares} %")
        out += differences(some, large)
        said = [bool(cast(Figures, line["forecast"])["pays"]) for line in some.values()]
        held = [bool(line["pays"]) for line in some.values()]
        right += (statistics.fmean(said) >= 0.5) == (statistics.fmean(held) >= 0.5)
        judged += 1
        out.append(f"  forecast by seed: {words(said)}; truth: {words(held)}")
    out.append(f"forecast right on {right} of {judged} data sets (majority of seeds)")
    out.append(f"{sum(cast(float, line['cpu_seconds']) for line in lines):.0f} CPU-seconds")
    return "\n".join(out)


def differences(some: Mapping[object, Line], large: Mapping[object, Line]) -> list[str]:
    """What differs between rows of one seed: means and intervals over seeds."""

    def below(row: str, other: str) -> str:
        return spread([number(line, "loss", other) - number(line, "loss", row) for line in some.values()])

    out = [
        f"  FedPT below its small model by {below('FedPT', 'small FedAvg')}, below the large base by "
        f"{below('FedPT', 'large base')}",
        f"  distillation lowers the small model by {below('small, distilled', 'small FedAvg')}",
    ]
    seeds = [seed for seed in some if seed in large]
    if seeds:
        gap = []
        for seed in seeds:
            base, best = number(some[seed], "loss", "large base"), number(large[seed], "loss", "large FedAvg")
            gap.append((base - number(some[seed], "loss", "FedPT")) / (base - best))
        out.append(f"  share of the gap from large base to large FedAvg: {spread(gap)}")
        sent = [cast(float, part[seeds[0]]["bytes_per_client"]) for part in (some, large)]
        out.append(f"  bytes per client: FedPT {sent[0]:,.0f}, large FedAvg {sent[1]:,.0f} ({sent[1] / sent[0]:.1f}x)")
    return out


def number(line: Mapping[str, object], table: str, row: str) -> float:
    """One figure."""
    return cast(Mapping[str, float], line[table])[row]


def spread(values: list[float], digits: int = 3) -> str:
    """Mean and 95 % interval over seeds."""
    ends = evaluation.interval(values)
    range_ = f" [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]" if ends else ""
    return f"{statistics.fmean(values):.{digits}f}{range_}"


def words(verdicts: list[bool]) -> str:
    """Verdicts in words."""
    return ", ".join("pays" if one else "does not pay" for one in verdicts)


if __name__ == "__main__":
    main()
