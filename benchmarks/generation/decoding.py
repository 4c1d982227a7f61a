"""Tokens per second of a proxy: the naive loop of three models, the shared forward, speculation, the large model alone.

The naive loop is that of the public proxy-tuning code: three whole models, one step each per token, each with its KV
cache. Time is measured with random weights in real shapes (`--large`, `--small`: layers x width), because the embedded
pair is so small that Python dominates. With random weights a draft stands by chance only, so a rule that costs the same
decides by the models' first guesses whether the target follows the tuned model, at the rate that the trained pair
showed: `acceptance` is measured first, on the embedded pair after a short local training, and printed.

All ways are run in turn in one process and give the same tokens (checked); ratios are medians over the turns.

    python benchmarks/generation/decoding.py [--quick] [--json] [--acceptance 0.7] [--large 12x1024] [--small 6x384]
        [--threads 2] [--device cuda]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kilofed.config import tables
from kilofed.config.recipe import AdapterSpec, ModelSpec
from kilofed.federation.parties import generator
from kilofed.generation.decoding import ModelGenerator, Sampling
from kilofed.models import loading, training
from kilofed.proxy.combination import Difference
from kilofed.proxy.model import ProxyModel
from kilofed.proxy.speculation import Drafting, Speculation
from kilofed.runs.sites import Sites

VOCABULARY = 32_000
PROMPT = 32


@dataclass(frozen=True)
class Followed:
    """A target that follows the tuned model at a given rate and costs what `Difference` costs."""

    rate: float

    @property
    def needs_base(self) -> bool:
        return True

    def __call__(self, large: Tensor, tuned: Tensor, base: Tensor) -> Tensor:
        scores = large + (tuned - base)  # Paid for, like the real rule.
        mark = large.argmax(-1) * 7919 + tuned.argmax(-1) * 104_729 + base.argmax(-1) * 1_299_709
        follows = (mark % 1000) < self.rate * 1000
        return torch.where(follows[..., None], tuned, tuned.roll(1, -1)) + 0 * scores


def random_model(shape: str, seed: int, device: str) -> PreTrainedModel:
    """A Llama of `layers x width` with heads of 64; in bfloat16 unless it is on the CPU."""
    layers, width = map(int, shape.split("x"))
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.1,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    return model.to(torch.device(device), torch.float32 if device == "cpu" else torch.bfloat16)  # type: ignore[arg-type]


def adapted(base: PreTrainedModel, seed: int) -> nn.Module:
    """The small model with a LoRA adapter that does something."""
    small = loading.add_adapter(base, AdapterSpec(rank=8, alpha=16.0), seed)
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.01)
    return small.requires_grad_(False)


@torch.inference_mode()
def naive(
    large: nn.Module, tuned: nn.Module, base: nn.Module, rule: Callable[..., Tensor], prompt: list[int], count: int
) -> Iterator[int]:
    """Three whole models, a step of each per token."""
    parts = (large, tuned, base)
    caches: list[object] = [None, None, None]
    device = next(large.parameters()).device
    ids = torch.tensor([prompt], device=device)
    for _ in range(count):
        logits = []
        for number, part in enumerate(parts):
            out = part(input_ids=ids, past_key_values=caches[number], use_cache=True, logits_to_keep=1)
            caches[number] = out.past_key_values
            logits.append(out.logits[0, -1])
        token = int(rule(*logits).argmax())
        yield token
        ids = torch.tensor([[token]], device=device)


def acceptance(rows: int, steps: int, tokens: int) -> dict[str, float]:
    """Share of drafts that stand on the embedded pair: the small one trained for `steps` steps on package docs."""
    plan = tables.load(
        "tiny",
        {
            "rounds": 1,
            "train.steps": steps,
            "data.partition.kind": "iid",
            "data.partition.num_clients": 1,
            "data.options": {"train_rows": 100, "test_rows": 20},
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
    proxy = ProxyModel(loading.load_base(ModelSpec("builtin:large")), small, rule=Difference(1.0))
    found = {}
    for name, temperature in (("greedy", 0.0), ("drawn", 1.0)):
        drafted = accepted = 0
        for seed, example in enumerate(sites.corpus.test_examples(0)[:rows]):
            run = Speculation(proxy, Sampling(tokens, temperature, seed=seed), Drafting(longest=4, shortest=4))
            list(run.tokens(example.prompt_ids))
            drafted, accepted = drafted + run.num_drafted, accepted + run.num_accepted
        found[name] = accepted / max(drafted, 1)
    return found


class Ways:
    """The same answer, made in different ways."""

    def __init__(self, large: str, small: str, rate: float, device: str) -> None:
        self.large = random_model(large, 0, device)
        self.tuned, self.base = adapted(random_model(small, 1, device), 2), random_model(small, 1, device)
        self.rule = Followed(rate)
        self.proxy = ProxyModel(self.large, self.tuned, rule=self.rule)
        self.ratio = self.large.num_parameters() / self.base.num_parameters()
        self.last: Speculation | None = None

    def run(self, way: str, prompt: list[int], count: int) -> list[int]:
        """The answer's tokens, `count` of them."""
        sampling = Sampling(max_new_tokens=count)
        if way == "naive":
            return list(naive(self.large, self.tuned, self.base, self.rule, prompt, count))
        if way == "large alone":
            return [token.id for token in ModelGenerator(self.large, ()).generate_tokens(prompt, sampling)]
        if way == "shared":
            return [
                token.id for token in ModelGenerator(self.proxy, self.proxy.end_ids).generate_tokens(prompt, sampling)
            ]
        self.last = Speculation(self.proxy, sampling, Drafting())
        return [token.id for token in self.last.tokens(prompt)]


