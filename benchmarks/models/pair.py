"""What the embedded pair knows: loss on held-out package documentation, and facts of the gazetteer."""

import argparse
import json
import random
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kilofed.data.sources import gazetteer, pydocs

ASSETS = Path(pydocs.__file__).parents[2] / "assets"
BATCH = 32
IGNORED = -100


def documents(rows_per_family: int) -> list[tuple[str, str]]:
    """Held-out functions of every family here, as (name and signature, summary line)."""
    families = list(pydocs.installed())
    rows = pydocs.load(seed=0, train_rows=1, test_rows=rows_per_family, families=families).test
    return [(row["context"].split("\n")[0] + "\n", row["response"]) for row in rows]


def documentation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, str]]
) -> dict[str, float]:
    """Mean loss in nats per token of the summary line given the signature, and of the whole text."""
    texts = [(_ids(tokenizer, prompt), _ids(tokenizer, f"{answer}\n")[:-1]) for prompt, answer in pairs]
    whole: list[Tensor] = []
    answers: list[Tensor] = []
    for start in range(0, len(texts), BATCH):
        part = texts[start : start + BATCH]
        losses_BT, _ = _forward(model, [[1, *prompt, *answer, 2][:512] for prompt, answer in part])
        for row, (prompt, answer) in zip(losses_BT, part, strict=True):
            end = min(len(prompt) + len(answer), 511)
            whole.append(row[:end])
            answers.append(row[len(prompt) : end])
    return {"document_loss": torch.cat(whole).mean().item(), "summary_loss": torch.cat(answers).mean().item()}


def knowledge(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, probes: list[gazetteer.Probe], end: str = "."
) -> dict[str, float]:
    """Share of probes whose greedy completion is exactly the answer and what ends it."""
    right = []
    for start in range(0, len(probes), BATCH):
        part = probes[start : start + BATCH]
        prompts = [[1, *_ids(tokenizer, probe.prompt)] for probe in part]
        answers = [_ids(tokenizer, f" {probe.answer}{end}") for probe in part]
        _, hits_BT = _forward(model, [a + b for a, b in zip(prompts, answers, strict=True)])
        for row, prompt, answer in zip(hits_BT, prompts, answers, strict=True):
            first = len(prompt) - 1
            right.append(bool(row[first : first + len(answer)].all()))
    return {"exact": sum(right) / len(right)}


def questions(group: str) -> list[gazetteer.Probe]:
    """Questions about the entities of a group, in the form that pre-training used for the `shown` ones."""
    return [gazetteer.Probe(f"Q: {text}\nA:", fact.answer, (), fact) for text, fact in gazetteer.questions(group)]


def ranks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, probes: list[gazetteer.Probe]
) -> dict[str, float]:
    """Where the right answer stands among all answers of its type: share of first places, and mean rank."""
    places = []
    for probe in probes:
        prompt = [1, *_ids(tokenizer, probe.prompt)]
        answers = [_ids(tokenizer, f" {candidate}.") for candidate in probe.candidates]
        losses_BT, _ = _forward(model, [prompt + answer for answer in answers])
        first = len(prompt) - 1
        totals = [
            row[first : first + len(answer)].sum().item() for row, answer in zip(losses_BT, answers, strict=True)
        ]
        right = totals[probe.candidates.index(probe.answer)]
        places.append(1 + sum(total < right for total in totals))
    return {"first": places.count(1) / len(places), "mean_rank": sum(places) / len(places)}


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@torch.no_grad()
def _forward(model: PreTrainedModel, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Loss of, and greedy agreement with, each next token: (rows, longest - 1), padded at the right."""
    longest = max(len(row) for row in rows)
    ids_BT = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    logits_BTV = model(input_ids=ids_BT).logits[:, :-1].float()
    targets_BT = ids_BT[:, 1:]
    losses = torch.nn.functional.cross_entropy(logits_BTV.transpose(1, 2), targets_BT, reduction="none")
    return losses, logits_BTV.argmax(-1) == targets_BT


def measure(directory: Path, *, rows_per_family: int, num_probes: int, num_ranked: int) -> dict[str, float]:
    """All figures of the model in a directory; `unseen` wordings were not in pre-training, `stated` were."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    figures = {"parameters": float(model.num_parameters())}
    figures |= documentation(model, tokenizer, documents(rows_per_family))
    for name, unseen in (("unseen", True), ("stated", False)):
        probes = random.Random(0).sample(gazetteer.probes(unseen=unseen), num_probes)
        figures[f"known_{name}"] = knowledge(model, tokenizer, probes)["exact"]
    asked = questions("test")
    asked = random.Random(2).sample(asked, min(num_probes, len(asked)))
    figures["known_asked"] = knowledge(model, tokenizer, asked, end="")["exact"]
    ranked = ranks(model, tokenizer, random.Random(1).sample(gazetteer.probes(), num_ranked))
    return figures | {"rank_first": ranked["first"], "mean_rank": ranked["mean_rank"]}


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer documents and probes, under a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--assets", type=Path, default=ASSETS, help="folder with small/ and large/")
    asked = parser.parse_args()
    began = time.perf_counter()
    size = {"rows_per_family": 5, "num_probes": 96, "num_ranked": 8} if asked.quick else None
    size = size or {"rows_per_family": 60, "num_probes": len(gazetteer.probes()), "num_ranked": 128}
    figures = {name: measure(asked.assets / name, **size) for name in ("small", "large")}
    gap = figures["small"]["document_loss"] - figures["large"]["document_loss"]
    seconds = time.perf_counter() - began
    if asked.json:
        print(json.dumps({**figures, "document_gap": gap, "sizes": size, "seconds": seconds}))
        return
    print(f"{'':<16}{'small':>14}{'large':>14}")
    for name in figures["small"]:
        print(f"{name:<16}" + "".join(f"{row[name]:>14,.3f}" for row in figures.values()))
    print(f"large is {gap:.3f} nats better on held-out documentation; {seconds:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
