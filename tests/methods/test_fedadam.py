"""FedAdam against two steps worked out from FedAvg's means."""

import torch
from tests.conftest import stated

from kilofed.federation.wire import shared
from kilofed.methods.fedadam import FedAdam

LR, TAU = 0.05, 0.01
START = TAU**2


def second_moment(v: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
    return 0.99 * v + 0.01 * square


def test_two_rounds_are_the_papers_algorithm_on_fedavgs_means(federate) -> None:
    fields = {"server_lr": LR, "tau": TAU}
    x = federate("fedadam", rounds=0, **fields).server.state
    first, second = {}, {name: torch.full_like(tensor, START) for name, tensor in x.items()}
    for number in (1, 2):
        # What FedAvg's clients would bring home from the same start in the same round.
        mean = federate("fedavg", rounds=number, done=number - 1, state=dict(x)).server.state
        for name, tensor in x.items():
            update = mean[name] - tensor
            first[name] = 0.9 * first.get(name, torch.zeros_like(tensor)) + 0.1 * update
            second[name] = second_moment(second[name], update.square())
        x = {n: t + LR * first[n] / (second[n].sqrt() + TAU) for n, t in x.items()}
        found = shared(federate("fedadam", rounds=number, **fields).server.state)
        for name, tensor in x.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)


def test_no_parameter_moves_further_than_the_rate_per_round(federate) -> None:
    start, end = (federate("fedadam", rounds=n, server_lr=LR, tau=TAU).server.state for n in (0, 1))
    # After one round m = 0.1 u and v >= 0.01 u * u, so that m / sqrt(v) <= 1.
    for name, tensor in shared(end).items():
        assert (tensor - start[name]).abs().max() <= LR * (1 + 1e-5)


def test_its_moments_do_not_travel(federate) -> None:
    found, plain = federate("fedadam"), federate("fedavg")
    assert found.ledger.per_client("down") == plain.ledger.per_client("down")
    assert found.ledger.per_client("up") == plain.ledger.per_client("up")


def test_defaults_and_bounds_are_those_that_runs_rely_on() -> None:
    assert stated(FedAdam) == {
        "server_lr": (0.01, "at least 0"),
        "beta1": (0.9, "from 0 to below 1"),
        "beta2": (0.99, "from 0 to below 1"),
        "tau": (0.001, "above 0"),
    }
