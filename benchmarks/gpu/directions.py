"""Everything about directions that needs a GPU, in one go: equal bits, and the time of a rebuild.

    python benchmarks/gpu/directions.py [--quick] [--json]

Checks first: published vectors, the torch form and the CPU kernels, three dtypes, K from 1,024 to 65,536. Then rebuild
against a device copy of the same weights at the shapes of 1B and 7B models (bfloat16), and against the official replay
(one normal draw per parameter and seed, a few seeds timed, multiplied by K). Without a GPU the checks run in Triton's
interpreter when TRITON_INTERPRET=1 is set, and the timings are skipped.
"""

import argparse
import hashlib
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "zeroth"))

import plain_hsp1 as plain
from kilofed.zeroth.directions import cuda, reference
from kilofed.zeroth.directions.pool import SeedPool
from kilofed.zeroth.directions.spec import load_vectors
from kilofed.zeroth.directions.unstructured import official_direction

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KEY = 0xFEDCBA9876543210


def shapes(num_layers: int, width: int, inner: int, vocabulary: int) -> list[tuple[int, int]]:
    """Matrices of a Llama-like model; its vectors are negligible."""
    layer = [(width, width)] * 4 + [(inner, width)] * 3
    return [(vocabulary, width), *layer * num_layers]


MODELS = {"1B": shapes(16, 2048, 8192, 32000), "7B": shapes(32, 4096, 11008, 32000)}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32 if tensor.itemsize == 4 else torch.int16)


def device_rebuild(w0: torch.Tensor, a: np.ndarray, key: int, first_block: int, device: str) -> torch.Tensor:
    """By the kernel itself, so that the interpreter can be used on CPU tensors."""
    moved = w0.to(device, copy=True)
    cuda.rebuild(moved, moved, torch.from_numpy(a).to(device), key, first_block)
    return moved.cpu()


def check_vectors(device: str) -> str:
    """Published rebuild vectors."""
    count = 0
    for vector in load_vectors().rebuilds:
        if vector["num_seeds"] < 1024:
            continue
        a = plain.test_coefficients(vector["num_seeds"])
        if vector["moved"]:
            a[vector["moved"][0]] += np.float32(float.fromhex(vector["moved"][1]))
        w0 = torch.from_numpy(plain.test_weights(vector["num_elements"], vector["dtype"])).to(DTYPES[vector["dtype"]])
        out = device_rebuild(w0, a, int(vector["key"], 16), vector["first_block"], device)
        digest = hashlib.sha256(bits(out).numpy().tobytes()).hexdigest()
        if digest != vector["sha256"]:
            raise SystemExit(f"differs from the published vector: {vector}")
        count += 1
    return f"{count} vectors"


def check_cpu(device: str, num_elements: int) -> str:
    """The kernel and the torch form on the device against the CPU kernels."""
    for num_seeds in (1024, 2048, 4096, 8192, 16384, 65536):
        for dtype in DTYPES.values():
            generator = torch.Generator().manual_seed(num_seeds)
            w0 = (torch.randn(num_elements, generator=generator) * 0.02).to(dtype)
            a = (torch.randn(num_seeds, generator=generator) * 1e-4).numpy()
            expected = SeedPool(num_seeds, KEY).rebuild(w0, a, first_block=(1 << 32) - 1)
            for out in (
                device_rebuild(w0, a, KEY, (1 << 32) - 1, device),
                reference.rebuild(w0.to(device), torch.from_numpy(a).to(device), KEY, (1 << 32) - 1).cpu(),
            ):
                differing = int((bits(out) != bits(expected)).sum())
                if differing:
                    raise SystemExit(f"K={num_seeds} {dtype}: {differing} of {num_elements} elements differ")
    return f"K=1,024 to 65,536, three dtypes, {num_elements:,} elements each"


def milliseconds(run: Callable[[], object], repeats: int) -> list[float]:
    """Device time of single calls."""
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return times[3:]


def place(tensors: Iterable[torch.Tensor], num_seeds: int) -> list[int]:
    """First blocks of tensors that follow each other."""
    blocks, block = [], 0
    for tensor in tensors:
        blocks.append(block)
        block += -(-tensor.numel() // num_seeds)
    return blocks


def measure(model: str, repeats: int) -> dict[str, float | str]:
    """One row of timings, bfloat16; kernels alternate call by call."""
    w0 = [torch.randn(shape, dtype=torch.bfloat16, device="cuda") * 0.02 for shape in MODELS[model]]
    out = [torch.empty_like(tensor) for tensor in w0]
    runs: dict[str, Callable[[], object]] = {"copy": lambda: torch._foreach_copy_(out, w0)}
    for num_seeds in (1024, 4096, 16384):
        a = torch.randn(num_seeds, device="cuda") * 1e-5
        first_blocks = place(w0, num_seeds)

        def rebuild(a: torch.Tensor = a, first_blocks: list[int] = first_blocks) -> None:
            for source, target, block in zip(w0, out, first_blocks, strict=True):
                cuda.rebuild(source.view(-1), target.view(-1), a, KEY, block)

        runs[f"K={num_seeds}"] = rebuild
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name] += milliseconds(run, 1)
    row: dict[str, float | str] = {"model": model, "parameters": sum(tensor.numel() for tensor in w0)}
    for name, values in times.items():
        row[f"{name} ms"] = statistics.median(values)
        row[f"{name} / copy"] = statistics.median(v / c for v, c in zip(values, times["copy"], strict=True))
    out.clear()
    torch.cuda.empty_cache()

    def official() -> None:
        for tensor, z in zip(w0, official_direction(7, w0), strict=True):
            tensor.data = tensor.data - 1e-7 * z

    seed = statistics.median(milliseconds(official, 3))
    row["official ms/seed"] = seed
    row["official / K=4096"] = 4096 * seed / float(row["K=4096 ms"])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small checks, and the 1B shape only")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    present = torch.cuda.is_available()
    if not present and os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("no CUDA device; set TRITON_INTERPRET=1 to run the checks in Triton's interpreter")
    device = "cuda" if present else "cpu"
    small = options.quick or not present
    report = {
        "device": torch.cuda.get_device_name() if present else "Triton's interpreter",
        "vectors": check_vectors(device),
        "cpu": check_cpu(device, 70_000 if small else 20_000_000),
        "timings": [measure(name, 3 if small else 15) for name in (["1B"] if small else MODELS)] if present else [],
    }
    if options.json:
        print(json.dumps(report, indent=1))
        return
    print(f"{report['device']}: equal bits on {report['vectors']}; {report['cpu']}")
    for row in report["timings"]:
        print("  ".join(f"{name} {v:,.2f}" if isinstance(v, float) else f"{name} {v}" for name, v in row.items()))


if __name__ == "__main__":
    main()
