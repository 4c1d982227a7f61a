"""The machine code by itself: any run of blocks, both kinds of store, and no byte beyond what it was given."""

import numpy as np
import pytest
import torch

from kilofed.zeroth.directions import cpu, kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KEY = 0xFEDCBA9876543210
GUARD = 64
"""Elements on either side that must stay as they are."""


def _bits(tensor):
    return tensor.view(torch.int32 if tensor.itemsize == 4 else torch.int16)


def _coefficients(num_seeds, seed=0):
    return np.random.default_rng(seed).normal(scale=1e-2, size=num_seeds).astype(np.float32)


def _weights(num_elements, dtype, seed=0):
    return torch.randn(num_elements, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _rebuild(kernel, w0, a, first_block):
    out = torch.empty_like(w0)
    work = cpu._workspace(cpu.row_butterflies(a, w0.dtype), cpu._lanes(w0.dtype), KEY)
    kernel(w0.data_ptr(), out.data_ptr(), first_block, len(w0) // len(a), work)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_seeds", [1024, 4096])
def test_nontemporal_stores_give_equal_bits(dtype, num_seeds):
    a, w0 = _coefficients(num_seeds), _weights(3 * num_seeds, dtype)
    usual, nontemporal = cpu.REBUILD[dtype]
    assert torch.equal(_bits(_rebuild(usual, w0, a, 7)), _bits(_rebuild(nontemporal, w0, a, 7)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_seeds", [1024, 4096])
def test_blocks_one_by_one_are_the_blocks_together(dtype, num_seeds):
    a, w0 = _coefficients(num_seeds), _weights(3 * num_seeds, dtype)
    kernel, _ = cpu.REBUILD[dtype]
    parts = [_rebuild(kernel, w0[i * num_seeds : (i + 1) * num_seeds].clone(), a, 7 + i) for i in range(3)]
    assert torch.equal(_bits(torch.cat(parts)), _bits(_rebuild(kernel, w0, a, 7)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_number_beyond_32_bits_is_another_block(dtype):
    a, w0 = _coefficients(1024), _weights(1024, dtype)
    kernel, _ = cpu.REBUILD[dtype]
    assert not torch.equal(_rebuild(kernel, w0, a, 1), _rebuild(kernel, w0, a, 1 + (1 << 32)))


@pytest.mark.parametrize("way", [0, 1], ids=["usual", "nontemporal"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_beside_the_output_is_written(dtype, way):
    a, w0 = _coefficients(1024), _weights(2 * 1024, dtype)
    room = torch.full((2 * GUARD + len(w0),), 3.0, dtype=dtype)
    out = room[GUARD:-GUARD]
    work = cpu._workspace(cpu.row_butterflies(a, dtype), cpu._lanes(dtype), KEY)
    before = w0.clone()
    cpu.REBUILD[dtype][way](w0.data_ptr(), out.data_ptr(), 5, 2, work)
    assert torch.equal(w0, before)
    assert (room[:GUARD] == 3).all()
    assert (room[-GUARD:] == 3).all()
    assert not torch.equal(out, w0)


def test_coefficients_of_zero_give_the_weights_back():
    for dtype in DTYPES:
        w0 = _weights(1024, dtype)
        kernel, _ = cpu.REBUILD[dtype]
        assert torch.equal(_rebuild(kernel, w0, np.zeros(1024, np.float32), 3), w0)


def test_lane_orders_are_permutations():
    assert all(sorted(order) == list(range(16)) for order in kernels.LANE_ORDER.values())
