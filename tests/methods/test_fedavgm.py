"""FedAvgM collapses to FedAvg without momentum, and carries a round's update into the next with it."""

import torch
from tests.conftest import stated

from kilofed.federation.wire import shared
from kilofed.methods.fedavgm import FedAvgM


def test_without_momentum_and_with_rate_one_it_is_fedavg_bit_for_bit(federate) -> None:
    found, plain = federate("fedavgm", momentum=0.0, server_lr=1.0), federate("fedavg")
    trained = shared(found.server.state)
    assert set(trained) == set(plain.server.state)
    assert all(torch.equal(tensor, plain.server.state[name]) for name, tensor in trained.items())


def test_its_first_round_is_fedavgs_scaled_by_the_rate(federate) -> None:
    start, plain = federate("fedavg", rounds=0).server.state, federate("fedavg", rounds=1).server.state
    found = federate("fedavgm", rounds=1, server_lr=0.25).server.state
    for name, tensor in start.items():
        torch.testing.assert_close(found[name], tensor + 0.25 * (plain[name] - tensor), rtol=1e-5, atol=1e-7)


def test_two_rounds_without_local_learning_coast_on_the_momentum(federate) -> None:
    still = {"train.lr": 0.0}
    found = federate("fedavgm", rounds=1)
    state = {name: tensor.clone() for name, tensor in found.server.state.items()}
    coasted = federate("fedavgm", rounds=2, done=1, state=dict(state), overrides=still)
    for name, tensor in shared(state).items():
        expected = tensor + 0.9 * state[f"server.momentum.{name}"]
        torch.testing.assert_close(coasted.server.state[name], expected, rtol=1e-5, atol=1e-7)


def test_its_momentum_does_not_travel(federate) -> None:
    found, plain = federate("fedavgm"), federate("fedavg")
    assert found.ledger.per_client("down") == plain.ledger.per_client("down")
    assert any(name.startswith("server.momentum.") for name in found.server.state)


def test_defaults_and_bounds_are_those_that_runs_rely_on() -> None:
    assert stated(FedAvgM) == {
        "server_lr": (1.0, "at least 0"),
        "momentum": (0.9, "from 0 to below 1"),
    }
