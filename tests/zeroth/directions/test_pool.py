import numpy as np
import pytest
import torch

from kilofed.zeroth.directions.pool import SeedPool, coefficients, integer_weights
from kilofed.zeroth.directions.spec import DirectionsError

K = 1024


def _a(seed=0, scale=1e-2):
    return np.random.default_rng(seed).normal(scale=scale, size=K).astype(np.float32)


def test_zero_coefficients_change_nothing_not_even_a_negative_zero():
    w0 = torch.tensor([-0.0, 0.0, 1.5, -2.0] * 700)
    out = SeedPool(K).rebuild(w0, np.zeros(K, dtype=np.float32))
    assert torch.equal(out.view(torch.int32), w0.view(torch.int32))


def test_one_coefficient_adds_that_direction():
    pool, a = SeedPool(K, 3), np.zeros(K, dtype=np.float32)
    a[37] = 0.25
    assert torch.equal(
        pool.rebuild(torch.zeros(5000), a, first_block=2), 0.25 * pool.direction(37, 5000, first_block=2)
    )


def test_moved_is_one_coefficient_more():
    pool, w0, a = SeedPool(K, 3), torch.randn(3000), _a()
    moved = a.copy()
    moved[5] += np.float32(1e-3)
    assert torch.equal(pool.at(a).moved(5, 1e-3).rebuild(w0), pool.rebuild(w0, moved))
    assert np.array_equal(pool.at(a).a, a)


def test_a_thousand_steps_of_eps_with_no_learning_change_nothing():
    here, w0 = SeedPool(K, 3).at(_a()), torch.randn(3000).to(torch.bfloat16)
    before, scratch = here.rebuild(w0), torch.empty_like(w0)
    for k in SeedPool(K, 3).sample(0, 0, 1000).tolist():
        here.moved(k, 1e-3).rebuild(w0, out=scratch)
        here.moved(k, -1e-3).rebuild(w0, out=scratch)
    assert torch.equal(here.rebuild(w0).view(torch.int16), before.view(torch.int16))


def test_rebuild_in_place_and_into_a_given_tensor():
    here, w0 = SeedPool(K, 3).at(_a()), torch.randn(50, 70)
    expected, out = here.rebuild(w0), torch.empty(50, 70)
    assert here.rebuild(w0, out=out) is out
    assert torch.equal(out, expected)
    assert torch.equal(here.rebuild(w0, out=w0), expected)
    assert torch.equal(w0, expected)


def test_parameters_and_empty_tensors_are_rebuilt_without_a_graph():
    here = SeedPool(K).at(_a())
    assert not here.rebuild(torch.nn.Parameter(torch.randn(3, 3))).requires_grad
    assert here.rebuild(torch.empty(0)).shape == (0,)


def test_a_tensor_may_be_rebuilt_in_parts_of_whole_blocks():
    here, w0 = SeedPool(K, 8).at(_a()), torch.randn(5 * K + 10)
    parts = [here.rebuild(w0[: 2 * K], first_block=4), here.rebuild(w0[2 * K :], first_block=6)]
    assert torch.equal(torch.cat(parts), here.rebuild(w0, first_block=4))


def test_different_keys_give_unrelated_directions():
    first, second = (SeedPool(K, key).direction(0, 100_000) for key in (0, 1))
    assert abs(torch.dot(first, second).item()) < 5 * 100_000**0.5


def test_coefficients_are_minus_lr_times_gradients_rounded_once():
    gradients = np.array([1.0, -3.0, 1e-30])
    assert coefficients(gradients, 0.1).tolist() == np.float32(-0.1 * gradients).tolist()


def test_order_is_a_pure_function_and_a_longer_one_continues_it():
    pool = SeedPool(K, 5)
    order = pool.sample(3, 9, 200)
    assert order.shape == (200,)
    assert order.min() >= 0
    assert order.max() < K
    assert np.array_equal(pool.sample(3, 9, 200), order)
    assert np.array_equal(pool.sample(3, 9, 203)[:200], order)
    for other in (pool.sample(4, 9, 200), pool.sample(3, 8, 200), SeedPool(K, 6).sample(3, 9, 200)):
        assert (other == order).mean() < 0.05
    assert len(pool.sample(3, 9, 0)) == 0


