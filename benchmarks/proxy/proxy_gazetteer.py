"""The case that FedPT exists for: clients know the form of an answer, a black-box large model knows the facts.

Clients hold questions and answers on some entities of a fictional world; the test asks about entities of which no client
has a row and which the large model met in pre-training, as plain sentences. Exact match after every round, equal rounds
and local steps for all: the large base (as it stands, and at its best chance: its answer is cut where it should have
ended), the small model by FedAvg, the steered large model at several strengths, without and with distillation, and the
large model tuned directly by FedAvg. Exact match is that of greedy answers, read from one forward per row.

Where it does not carry, ranks show which part fails: whether the right answer is first among all answers of its type.

    python benchmarks/proxy/proxy_gazetteer.py [--quick] [--json] [--seeds 3] [--rounds 6] [--templates qa,plain]
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from kilofed.config.recipe import Recipe
from kilofed.config.tables import from_table
from kilofed.data.examples import IGNORED, Example
from kilofed.data.sources import gazetteer
from kilofed.methods.fedpt import FedPT
from kilofed.models import loading, training
from kilofed.proxy.combination import combine
from proxy_text import Job, changed, spread

ALPHAS = (0.5, 1.0, 1.5, 2.0)
RANKED = 48
BATCH = 64


def main() -> None:
    """Print the tables, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, two rounds, one form; under a minute")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--templates", default="qa,plain", help="qa is what the large model read, plain is not")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds, rounds, forms = options.seeds, options.rounds, options.templates.split(",")
    if options.quick:
        seeds, rounds, forms = 1, 2, ["qa"]
    found = {form: [measure(form, seed, rounds) for seed in range(seeds)] for form in forms}
    print(json.dumps(found) if options.json else "\n\n".join(table(form, lines) for form, lines in found.items()))


def measure(template: str, seed: int, rounds: int) -> dict[str, object]:
    """One seed: shares of exact answers after every round, and ranks after the last."""
    began = time.process_time()
    recipe = make_recipe(template, seed, rounds)
    plain, distilled = Job(changed(recipe, distillation="none")), Job(changed(recipe, distillation="forward"))
    large = Job(
        from_table({**as_table(template, seed, rounds), "model": {"path": "builtin:large"}, "method": "fedavg"})
    )
    held_out = plain.held_out(1000)
    base = cast(FedPT, plain.sites.method).presentation().extra_models(plain.server)["large base"]
    steered = Steered(plain, base, held_out)
    other = Steered(distilled, base, held_out)
    start: dict[str, float] = {
        "large base, as it stands": exact(steered.large, steered.targets),
        "large base, cut at its end": exact(steered.large, steered.targets, last=False),
    }
    curve = []
    for number in range(1, rounds + 1):
        for job in (plain, distilled, large):
            job.round(number)
        row = dict(start)
        row["small FedAvg"], by_alpha = steered.score()
        row |= {f"FedPT, alpha {alpha:g}": share for alpha, share in by_alpha.items()}
        row["FedPT, alpha of the server's rows"] = by_alpha[steered.choose()]
        row["small, distilled"], by_alpha = other.score()
        row["FedPT, distilled, alpha 1.5"] = by_alpha[1.5]
        tuned, targets = logits(large.sites.method.deliver(large.server), held_out)
        row["large FedAvg"] = exact(tuned, targets)
        curve.append(row)
    ranks = rank_rows(plain, large, base)
    kept = distilled.server.state["server.phases"][:, 3].mean().item()
    sent = {"FedPT": plain.bytes, "large FedAvg": large.bytes}
    seconds = round(time.process_time() - began, 1)
    return {"curve": curve, "ranked_first": ranks, "kept": kept, "bytes_per_client": sent, "cpu_seconds": seconds}


class Steered:
    """A job's steered model on held-out rows and on the server's; what does not change is scored once."""

    def __init__(self, job: Job, base: nn.Module, held_out: list[Example]) -> None:
        self.job, self.held_out = job, held_out
        self.public = list(job.server.public)
        self.large, self.targets = logits(base, held_out)
        self.public_large, self.public_targets = logits(base, self.public)
        with loading.without_adapter(job.server.model) as untouched:
            self.base, _ = logits(untouched, held_out)
            self.public_base, _ = logits(untouched, self.public)

    def score(self) -> tuple[float, dict[float, float]]:
        """Exact match of the small tuned model, and of the steered one by strength."""
        tuned, _ = logits(cast(FedPT, self.job.sites.method).trained(self.job.server), self.held_out)
        joint = {alpha: self._joint(self.large, tuned, self.base, alpha) for alpha in ALPHAS}
        return exact(tuned, self.targets), {alpha: exact(one, self.targets) for alpha, one in joint.items()}

    def choose(self) -> float:
        """The strength with the least loss on the server's public rows."""
        tuned, _ = logits(cast(FedPT, self.job.sites.method).trained(self.job.server), self.public)
        targets = torch.cat(self.public_targets)
        losses = {}
        for alpha in ALPHAS:
            joint = torch.cat(self._joint(self.public_large, tuned, self.public_base, alpha))
            losses[alpha] = float(nn.functional.cross_entropy(joint, targets))
        return min(losses, key=lambda alpha: losses[alpha])

    @staticmethod
    def _joint(large: list[Tensor], tuned: list[Tensor], base: list[Tensor], alpha: float) -> list[Tensor]:
        return [combine(a, b, c, alpha) for a, b, c in zip(large, tuned, base, strict=True)]


