import numpy as np
import pytest
import torch

from kilofed.zeroth.directions import reference
from kilofed.zeroth.directions.pool import SeedPool

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("num_seeds", [1024, 4096, 65536])
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_form_equals_the_kernels_bit_for_bit(num_seeds, dtype):
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(num_seeds, generator=generator) * 1e-3
    w0 = torch.randn(2 * num_seeds + 100, generator=generator).to(dtype)
    expected = SeedPool(num_seeds, 1 << 63).rebuild(w0, a, first_block=(1 << 33) - 1)
    assert torch.equal(reference.rebuild(w0, a, 1 << 63, (1 << 33) - 1), expected)


@pytest.mark.parametrize("k", [0, 1, 15, 16, 1023])
def test_torch_direction_equals_the_kernel(k):
    expected = SeedPool(1024, 9).direction(k, 2100, first_block=6)
    assert torch.equal(reference.direction(k, 2100, 9, 1024, 6), expected)


def test_signs_equal_plain_numpy(plain):
    blocks = torch.tensor([3, (1 << 32) + 1])
    for stream in (0, 1):
        signs = reference.signs(blocks, stream, 12345, 4096).numpy()
        expected = [plain.sign_table(int(block), stream, 4096, 12345) for block in blocks]
        assert np.array_equal(signs, np.stack(expected))


def test_chunks_change_nothing(monkeypatch):
    a, w0 = torch.randn(64) * 1e-2, torch.randn(1000)
    whole = reference.rebuild(w0, a, 5, 0)
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 64)
    assert torch.equal(reference.rebuild(w0, a, 5, 0), whole)
