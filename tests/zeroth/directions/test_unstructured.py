import numpy as np
import pytest
import torch

from kilofed.zeroth.directions.philox import philox
from kilofed.zeroth.directions.pool import SeedPool
from kilofed.zeroth.directions.spec import DirectionsError
from kilofed.zeroth.directions.unstructured import (
    GaussianPool,
    RademacherPool,
    official_direction,
    official_rebuild,
    official_seeds,
)


@pytest.mark.parametrize("pool", [RademacherPool(64, 7), GaussianPool(64, 7)])
def test_rebuild_is_the_sum_of_its_directions(pool):
    a = np.zeros(64, dtype=np.float32)
    a[[3, 40]] = [0.5, -0.25]
    w0 = torch.randn(500)
    summed = (torch.zeros(500) + 0.5 * pool.direction(3, 500)) + -0.25 * pool.direction(40, 500)
    assert torch.equal(pool.rebuild(w0, a), w0 + summed)


@pytest.mark.parametrize("pool", [RademacherPool(64, 7), GaussianPool(64, 7)])
def test_directions_are_standard_and_nearly_orthogonal(pool):
    first, second = pool.direction(0, 100_000), pool.direction(1, 100_000)
    assert abs(first.mean()) < 0.02
    assert abs(first.var() - 1) < 0.02
    assert abs(torch.dot(first, second)) < 5 * 100_000**0.5


def test_rademacher_is_bits_of_philox():
    z = RademacherPool(64, 7).direction(5, 300, first_block=4).numpy()
    p = np.arange(300) + 4 * 64
    counter = np.stack(np.broadcast_arrays(p // 128, 5, 0, 2), axis=-1)
    words = philox(counter, (7, 0))[np.arange(300), p // 32 % 4]
    assert np.array_equal(z, 1.0 - 2.0 * (words >> (p % 32) & 1))


def test_gaussian_is_the_sum_of_four_bytes():
    z = GaussianPool(64, 7).direction(5, 300, first_block=3).numpy()
    p = np.arange(300) + 3 * 64
    counter = np.stack(np.broadcast_arrays(p // 4, 5, 0, 3), axis=-1)
    words = philox(counter, (7, 0))[np.arange(300), p % 4]
    total = words.view(np.uint8).reshape(-1, 4).sum(axis=1, dtype=np.int64)
    assert np.array_equal(z, np.float32(total - 510) / np.float32(147.80053))


def test_pieces_and_dtypes():
    pool, a = GaussianPool(64, 7), np.random.default_rng(0).normal(size=64).astype(np.float32)
    w0 = torch.randn(64 * 300)
    whole = pool.rebuild(w0, a)
    assert torch.equal(torch.cat([pool.rebuild(w0[:128], a), pool.rebuild(w0[128:], a, first_block=2)]), whole)
    assert torch.equal(pool.rebuild(w0.bfloat16(), a), pool.rebuild(w0.bfloat16().float(), a).bfloat16())
    assert torch.equal(pool.rebuild(w0, np.zeros(64, dtype=np.float32)), w0)


def test_order_is_that_of_the_structured_pool():
    assert np.array_equal(RademacherPool(64, 7).sample(1, 2, 30), SeedPool(64, 7).sample(1, 2, 30))


def test_official_rebuild_replays_official_steps():
    parameters = [torch.randn(4, 3), torch.randn(5)]
    seeds = official_seeds(2, np.random.RandomState(0))
    assert all(1 <= seed < 10**11 for seed in seeds)
    rebuilt = official_rebuild(parameters, {seeds[0]: 2.0, seeds[1]: 0.0}, 0.1)
    for z, w0, moved in zip(official_direction(seeds[0], parameters), parameters, rebuilt, strict=True):
        assert torch.equal(moved, w0 - 0.1 * (2.0 * z))


def test_official_directions_are_torch_normal_in_model_order():
    z = list(official_direction(11, [torch.empty(3), torch.empty(2, 2)]))
    torch.manual_seed(11)
    assert torch.equal(z[0], torch.normal(0.0, 1.0, (3,)))
    assert torch.equal(z[1], torch.normal(0.0, 1.0, (2, 2)))


def test_bad_pools_are_refused():
    with pytest.raises(DirectionsError, match="power of two"):
        RademacherPool(63)
    with pytest.raises(DirectionsError, match="expected float32"):
        RademacherPool(64).rebuild(torch.zeros(3), np.zeros(3, dtype=np.float32))
