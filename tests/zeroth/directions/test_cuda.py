"""The Triton kernel, in Triton's interpreter and compiled for a device that need not be there."""

import importlib
import re
import subprocess
import sys

import pytest
import torch

from kilofed.zeroth.directions.spec import DirectionsError

INTERPRETED = """
import torch
from kilofed.zeroth.directions import cuda, reference
generator = torch.Generator().manual_seed(3)
for num_seeds in (1024, 4096, 16384, 32768):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        a = torch.randn(num_seeds, generator=generator) * 1e-2
        w0 = torch.randn(2 * num_seeds + 77, generator=generator).to(dtype)
        out = torch.empty_like(w0)
        cuda.rebuild(w0, out, a, 0xFEDCBA9876543210, (1 << 32) - 1)
        expected = reference.rebuild(w0, a, 0xFEDCBA9876543210, (1 << 32) - 1)
        assert torch.equal(out, expected), (num_seeds, dtype)
print("equal")
"""


def test_interpreted_kernel_equals_the_torch_form_bit_for_bit(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed; kilofed[cuda] brings it")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True)
    assert done.stdout == "equal\n", done.stderr


def test_compiled_kernel_has_no_fused_multiply_add_and_keeps_denormals():
    triton = pytest.importorskip("triton", reason="triton is not installed; kilofed[cuda] brings it")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kilofed.zeroth.directions import cuda

    types = {"w0_ptr": "*bf16", "out_ptr": "*bf16", "a_ptr": "*fp32", "words_ptr": "*i64"}
    signature = {**types, "num_elements": "i64", "R": "constexpr"}
    source = ASTSource(fn=cuda._rebuild_kernel, signature=signature, constexprs={(5,): 256})
    options = {"num_warps": 8, "enable_fp_fusion": False}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    assert re.search(r"(add|sub)(\.rn)?\.f32", ptx)
    assert not re.search(r"fma|mad\.f32|mul\.f32|\.ftz", ptx)


def test_missing_triton_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "kilofed.zeroth.directions.cuda", raising=False)
    with pytest.raises(DirectionsError, match=r"directions on CUDA devices need triton: install kilofed\[cuda\]"):
        importlib.import_module("kilofed.zeroth.directions.cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_device_equals_the_cpu_bit_for_bit():
    from kilofed.zeroth.directions.pool import SeedPool

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        a, w0 = torch.randn(4096) * 1e-2, torch.randn(100_000).to(dtype)
        pool = SeedPool(4096, 99)
        assert torch.equal(pool.rebuild(w0.cuda(), a).cpu(), pool.rebuild(w0, a))