@torch.inference_mode()
def logits(model: nn.Module, rows: Sequence[Example]) -> tuple[list[Tensor], list[Tensor]]:
    """Logits and targets of each row's answer, end token included."""
    scores: list[Tensor] = []
    targets: list[Tensor] = []
    for start in range(0, len(rows), BATCH):
        batch = training.collate_tokens(rows[start : start + BATCH])
        counts = (batch.labels[:, 1:] != IGNORED).sum(1).tolist()
        logits_NV, targets_N = training.token_logits(model, batch)
        scores += logits_NV.split(counts)
        targets += targets_N.split(counts)
    return scores, targets


def exact(scores: Sequence[Tensor], targets: Sequence[Tensor], *, last: bool = True) -> float:
    """Share of rows whose every token is the first guess; without `last` the end token does not count."""
    ends = [len(right) if last else len(right) - 1 for right in targets]
    hits = [
        bool((one[:end].argmax(-1) == right[:end]).all())
        for one, right, end in zip(scores, targets, ends, strict=True)
    ]
    return sum(hits) / len(hits)


def rank_rows(plain: Job, large: Job, base: nn.Module) -> dict[str, float]:
    """Share of held-out questions whose right answer is scored highest among all answers of its type."""
    rows = [row for share in plain.sites.corpus.shares for row in share.test]
    rows = rows[:: max(len(rows) // RANKED, 1)]
    answers: dict[str, set[str]] = {}
    for fact in gazetteer.facts():
        answers.setdefault(fact.attribute, set()).add(fact.answer)
    first = dict.fromkeys(("large base", "small FedAvg", "FedPT, alpha 1", "large FedAvg"), 0)
    for row in rows:
        names = sorted(answers[str(row["attribute"])])
        asked = plain.sites.corpus.renderer([{**row, "response": name} for name in names])
        large_scores, targets = logits(base, asked)
        tuned, _ = logits(cast(FedPT, plain.sites.method).trained(plain.server), asked)
        with loading.without_adapter(plain.server.model) as untouched:
            small, _ = logits(untouched, asked)
        direct, _ = logits(large.sites.method.deliver(large.server), asked)
        joint = [combine(a, b, c, 1.0) for a, b, c in zip(large_scores, tuned, small, strict=True)]
        for name, scores in zip(first, (large_scores, tuned, joint, direct), strict=True):
            losses = [
                # The end token is not the answer's: a base model never learnt to end.
                float(nn.functional.cross_entropy(one[:-1], right[:-1], reduction="sum"))
                for one, right in zip(scores, targets, strict=True)
            ]
            first[name] += names[losses.index(min(losses))] == row["response"]
    return {name: count / len(rows) for name, count in first.items()}


def as_table(template: str, seed: int, rounds: int) -> dict[str, object]:
    """The recipe as a table: all eight regions, a tenth of the rows at the server."""
    return {
        "name": "gazetteer",
        "seed": seed,
        "rounds": rounds,
        "model": {"path": "builtin:small"},
        "data": {
            "source": "gazetteer",
            "options": {"num_clients": 8},
            "template": template,
            "max_length": 64,
            "public_share": 0.1,
        },
        "method": {"name": "fedpt", "steps": 5, "alpha": 1.5},
        "train": {"steps": 5, "batch_size": 8, "lr": 2e-3},
    }


def make_recipe(template: str, seed: int, rounds: int) -> Recipe:
    """The recipe of the small model's federation."""
    return from_table(as_table(template, seed, rounds))  # type: ignore[arg-type]


def table(template: str, lines: list[dict[str, object]]) -> str:
    """Exact match by round with the share of the gap; ranks."""
    curves = [cast(list[dict[str, float]], line["curve"]) for line in lines]
    out = [f"questions in the form {template!r}, {len(lines)} seeds: exact match in %, mean and 95 % interval"]
    for number in range(len(curves[0])):
        out.append(f"round {number + 1}")
        for row in curves[0][number]:
            shares = [100 * curve[number][row] for curve in curves]
            out.append(f"  {row:<36}{spread(shares, 1)}")
        for start in ("as it stands", "cut at its end"):
            gaps = [gap for curve in curves if (gap := closed(curve[number], f"large base, {start}")) is not None]
            found = f"{spread(gaps, 1)} %" if len(gaps) == len(curves) else "large FedAvg is not above its parts yet"
            out.append(f"  closed of the gap to large FedAvg, large base {start}: {found}")
    out.append(f"right answer ranked first among its type (of {RANKED} or so), after the last round")
    for row in cast(Mapping[str, float], lines[0]["ranked_first"]):
        shares = [100 * cast(Mapping[str, float], line["ranked_first"])[row] for line in lines]
        out.append(f"  {row:<36}{spread(shares, 1)}")
    sent = cast(Mapping[str, float], lines[0]["bytes_per_client"])
    out.append(f"bytes per client: FedPT {sent['FedPT']:,.0f}, large FedAvg {sent['large FedAvg']:,.0f}")
    out.append(f"{sum(cast(float, line['cpu_seconds']) for line in lines):.0f} CPU-seconds")
    return "\n".join(out)


def closed(row: Mapping[str, float], base: str) -> float | None:
    """Percent of the way from the better part to the directly tuned model that the steered model goes; None: no way."""
    start, best = max(row[base], row["small FedAvg"]), row["large FedAvg"]
    ours = row["FedPT, alpha of the server's rows"]
    return 100 * (ours - start) / (best - start) if best > start else None


if __name__ == "__main__":
    main()
