"""A run's pools: coefficients are the summed gradients, and clients reach the server's state by any sequence of updates."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from kilofed.errors import PayloadError
from kilofed.zeroth import codec, seed_log
from kilofed.zeroth.pools import NOTHING, SUMS, VERSIONS, SeedPools, held_by_server, log_name, state_name
from kilofed.zeroth.seed_log import Report, Request

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
    weights = these.weights(these.levels(state))
    assert weights is not None
    np.testing.assert_allclose(weights / weights.sum(), found, rtol=0.05)


def test_a_gradient_above_the_limit_is_refused() -> None:
    body = Report(1, 1.0, (), np.full(STEPS, 101.0)).pack(32)
    with pytest.raises(PayloadError, match="expected at most 100"):
        EXACT.report(body)


def reported(
    state: dict[str, torch.Tensor], reports: dict[int, Report], run_pools: SeedPools = EXACT
) -> dict[str, float]:
    """Metrics of the first round, in which these reports came."""
    run_pools.begin(state, 1)
    state[log_name(1)] = seed_log.pack_reports({client: one.pack(32) for client, one in reports.items()})
    return run_pools.apply(SEED, state, 1)


LOOSE = replace(EXACT, max_gradient=1e6)
HONEST = {c: Report(weight, 1.0, (), gradients(1, c)) for c, weight in WEIGHTS.items()}
HOSTILE = {5: Report(10, 1.0, (), np.full(STEPS, 1e6))}


@pytest.mark.parametrize("sampling", ["uniform", "pro"])
def test_a_hostile_client_moves_a_round_no_further_than_ten_medians_allow(sampling: seed_log.Sampling) -> None:
    these, state = replace(LOOSE, sampling=sampling), dict[str, torch.Tensor]()
    metrics = reported(state, HONEST | HOSTILE, these)
    largest = [float(np.abs(np.float32(one.gradients)).max()) for one in HONEST.values()]
    bound = 10 * float(np.median([*largest, 1e6]))
    assert metrics["limited_gradients"] == STEPS
    assert these.limits(state[log_name(1)]) == {5: STEPS}
    expected, total = np.zeros(K), 10 + sum(WEIGHTS.values())
    for client, weight in {**WEIGHTS, 5: 10}.items():
        own = gradients(1, client) if client != 5 else np.full(STEPS, bound)
        np.add.at(expected, these.pool(SEED, 0).sample(1, client, STEPS), own * weight / total)
    np.testing.assert_allclose(state[SUMS][0].numpy(), expected, rtol=1e-6, atol=1e-7)
    if sampling == "pro":
        # The same limit holds for what decides which seeds are drawn.
        assert float(state[SUMS][1].sum()) <= sum(STEPS * one for one in largest) + STEPS * bound * (1 + 1e-6)
    unlimited = dict[str, torch.Tensor]()
    assert "limited_gradients" not in reported(unlimited, HONEST | HOSTILE, replace(these, max_ratio=0.0))
    assert float(unlimited[SUMS][0].abs().max()) > 1e4 * float(state[SUMS][0].abs().max()) / bound


def test_a_round_of_honest_clients_keeps_its_bits() -> None:
    limited, unlimited = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    metrics = reported(limited, HONEST)
    assert metrics == reported(unlimited, HONEST, replace(EXACT, max_ratio=0.0))
    assert "limited_gradients" not in metrics
    assert EXACT.limits(limited[log_name(1)]) == {}
    assert torch.equal(limited[SUMS], unlimited[SUMS])


@pytest.mark.parametrize(
    ("clients", "limited"),
    [
        ({0: 1.0, 1: 1e6}, {}),  # Of two, neither is the odd one.
        ({0: 1.0, 1: 0.0, 2: 0.0, 3: 1e6}, {}),  # A client of zeros says nothing of what is usual.
        ({0: 1.0, 1: 2.0, 2: 1e6}, {2: STEPS}),
        ({0: 1.0, 1: 2.0, 2: 20.0}, {}),
        ({0: 1.0, 1: 2.0, 2: 20.001}, {2: STEPS}),
        ({0: 1.0, 1: 3.0, 2: 1e5, 3: 1e6, 4: 0.0, 5: 2.0, 6: 4.0}, {2: STEPS, 3: STEPS}),
    ],
)
def test_the_bound_is_ten_times_the_median_of_clients_that_are_not_zero(
    clients: dict[int, float], limited: dict[int, int]
) -> None:
    state: dict[str, torch.Tensor] = {}
    reports = {client: Report(3 + client, 1.0, (), np.full(STEPS, value)) for client, value in clients.items()}
    metrics = reported(state, reports, LOOSE)
    assert LOOSE.limits(state[log_name(1)]) == limited
    assert metrics.get("limited_gradients", 0) == sum(limited.values())


def test_only_the_gradients_beyond_the_bound_are_limited() -> None:
    odd = Report(3, 1.0, (4,), np.array([1.0, -1e5, 2.0, 1e6, 0.0]))
    state: dict[str, torch.Tensor] = {}
    metrics = reported(
        state, {0: Report(41, 1.0, (), np.ones(STEPS)), 1: Report(3, 1.0, (), np.ones(STEPS)), 2: odd}, LOOSE
    )
    assert metrics["limited_gradients"] == 2
    sums = np.zeros(K)
    for client, own, weight in ((0, np.ones(STEPS), 41), (1, np.ones(STEPS), 3), (2, [1.0, -10, 2, 10, 0], 3)):
        np.add.at(sums, LOOSE.pool(SEED, 0).sample(1, client, STEPS), np.array(own) * weight / 47)
    np.testing.assert_allclose(state[SUMS][0].numpy(), sums, rtol=1e-12)


def test_without_a_client_the_bound_is_that_of_the_others() -> None:
    state: dict[str, torch.Tensor] = {}
    LOOSE.begin(state, 1)
    values = {0: 1.0, 1: 2.0, 2: 30.0, 3: 50.0}
    reports = {c: Report(3 + c, 1.0, (), np.full(STEPS, value)) for c, value in values.items()}
    state[log_name(1)] = seed_log.pack_reports({c: one.pack(32) for c, one in reports.items()})
    assert "limited_gradients" not in LOOSE.apply(SEED, dict(state), 1)
    # Had client 3 not answered, the median were 2 and the bound 20: client 2 is beyond it. Then client 3 is, too.
    assert LOOSE.apply(SEED, state, 1, without=frozenset({3}))["limited_gradients"] == 2 * STEPS


def test_a_request_is_read_for_its_round_and_sampling() -> None:
    request = Request(1, levels=seed_log.encode_levels(np.ones(K)))
    these = replace(QUANTISED, sampling="pro")
    for round in (3, 4):
        assert these.request(request.pack(), round) == request
    for round in (2, 5):
        with pytest.raises(PayloadError, match="a request for pool 1"):
            these.request(request.pack(), round)
    with pytest.raises(
        PayloadError, match=r"bytes of sampling probabilities in the request; method\.sampling is uniform"
    ):
        QUANTISED.request(request.pack(), 3)
    with pytest.raises(
        PayloadError, match=r"0 bytes of sampling probabilities in the request; method\.sampling is pro"
    ):
        these.request(Request(1).pack(), 3)
    with pytest.raises(PayloadError, match="a message of 64 numbers; expected 128"):
        replace(these, num_seeds=128).weights(request.levels)


@pytest.mark.parametrize("bits", [5, 32])
def test_updates_of_another_kind_or_count_are_refused_and_change_nothing(bits: int) -> None:
    these = replace(EXACT, bits=bits)
    floats, whole = codec.encode_scalars(np.ones(K), bits=32), codec.encode_state(codec.State.zeros(K))
    scalars = codec.encode_scalars(np.ones(K), bits=6)
    short = codec.encode_scalars(np.ones(3), bits=32), codec.encode_state(codec.State.zeros(3))
    for body in (scalars, *short, whole if bits == 32 else floats, b"", floats[:-1], whole + b"\0"):
        state: dict[str, torch.Tensor] = {}
        with pytest.raises(PayloadError):
            these.receive(state, [(0, body)])
        assert not state