WAYS = ("naive", "shared", "speculative", "large alone")


def race(ways: Ways, turns: int, count: int) -> dict[str, object]:
    """Tokens per second of each way and the ratios of the turns; the first turn warms up and is not counted."""
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    equal, drafted, accepted = True, 0, 0
    for turn in range(turns + 1):
        prompt = torch.randint(3, VOCABULARY, (PROMPT,), generator=torch.Generator().manual_seed(turn)).tolist()
        answers = {}
        for way in WAYS:
            began = time.perf_counter()
            answers[way] = ways.run(way, prompt, count)
            if turn:
                rates[way].append(count / (time.perf_counter() - began))
        equal &= answers["naive"] == answers["shared"] == answers["speculative"]
        assert ways.last is not None
        drafted, accepted = drafted + ways.last.num_drafted, accepted + ways.last.num_accepted
    ratio = {
        f"speculative / {other}": statistics.median(
            a / b for a, b in zip(rates["speculative"], rates[other], strict=True)
        )
        for other in ("naive", "shared", "large alone")
    }
    ratio["shared / naive"] = statistics.median(a / b for a, b in zip(rates["shared"], rates["naive"], strict=True))
    return {
        "tokens_per_second": {way: statistics.median(found) for way, found in rates.items()},
        "ratios": ratio,
        "equal_tokens": equal,
        "accepted": accepted / max(drafted, 1),
    }


@torch.inference_mode()
def batches(ways: Ways, sizes: list[int], count: int) -> dict[int, float]:
    """Milliseconds per token and row of `ProxyModel.generate`, by batch size."""
    found = {}
    for size in sizes:
        ids = torch.randint(3, VOCABULARY, (size, PROMPT), generator=torch.Generator().manual_seed(size))
        ids = ids.to(ways.large.device)
        began = time.perf_counter()
        ways.proxy.generate(input_ids=ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        found[size] = 1000 * (time.perf_counter() - began) / (size * count)
    return found


def main() -> None:
    """Print the tables, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--acceptance", type=float, help="rate to race at; default: the greedy one measured")
    parser.add_argument("--large", default="12x1024", help="layers x width")
    parser.add_argument("--small", default="6x384", help="layers x width")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    trained = acceptance(*((6, 20, 24) if asked.quick else (60, 200, 48)))
    rate = trained["greedy"] if asked.acceptance is None else asked.acceptance
    ways = Ways(asked.large, asked.small, rate, asked.device)
    figures = race(ways, *((2, 16) if asked.quick else (15, 96)))
    sizes = batches(ways, *(([1, 4], 8) if asked.quick else ([1, 2, 4, 8, 16], 64)))
    row = {"acceptance": trained, "raced_at": rate, "size_ratio": ways.ratio, **figures, "ms_per_token": sizes}
    if asked.json:
        print(json.dumps(row))
        return
    print(f"embedded pair, drafts that stand: greedy {trained['greedy']:.3f}, drawn {trained['drawn']:.3f}")
    print(f"random weights, {asked.large} and {asked.small}, size ratio {ways.ratio:.1f}, raced at {rate:.3f}")
    for way, speed in figures["tokens_per_second"].items():  # type: ignore[attr-defined]
        print(f"{way:12} {speed:8.2f} tokens/s")
    for name, value in figures["ratios"].items():  # type: ignore[attr-defined]
        print(f"{name:26} {value:6.2f}")
    print(f"equal tokens: {figures['equal_tokens']}; drafts that stood in the race: {figures['accepted']:.3f}")
    print("ms per token and row by batch size: " + ", ".join(f"{size}: {ms:.1f}" for size, ms in sizes.items()))


if __name__ == "__main__":
    main()
