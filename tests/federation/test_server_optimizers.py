"""Server optimisers against steps worked out by hand."""

import math

import pytest
import torch
from torch import Tensor

from kilofed.federation import server_optimizers


def adam(v: Tensor, square: Tensor) -> Tensor:
    return 0.99 * v + 0.01 * square


def test_momentum_of_two_steps_by_hand() -> None:
    state = {"x": torch.tensor([1.0])}
    state |= server_optimizers.momentum(state, {"x": torch.tensor([3.0])}, lr=0.5, beta=0.9)
    assert state["x"].item() == 2.0  # v = 2, x = 1 + 0.5 * 2
    state |= server_optimizers.momentum(state, {"x": torch.tensor([1.0])}, lr=0.5, beta=0.9)
    assert state["server.momentum.x"].item() == pytest.approx(0.9 * 2 + (1 - 2))
    assert state["x"].item() == pytest.approx(2 + 0.5 * 0.8)


def test_no_momentum_and_rate_one_is_the_mean_bit_for_bit() -> None:
    stream = torch.Generator().manual_seed(0)
    state = {"x": torch.randn(1000, generator=stream)}
    mean = {"x": torch.randn(1000, generator=stream) * 1e-3}
    assert torch.equal(server_optimizers.momentum(state, mean, lr=1.0, beta=0.0)["x"], mean["x"])


def test_adaptive_of_two_steps_by_hand() -> None:
    state = {"x": torch.tensor([1.0])}
    x, m, v, tau = 1.0, 0.0, 0.1**2, 0.1
    for mean in (3.0, 2.0):
        update = mean - x
        m, v = 0.8 * m + 0.2 * update, 0.99 * v + 0.01 * update**2
        x += 0.5 * m / (math.sqrt(v) + tau)
        state |= server_optimizers.adaptive(state, {"x": torch.tensor([mean])}, lr=0.5, beta=0.8, tau=tau, second=adam)
        assert state["x"].item() == pytest.approx(x, rel=1e-6)
        assert state["server.first.x"].item() == pytest.approx(m, rel=1e-6)
        assert state["server.second.x"].item() == pytest.approx(v, rel=1e-6)


def test_moments_are_not_taken_for_trained_tensors() -> None:
    state = {"x": torch.ones(2), "y": torch.ones(3)}
    mean = {"x": torch.zeros(2), "y": torch.zeros(3)}
    state |= server_optimizers.adaptive(state, mean, lr=0.1, beta=0.9, tau=0.1, second=adam)
    names = set(state)
    state |= server_optimizers.adaptive(state, mean, lr=0.1, beta=0.9, tau=0.1, second=adam)
    assert set(state) == names
    assert names == {"x", "y", *(f"server.{moment}.{name}" for moment in ("first", "second") for name in "xy")}


def test_no_update_moves_nothing() -> None:
    state = {"x": torch.tensor([1.0, -2.0])}
    assert torch.equal(
        server_optimizers.adaptive(state, dict(state), lr=0.1, beta=0.9, tau=0.1, second=adam)["x"], state["x"]
    )
    assert torch.equal(server_optimizers.momentum(state, dict(state), lr=0.1, beta=0.9)["x"], state["x"])


def test_the_state_that_is_given_stays_as_it_is() -> None:
    state = {"x": torch.ones(2)}
    server_optimizers.momentum(state, {"x": torch.zeros(2)}, lr=1.0, beta=0.5)
    server_optimizers.adaptive(state, {"x": torch.zeros(2)}, lr=1.0, beta=0.5, tau=0.1, second=adam)
    assert list(state) == ["x"]
    assert torch.equal(state["x"], torch.ones(2))
