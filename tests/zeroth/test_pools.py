"""A run's pools: coefficients are the summed gradients, and clients reach the server's state by any sequence of updates."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from kilofed.errors import PayloadError
from kilofed.zeroth import seed_log
from kilofed.zeroth.pools import NOTHING, SUMS, VERSIONS, SeedPools, held_by_server, log_name, state_name
from kilofed.zeroth.seed_log import Report

K, STEPS, SEED = 64, 5, 9
EXACT = SeedPools(K, STEPS, lr=0.5, sampling="uniform", bits=32, rounds_per_pool=0, max_gradient=100.0)
QUANTISED = replace(EXACT, bits=5, rounds_per_pool=2)
WEIGHTS = {0: 3, 4: 10, 7: 41}


def gradients(round: int, client: int) -> np.ndarray:
    return np.random.default_rng(100 * round + client).normal(size=STEPS)


def run(run_pools: SeedPools, rounds: int, *, without: frozenset[int] = frozenset()) -> dict[str, torch.Tensor]:
    """The server's state after some rounds of three clients with unequal weights."""
    state: dict[str, torch.Tensor] = {}
    for round in range(1, rounds + 1):
        run_pools.begin(state, round)
        reports = {c: Report(weight, 1.0, (), gradients(round, c)) for c, weight in WEIGHTS.items()}
        state[log_name(round)] = seed_log.pack_reports({c: one.pack(32) for c, one in reports.items()})
        run_pools.apply(SEED, state, round, without=without)
    return state


@pytest.mark.parametrize("left_out", [frozenset(), frozenset({4})])
def test_coefficients_are_minus_lr_times_the_weighted_mean_of_gradients(left_out: frozenset[int]) -> None:
    expected, pool = np.zeros(K), EXACT.pool(SEED, 0)
    counted = {client: weight for client, weight in WEIGHTS.items() if client not in left_out}
    for round in (1, 2):
        for client, weight in counted.items():
            seeds = pool.sample(round, client, STEPS)
            np.add.at(expected, seeds, -0.5 * gradients(round, client) * weight / sum(counted.values()))
    found = EXACT.coefficients(run(EXACT, 2, without=left_out), 0)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_metrics_are_weighted_by_examples_and_count_skipped_steps() -> None:
    state: dict[str, torch.Tensor] = {}
    EXACT.begin(state, 1)
    reports = {0: Report(3, 1.0, (), np.ones(STEPS)), 4: Report(1, 5.0, (0, 2), np.array([0.0, 1, 0, 1, 1]))}
    state[log_name(1)] = seed_log.pack_reports({c: one.pack(32) for c, one in reports.items()})
    metrics = EXACT.apply(SEED, state, 1)
    assert metrics["train_loss"] == 2.0
    assert metrics["skipped_steps"] == 2
    assert metrics["seeds_moved"] == int((EXACT.coefficients(state, 0) != 0).sum())


def test_pools_of_a_run_follow_each_other_and_differ() -> None:
    state = run(QUANTISED, 3)
    assert state[VERSIONS].tolist() == [2, 1]
    assert held_by_server(state) == (1, 1)
    first, second = QUANTISED.point(SEED, state).chain
    assert first.pool.key != second.pool.key
    assert first.pool.key != QUANTISED.pool(SEED + 1, 0).key
    assert np.array_equal(first.a, QUANTISED.coefficients(run(QUANTISED, 2), 0))
    assert not np.array_equal(first.a, second.a)
    assert len(QUANTISED.point(SEED, state, num_pools=1).chain) == 1


@pytest.mark.parametrize("bits", [5, 32])
@pytest.mark.parametrize("rounds_of_client", [None, 0, 1, 2, 3])
def test_updates_bring_any_client_in_sync(bits: int, rounds_of_client: int | None) -> None:
    these = replace(QUANTISED, bits=bits)
    server = run(these, 3)
    past = run(these, rounds_of_client or 0)
    client = {name: tensor for name, tensor in past.items() if name.startswith("state.")}
    held = NOTHING if rounds_of_client is None else held_by_server(past) if rounds_of_client else (0, 0)
    updates = these.updates(server, held)
    these.receive(client, updates)
    assert client.keys() == {state_name(0), state_name(1)}
    for index in (0, 1):
        assert np.array_equal(these.coefficients(client, index), these.coefficients(server, index))
    if rounds_of_client == 3:
        assert updates == ()


def test_a_client_that_is_one_version_behind_gets_a_delta() -> None:
    server = run(replace(QUANTISED, rounds_per_pool=0), 2)
    ((_, delta),) = QUANTISED.updates(server, (0, 1))
    ((_, whole),) = QUANTISED.updates(server, (0, 0))
    assert delta == seed_log.to_bytes(server["delta.000"])
    assert whole == seed_log.to_bytes(server[state_name(0)])
    with pytest.raises(PayloadError, match="a delta from version 1 of 64 numbers, but this client holds version 0"):
        QUANTISED.receive({}, [(0, delta)])


def test_probabilities_are_uniform_at_first_and_follow_the_sums_of_magnitudes() -> None:
    these = replace(EXACT, sampling="pro-unbiased")
    assert EXACT.levels(run(EXACT, 1)) == b""
    state = run(these, 1)
    assert state[SUMS].shape == (3, K)
    assert float(state[SUMS][2].sum()) == STEPS * len(WEIGHTS)
    found = these.probabilities(state)
    assert found.sum() == pytest.approx(1)
    means = (state[SUMS][1] / state[SUMS][2]).numpy()
    assert int(found.argmax()) == int(np.nanargmax(means))
    weights = seed_log.sampling_weights(these.levels(state))
    assert weights is not None
    np.testing.assert_allclose(weights / weights.sum(), found, rtol=0.05)


def test_a_gradient_above_the_limit_is_refused() -> None:
    body = Report(1, 1.0, (), np.full(STEPS, 101.0)).pack(32)
    with pytest.raises(PayloadError, match="expected at most 100"):
        EXACT.report(body)
