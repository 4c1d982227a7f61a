"""The kernels against the definition, a plain numpy implementation, and themselves cut into other pieces."""

import numpy as np
import pytest
import torch

from kilofed.zeroth.directions import cpu
from kilofed.zeroth.directions.pool import SeedPool

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KEY = 0xFEDCBA9876543210


def _bits(tensor):
    return tensor.view(torch.int32 if tensor.itemsize == 4 else torch.int16)


def _coefficients(num_seeds, seed=0):
    return np.random.default_rng(seed).normal(scale=1e-2, size=num_seeds).astype(np.float32)


def _weights(num_elements, dtype, seed=0):
    return torch.randn(num_elements, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("num_seeds", [64, 256, 1024])
@pytest.mark.parametrize("block", [0, (1 << 32) - 1, 1 << 32])
def test_columns_of_every_full_block_are_orthogonal(plain, num_seeds, block):
    z = plain.dense_block(block, num_seeds, KEY).astype(np.float32)
    assert np.array_equal(z.T @ z, num_seeds * np.eye(num_seeds))
    assert np.array_equal(z @ z.T, num_seeds * np.eye(num_seeds))
    pool = SeedPool(num_seeds, KEY)
    for k in range(0, num_seeds, 37):
        assert np.array_equal(pool.direction(k, num_seeds, first_block=block).numpy(), z[:, k])


@pytest.mark.parametrize("dtype", DTYPES)
def test_direction_is_plus_or_minus_one_in_every_dtype(dtype):
    pool = SeedPool(1024, KEY)
    signs = pool.direction(77, 2500, first_block=3, dtype=dtype)
    assert signs.dtype == dtype
    assert torch.equal(signs.abs(), torch.ones_like(signs))
    assert torch.equal(signs.float(), pool.direction(77, 2500, first_block=3))


def test_rebuild_is_the_dense_product_when_sums_are_exact(plain):
    a = np.random.default_rng(1).integers(-500, 500, size=1024).astype(np.float32)
    z = plain.dense_block(5, 1024, KEY).astype(np.float64)
    out = SeedPool(1024, KEY).rebuild(torch.zeros(1024), a, first_block=5)
    assert np.array_equal(out.numpy(), z @ a)


@pytest.mark.parametrize("num_seeds", [64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rebuild_equals_plain_numpy_bit_for_bit(plain, num_seeds, dtype):
    a = _coefficients(num_seeds)
    w0 = _weights(num_seeds + num_seeds // 2 + 5, dtype)
    expected = torch.from_numpy(plain.rebuild(w0.float().numpy(), a, KEY, (1 << 32) - 1)).to(dtype)
    out = SeedPool(num_seeds, KEY).rebuild(w0, a, first_block=(1 << 32) - 1)
    assert torch.equal(_bits(out), _bits(expected))


@pytest.mark.slow
@pytest.mark.parametrize("num_seeds", [32768, 65536, 131072])
def test_large_pools_equal_plain_numpy_bit_for_bit(plain, num_seeds):
    a = _coefficients(num_seeds)
    w0 = _weights(num_seeds + 999, torch.bfloat16)
    expected = torch.from_numpy(plain.rebuild(w0.float().numpy(), a, KEY, 2)).to(torch.bfloat16)
    assert torch.equal(_bits(SeedPool(num_seeds, KEY).rebuild(w0, a, first_block=2)), _bits(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_rebuild_is_the_float32_sum_rounded_once(dtype):
    a, w0 = _coefficients(1024), _weights(5000, dtype)
    pool = SeedPool(1024, KEY)
    assert torch.equal(pool.rebuild(w0, a), pool.rebuild(w0.float(), a).to(dtype))


def test_bfloat16_ties_go_to_even_and_large_sums_to_infinity():
    a = np.zeros(1024, dtype=np.float32)
    a[0] = 2.0**-9  # Half of the last place of a bfloat16 in [0.5, 1).
    w0 = torch.tensor([0.5, 0.5 + 2**-8, -0.5, 3.38e38]).to(torch.bfloat16).repeat(256)
    pool = SeedPool(1024, KEY)
    assert torch.equal(_bits(pool.rebuild(w0, a)), _bits(pool.rebuild(w0.float(), a).to(torch.bfloat16)))
    a[0] = 3e38
    overflowing = pool.rebuild(torch.full((1024,), 3e38).to(torch.bfloat16), a)
    assert set(overflowing.tolist()) == {0.0, float("inf")} or overflowing.isinf().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_chunks_and_block_order_change_nothing(dtype, monkeypatch):
    num_seeds = 1024
    a, w0 = _coefficients(num_seeds), _weights(40 * num_seeds + 333, dtype)
    position = SeedPool(num_seeds, KEY).at(a)
    whole = position.rebuild(w0, first_block=11)
    monkeypatch.setattr(cpu, "SPAN_ELEMENTS", 3 * num_seeds)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(_bits(position.rebuild(w0, first_block=11)), _bits(whole))
    finally:
        torch.set_num_threads(threads)
    pieces = [position.rebuild(w0[i * num_seeds :][:num_seeds], first_block=11 + i) for i in reversed(range(41))]
    assert torch.equal(_bits(torch.cat(pieces[::-1])), _bits(whole))


def test_an_unaligned_large_output_has_the_same_bits(monkeypatch):
    monkeypatch.setattr(cpu, "NONTEMPORAL_BYTES", 0)
    a, w0 = _coefficients(1024), _weights(4 * 1024 + 1, torch.bfloat16)
    position = SeedPool(1024, KEY).at(a)
    aligned = position.rebuild(w0[:-1].clone())
    out = torch.empty_like(w0)[1:]
    assert out.data_ptr() % 32
    assert torch.equal(_bits(position.rebuild(w0[:-1].clone(), out=out)), _bits(aligned))


def test_an_error_in_a_thread_is_raised(monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no memory")

    monkeypatch.setattr(cpu, "_workspace", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        SeedPool(1024).rebuild(torch.zeros(1 << 20), _coefficients(1024))
