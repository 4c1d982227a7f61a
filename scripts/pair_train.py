"""Train one model of the pair on a token stream: resumable, logged, exported as it goes."""

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from muon import Muon

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks" / "models"))
import pair

SEED = 20
VOCABULARY = 4096
LENGTH = 512
SHAPES = {
    "small": {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256},
    "large": {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 512},
}


@dataclass(frozen=True)
class Plan:
    """Everything that decides a model's weights, beside the corpus."""

    size: str
    tokens: int
    """Training tokens; the learning rate falls over the last `decay` of them."""
    batch: int = 4
    """Sequences of 512 per step."""
    muon_lr: float = 0.02
    adam_lr: float = 4e-3
    decay: float = 0.4
    warmup: int = 40
    seed: int = SEED


def train(work: Path, plan: Plan, *, assets: Path, every: int) -> None:
    """Train to the plan's end, resuming from the checkpoint; log, save and export every `every` steps."""
    torch.set_num_threads(1)
    torch.manual_seed(plan.seed)
    model = build(plan.size)
    optimisers = _optimisers(model, plan)
    stream = np.load(work / f"{plan.size}.npy")
    step = _resume(work, plan, model, optimisers)
    total = plan.tokens // (plan.batch * LENGTH)
    losses: list[float] = []
    began = time.perf_counter()
    while step < total:
        rate = _rate(step, total, plan)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * rate
        losses.append(_step(model, optimisers, _batch(stream, step, plan)))
        step += 1
        if step % every == 0 or step == total:
            _save(work, plan, model, optimisers, step)
            seconds = time.perf_counter() - began
            speed = len(losses) * plan.batch * LENGTH / seconds
            losses_since = losses[-every:]
            report = {"step": step, "tokens": step * plan.batch * LENGTH}
            report |= {"train_loss": sum(losses_since) / len(losses_since), "tokens_per_second": speed}
            report |= _validate(model, work)
            with (work / f"{plan.size}.jsonl").open("a") as log:
                log.write(json.dumps(report) + "\n")
            print(json.dumps(report), file=sys.stderr, flush=True)
            write_model(model, work, assets / plan.size)


def build(size: str) -> LlamaForCausalLM:
    """A fresh model of that size."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            **SHAPES[size],
            num_key_value_heads=SHAPES[size]["num_attention_heads"],
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            attn_implementation="sdpa",
        )
    )


def _optimisers(model: LlamaForCausalLM, plan: Plan) -> list[torch.optim.Optimizer]:
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in named.items() if p.ndim != 2 or "embed" in name]
    muon = Muon(matrices, lr=plan.muon_lr)
    adam = torch.optim.AdamW(rest, lr=plan.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    for optimiser, peak in ((muon, plan.muon_lr), (adam, plan.adam_lr)):
        for group in optimiser.param_groups:
            group["peak"] = peak
    return [muon, adam]


def _rate(step: int, total: int, plan: Plan) -> float:
    """Warm up, hold, fall linearly to a twentieth; while it holds, a run can be given another length."""
    fall = max(1, int(total * plan.decay))
    return min((step + 1) / plan.warmup, 1.0, max(0.05, (total - step) / fall))


def _batch(stream: np.ndarray, step: int, plan: Plan) -> torch.Tensor:
    """Rows of the stream in a seeded order, another order for each pass."""
    rows = (len(stream) - 1) // LENGTH
    chosen = []
    for index in range(step * plan.batch, (step + 1) * plan.batch):
        order = np.random.default_rng([plan.seed, index // rows]).permutation(rows)
        start = int(order[index % rows]) * LENGTH
        chosen.append(stream[start : start + LENGTH + 1])
    return torch.from_numpy(np.stack(chosen).astype(np.int64))


def _step(model: LlamaForCausalLM, optimisers: list[torch.optim.Optimizer], ids_BT: torch.Tensor) -> float:
    logits_BTV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits
    loss = cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimiser in optimisers:
        optimiser.step()
        optimiser.zero_grad()
    return loss.item()


@torch.no_grad()
def _validate(model: LlamaForCausalLM, work: Path) -> dict[str, float]:
    """Loss on the held-out stream and knowledge of a fixed sample of the gazetteer."""
    model.eval()
    stream = np.load(work / "held_out.npy")[: 16 * LENGTH + 1].astype(np.int64)
    rows = torch.from_numpy(stream[: (len(stream) - 1) // LENGTH * LENGTH].reshape(-1, LENGTH))
    logits_BTV = model(input_ids=rows).logits[:, :-1]
    loss = cross_entropy(logits_BTV.flatten(0, 1), rows[:, 1:].flatten()).item()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    figures = {"held_out_loss": loss}
    for name, unseen in (("unseen", True), ("stated", False)):
        figures[f"known_{name}"] = pair.knowledge(model, tokenizer, pair.gazetteer.probes(unseen=unseen)[::4])["exact"]
    model.train()
    return figures


def _save(work: Path, plan: Plan, model: LlamaForCausalLM, optimisers: list[torch.optim.Optimizer], step: int) -> None:
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimisers": [item.state_dict() for item in optimisers],
    }
    torch.save(state, work / f"{plan.size}.partial")
    os.replace(work / f"{plan.size}.partial", work / f"{plan.size}.checkpoint")
    (work / f"{plan.size}.plan.json").write_text(json.dumps(asdict(plan)))


def _resume(work: Path, plan: Plan, model: LlamaForCausalLM, optimisers: list[torch.optim.Optimizer]) -> int:
    path = work / f"{plan.size}.checkpoint"
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
        optimiser.load_state_dict(saved)
    return int(state["step"])


def write_model(model: LlamaForCausalLM, work: Path, folder: Path) -> None:
    """Write weights in bf16, configuration and tokeniser; each file is replaced in one step."""
    scratch = work / f"export-{folder.name}"
    folder.mkdir(parents=True, exist_ok=True)
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0, max_length=LENGTH)
    copy.to(torch.bfloat16).save_pretrained(scratch)
    PreTrainedTokenizerFast.from_pretrained(work / "tokenizer").save_pretrained(scratch)
    for path in sorted(scratch.iterdir()):
        path.chmod(0o644)
        os.replace(path, folder / path.name)