def test_order_equals_the_plain_implementation(plain):
    weights = np.random.default_rng(0).integers(0, 65536, size=64)
    drawn = SeedPool(64, 1 << 63).sample(7, 1 << 31, 41, weights=weights)
    assert drawn.tolist() == plain.order(1 << 63, 7, 1 << 31, weights.tolist(), 41)


def test_equal_weights_are_uniform():
    pool = SeedPool(64, 5)
    assert np.array_equal(pool.sample(0, 1, 500, weights=np.full(64, 9)), pool.sample(0, 1, 500))


def test_draws_follow_the_weights():
    weights = np.array([1, 0, 3] + [0] * 61)
    drawn = np.bincount(SeedPool(64, 5).sample(0, 1, 40_000, weights=weights), minlength=64)
    assert drawn[1] == 0
    assert drawn[0] + drawn[2] == 40_000
    assert abs(drawn[2] / 40_000 - 0.75) < 0.01


def test_integer_weights_keep_proportions_and_fit_every_pool():
    assert integer_weights(np.array([0.5, 0.25, 0.0])).tolist() == [65535, 32768, 0]
    assert integer_weights(np.ones(1 << 20)).sum() < 1 << 32


@pytest.mark.parametrize(
    ("a", "message"),
    [
        (np.zeros(K), "float64 of shape"),
        (np.zeros(7, dtype=np.float32), r"shape \(7,\); expected float32 of shape \(1024,\)"),
        (np.full(K, np.nan, dtype=np.float32), "coefficient 0 is not finite"),
    ],
)
def test_bad_coefficients_are_refused(a, message):
    with pytest.raises(DirectionsError, match=message):
        SeedPool(K).at(a)


@pytest.mark.parametrize("delta", [1e-12, float("nan"), float("inf")])
def test_a_move_that_float32_cannot_hold_is_refused(delta):
    with pytest.raises(DirectionsError, match=r"coefficient 0 = .* plus .* expected a finite number that differs"):
        SeedPool(K).at(np.ones(K, dtype=np.float32)).moved(0, delta)


def test_bad_tensors_are_refused():
    here = SeedPool(K).at(_a())
    with pytest.raises(DirectionsError, match=r"the dtype is torch\.float64"):
        here.rebuild(torch.zeros(4, dtype=torch.float64))
    with pytest.raises(DirectionsError, match="is not contiguous"):
        here.rebuild(torch.zeros(4, 4).T)
    with pytest.raises(DirectionsError, match=r"out is torch\.float32 \(3,\)"):
        here.rebuild(torch.zeros(4), out=torch.zeros(3))
    with pytest.raises(DirectionsError, match="first_block is -1"):
        here.rebuild(torch.zeros(4), first_block=-1)


def test_bad_numbers_are_refused():
    pool = SeedPool(K)
    for call in (
        lambda: pool.direction(K, 1),
        lambda: pool.direction(0, -1),
        lambda: pool.sample(-1, 0, 1),
        lambda: pool.sample(0, 1 << 32, 1),
        lambda: SeedPool(K, 1 << 64),
        lambda: pool.at(_a()).moved(K, 1.0),
    ):
        with pytest.raises(DirectionsError, match="expected at least 0 and below"):
            call()


@pytest.mark.parametrize("weights", [np.zeros(K, dtype=int), np.full(K, -1), np.full(K, 1 << 32)])
def test_weights_out_of_range_are_refused(weights):
    with pytest.raises(DirectionsError, match="with a sum from 1"):
        SeedPool(K).sample(0, 0, 1, weights=weights)


def test_weights_that_are_not_integers_are_refused():
    with pytest.raises(DirectionsError, match="expected integers of shape"):
        SeedPool(K).sample(0, 0, 1, weights=np.ones(K))
    with pytest.raises(DirectionsError, match="expected finite values from 0"):
        integer_weights(np.array([0.5, np.nan]))
