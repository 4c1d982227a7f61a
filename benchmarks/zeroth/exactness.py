"""Bit-for-bit checks at real sizes; ends with an error at the first difference.

python benchmarks/zeroth/exactness.py [--quick] [--json]
"""

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
import torch

import plain_hsp1 as plain
from kilofed.zeroth.directions import cpu, reference
from kilofed.zeroth.directions.pool import SeedPool

KEY = 0xFEDCBA9876543210
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32 if tensor.itemsize == 4 else torch.int16)


def inputs(num_seeds: int, num_elements: int, dtype: torch.dtype) -> tuple[np.ndarray, torch.Tensor]:
    a = np.random.default_rng(num_seeds).normal(scale=1e-3, size=num_seeds).astype(np.float32)
    return a, (torch.randn(num_elements, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)


def require_equal(first: torch.Tensor, second: torch.Tensor) -> None:
    differing = int((bits(first) != bits(second)).sum())
    if differing:
        raise SystemExit(f"{differing} of {first.numel()} elements differ")


def check_plain(num_blocks: int) -> str:
    """The kernels against the second implementation."""
    for num_seeds in (1024, 4096, 65536):
        for dtype in DTYPES:
            a, w0 = inputs(num_seeds, max(2, num_blocks * 4096 // num_seeds) * num_seeds + 1234, dtype)
            expected = torch.from_numpy(plain.rebuild(w0.float().numpy(), a, KEY, (1 << 32) - 2)).to(dtype)
            require_equal(SeedPool(num_seeds, KEY).rebuild(w0, a, first_block=(1 << 32) - 2), expected)
    return f"K=1024, 4096, 65536, three dtypes, at least {num_blocks * 4096:,} elements each"


def check_reference(num_elements: int) -> str:
    """The kernels against the torch form."""
    for num_seeds in (1024, 4096, 65536):
        for dtype in DTYPES:
            a, w0 = inputs(num_seeds, num_elements + 77, dtype)
            expected = reference.rebuild(w0, torch.from_numpy(a), KEY, 5)
            require_equal(SeedPool(num_seeds, KEY).rebuild(w0, a, first_block=5), expected)
    return f"K=1024, 4096, 65536, three dtypes, {num_elements:,} elements each"


def check_invariance(num_elements: int) -> str:
    """Threads, spans, and tensors cut at random blocks and rebuilt in random order."""
    rng, usual = np.random.default_rng(0), (torch.get_num_threads(), cpu.SPAN_ELEMENTS)
    for num_seeds in (1024, 4096, 65536):
        for dtype in DTYPES:
            a, w0 = inputs(num_seeds, num_elements + 99, dtype)
            here = SeedPool(num_seeds, KEY).at(a)
            whole = here.rebuild(w0)
            for threads, span in ((1, 1 << 16), (2, 1 << 18), (3, 1 << 17), (7, 1 << 16)):
                torch.set_num_threads(threads)
                cpu.SPAN_ELEMENTS = span
                require_equal(here.rebuild(w0), whole)
            torch.set_num_threads(usual[0])
            cpu.SPAN_ELEMENTS = usual[1]
            cuts = [0, *sorted(rng.choice(np.arange(1, len(w0) // num_seeds), 9, replace=False)), None]
            out = torch.empty_like(w0)
            for i in rng.permutation(10):
                first, last = cuts[i], cuts[i + 1]
                part = slice(first * num_seeds, None if last is None else last * num_seeds)
                out[part] = here.rebuild(w0[part], first_block=int(first))
            require_equal(out, whole)
    return f"1, 2, 3, 7 threads, four span sizes, ten parts in random order, {num_elements:,} elements each"


def check_drift(num_steps: int, num_elements: int) -> str:
    """Steps of +eps and -eps with no learning: the weights of the next step are the same bits."""
    for dtype in DTYPES:
        a, w0 = inputs(4096, num_elements, dtype)
        pool = SeedPool(4096, KEY)
        here = pool.at(a)
        before, scratch = here.rebuild(w0), torch.empty_like(w0)
        for k in pool.sample(0, 0, num_steps).tolist():
            here.moved(k, 5e-4).rebuild(w0, out=scratch)
            here.moved(k, -5e-4).rebuild(w0, out=scratch)
        require_equal(here.rebuild(w0, out=scratch), before)
    return f"{num_steps} steps, three dtypes, {num_elements:,} elements"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller tensors")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    quick = options.quick
    checks: dict[str, Callable[[], str]] = {
        "equals plain numpy": lambda: check_plain(4 if quick else 64),
        "equals plain torch": lambda: check_reference(1_000_000 if quick else 10_000_000),
        "threads, spans, order": lambda: check_invariance(3_000_000 if quick else 30_000_000),
        "steps with lr 0": lambda: check_drift(1000, 100_000 if quick else 1_000_000),
    }
    rows = []
    for name, check in checks.items():
        start = time.perf_counter()
        rows.append({"check": name, "on": check(), "differing bits": 0, "seconds": time.perf_counter() - start})
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print("| check | on | differing bits | s |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['check']} | {row['on']} | {row['differing bits']} | {row['seconds']:.1f} |")


if __name__ == "__main__":
    main()
