"""FedProx collapses to FedAvg without its pull, and stays at the start under a strong one."""

import math

import torch
from tests.conftest import stated

from kilofed.methods.fedprox import FedProx


def moved(federation, start) -> float:
    ends, starts = federation.server.state, start.server.state
    return math.sqrt(sum((ends[name] - starts[name]).square().sum().item() for name in starts))


def test_without_pull_it_is_fedavg_bit_for_bit(federate) -> None:
    assert federate("fedprox", mu=0.0).content == federate("fedavg").content


def test_a_stronger_pull_stays_nearer_to_the_start(federate) -> None:
    sgd = {"train.optimizer": "sgd", "train.lr": 0.1, "train.steps": 8}
    start = federate("fedprox", rounds=0)
    distances = [moved(federate("fedprox", rounds=1, mu=mu, overrides=sgd), start) for mu in (0.0, 1.0, 9.0)]
    assert distances[0] > distances[1] > distances[2] > 0


def test_the_pull_is_the_gradient_of_half_mu_times_the_squared_distance(federate) -> None:
    # From the start, the first step feels no pull; the second one feels mu times what the first one moved.
    sgd = {"train.optimizer": "sgd", "train.lr": 0.1, "train.steps": 1}
    one = federate("fedprox", rounds=1, mu=5.0, overrides=sgd)
    assert one.content == federate("fedavg", rounds=1, overrides=sgd).content
    two = {**sgd, "train.steps": 2, "data.partition.kind": "iid", "data.partition.num_clients": 1}
    start, near = federate("fedavg", rounds=0, overrides=two), federate("fedprox", rounds=1, mu=5.0, overrides=two)
    far = federate("fedavg", rounds=1, overrides=two)
    first = federate("fedavg", rounds=1, overrides={**two, "train.steps": 1})
    for name, tensor in near.server.state.items():
        pull = 0.1 * 5.0 * (first.server.state[name] - start.server.state[name])
        torch.testing.assert_close(tensor, far.server.state[name] - pull, rtol=1e-4, atol=1e-6)


def test_the_pull_is_towards_the_round_and_not_the_run(federate) -> None:
    strong = {"train.optimizer": "sgd", "train.lr": 0.01, "train.steps": 4}
    start = federate("fedprox", rounds=0)
    one, three = (moved(federate("fedprox", rounds=n, mu=50.0, overrides=strong), start) for n in (1, 3))
    assert three > 1.5 * one


def test_defaults_and_bounds_are_those_that_runs_rely_on() -> None:
    assert stated(FedProx) == {
        "mu": (0.01, "at least 0"),
    }
