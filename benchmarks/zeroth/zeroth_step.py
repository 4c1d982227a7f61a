"""What a zeroth-order step costs beyond its two forwards: time at 100M parameters or more, peak memory at 300M or more.

    python benchmarks/zeroth/zeroth_step.py [--quick] [--json]

Models have LLaMA's architecture and random weights. Time: a step and two bare forwards of the same model and batch run
in turn; the ratio is the median over pairs. Memory: peak resident set (VmHWM) of one process that only runs forwards and
of one that only takes steps. A step rebuilds every weight for both of its forwards, so its overhead is largest for few
tokens per step; the paper uses one example of up to 1,024 tokens.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kilofed.costs import environment
from kilofed.models import loading, training
from kilofed.zeroth import two_point
from kilofed.zeroth.directions.pool import SeedPool

NUM_SEEDS = 4096
SHAPES = {
    "116M": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 2048},
    "341M": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 2816},
}
STEPS = two_point.StepSettings(eps=5e-4, lr=1e-7)


def build(shape: str, dtype: str) -> LlamaForCausalLM:
    config = LlamaConfig(**SHAPES[shape], vocab_size=32_000, tie_word_embeddings=True, max_position_embeddings=2048)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        return LlamaForCausalLM(config).eval().requires_grad_(True)
    finally:
        torch.set_default_dtype(usual)


def batch_of(tokens: int) -> training.TokenBatch:
    ids = torch.randint(3, 32_000, (1, tokens), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : tokens // 2] = -100
    return training.TokenBatch(ids, torch.ones_like(ids), labels)


def step_runner(model: LlamaForCausalLM, batch: training.TokenBatch) -> Callable[[], float]:
    """One step from a point whose coefficients are all in use, as in the middle of a run."""
    perturbed = two_point.PerturbedModel(model, loading.trained(model), NUM_SEEDS)
    a = np.random.default_rng(0).normal(scale=1e-5, size=NUM_SEEDS).astype(np.float32)
    point = two_point.Point((SeedPool(NUM_SEEDS, 7).at(a),))
    return lambda: two_point.projected_gradient(perturbed, point, 11, batch, STEPS)[1]


def forwards(model: LlamaForCausalLM, batch: training.TokenBatch) -> Callable[[], float]:
    def run() -> float:
        with torch.inference_mode():
            return sum(float(training.loss(model, batch)) for _ in range(2)) / 2

    return run


def timed(run: Callable[[], float]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def time_rows(lengths: list[int], pairs: int) -> list[dict[str, object]]:
    model = build("116M", "float32")
    rows = []
    for tokens in lengths:
        step, bare = step_runner(model, batch_of(tokens)), forwards(model, batch_of(tokens))
        timed(step), timed(bare)
        found = [(timed(step), timed(bare)) for _ in range(pairs)]
        rows.append(
            {
                "parameters": sum(p.numel() for p in model.parameters()),
                "tokens": tokens,
                "step_s": round(statistics.median(s for s, _ in found), 4),
                "forwards_s": round(statistics.median(f for _, f in found), 4),
                "ratio": round(statistics.median(s / f for s, f in found), 3),
            }
        )
    return rows


def peak(shape: str, dtype: str, what: str, tokens: int) -> int:
    """Largest resident set of a fresh process that runs `what` three times, in bytes."""
    command = [sys.executable, __file__, "--child", shape, dtype, what, str(tokens)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout)


def child(shape: str, dtype: str, what: str, tokens: str) -> None:
    model, batch = build(shape, dtype), batch_of(int(tokens))
    run = step_runner(model, batch) if what == "step" else forwards(model, batch)
    for _ in range(3):
        run()
    print(environment.own_peak_memory())


def memory_rows(dtypes: list[str], tokens: int) -> list[dict[str, object]]:
    rows = []
    for dtype in dtypes:
        step, bare = (peak("341M", dtype, what, tokens) for what in ("step", "forwards"))
        rows.append(
            {
                "shape": "341M",
                "dtype": dtype,
                "tokens": tokens,
                "step_MB": round(step / 1e6),
                "inference_MB": round(bare / 1e6),
                "ratio": round(step / bare, 3),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one length, five pairs, float32 only")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return
    times = time_rows([512] if options.quick else [128, 512, 1024], 5 if options.quick else 11)
    memory = memory_rows(["float32"] if options.quick else ["float32", "bfloat16"], 128 if options.quick else 512)
    if options.json:
        print(json.dumps({"time": times, "memory": memory}))
        return
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for rows in (times, memory):
        print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
        for row in rows:
            print(
                "| "
                + " | ".join(f"{value:,}" if isinstance(value, int) else str(value) for value in row.values())
                + " |"
            )


if __name__ == "__main__":
    main()
