"""What a proxy loses when the large model tells its k likeliest tokens only, as APIs do: k = 5, 20, 100, full.

The embedded pair on held-out package documentation; the small model is trained on it for a few steps first. Three rules
for the tokens that were not told: shared as the small base shares them (`complete`), all alike, and ruled out.

    python benchmarks/proxy/top_k.py [--quick] [--json]
"""

import argparse
import json
from collections.abc import Callable

import torch
from torch import Tensor

from kilofed.config import tables
from kilofed.config.recipe import ModelSpec
from kilofed.data.examples import IGNORED
from kilofed.federation.parties import generator
from kilofed.models import loading, training
from kilofed.proxy.combination import combine, complete
from kilofed.runs.sites import Sites

Rule = Callable[[Tensor, Tensor], Tensor]
RULES: dict[str, Rule] = {
    "as the base": complete,
    "all alike": lambda seen, base: complete(seen, torch.zeros_like(base)),
    "ruled out": lambda seen, base: seen,
}


def told(logits: Tensor, k: int) -> Tensor:
    """What an API tells of `logits` (N, V): the k largest log-probabilities, -inf elsewhere."""
    best = logits.log_softmax(-1).topk(k)
    return torch.full_like(logits, -torch.inf).scatter(-1, best.indices, best.values)


def scores(rows: int, steps: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of large, tuned and base at the answers' positions, (N, V) each, and the tokens that came, (N,)."""
    options = {"train_rows": 100, "test_rows": max(rows // 5, 4)}
    plan = tables.load(
        "tiny",
        {
            "train.steps": steps,
            "data.partition.kind": "iid",
            "data.partition.num_clients": 1,
            "data.options": options,
        },
    )
    sites = Sites(plan)
    small = loading.load_model(plan.model, plan.adapter, plan.seed)
    training.fit_round(
        small,
        sites.corpus.train_examples(0),
        plan.train,
        round=1,
        num_rounds=1,
        order=lambda name: generator(plan.seed, 0, 0, name),
        dropout=torch.Generator(),
    )
    large = loading.load_base(ModelSpec("builtin:large"))
    batch = training.collate_tokens(sites.corpus.test_examples(0)[:rows])
    learnt = batch.labels[:, 1:] != IGNORED

    @torch.no_grad()
    def at_answers(model: torch.nn.Module) -> Tensor:
        out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return out[:, :-1][learnt].float()

    with loading.without_adapter(small):
        base = at_answers(small)
    return at_answers(large), at_answers(small), base, batch.labels[:, 1:][learnt]


def measure(rows: int, steps: int) -> list[dict[str, float | str]]:
    """One line per k and rule: loss, its excess over the full scores, KL from them, and how often the first guess stays."""
    large, tuned, base, targets = scores(rows, steps)
    full = combine(large, tuned, base, 1.0).log_softmax(-1)
    whole = torch.nn.functional.nll_loss(full, targets)
    found: list[dict[str, float | str]] = []
    for k in (5, 20, 100, large.shape[-1]):
        for name, rule in RULES.items():
            part = combine(rule(told(large, k), base), tuned, base, 1.0).log_softmax(-1)
            loss = torch.nn.functional.nll_loss(part, targets)
            kl = (full.exp() * (full - part)).sum(-1).mean()
            same = (part.argmax(-1) == full.argmax(-1)).float().mean()
            row = {"k": k, "loss": float(loss), "excess": float(loss - whole), "kl": float(kl), "same": float(same)}
            found.append({"rule": name, **row})
    return found


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(*((40, 20) if asked.quick else (400, 200)))
    if asked.json:
        print(json.dumps(found))
        return
    print(f"{'k':>6} {'unseen tokens':14} {'loss':>8} {'excess':>8} {'KL':>8} {'same guess':>11}")
    for row in found:
        print(
            f"{row['k']:>6} {row['rule']:14} {row['loss']:8.4f} {row['excess']:8.4f} {row['kl']:8.4f} {row['same']:11.3f}"
        )


if __name__ == "__main__":
    main()
