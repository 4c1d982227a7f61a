"""FedMeZO: FedAvg with another local training; personal rates by the paper's rule."""

import math

import pytest
import torch
from tests.conftest import stated

from kilofed.errors import KilofedError, PrivacyError
from kilofed.methods.fedmezo import FedMeZO, relative_deviations


def test_phi_sums_to_zero_is_bounded_by_one_and_follows_the_quality() -> None:
    phi = relative_deviations({0: 1.0, 3: 2.0, 7: 6.0, 9: 2.5})
    assert math.fsum(phi.values()) == pytest.approx(0, abs=1e-12)
    assert max(map(abs, phi.values())) == 1
    assert phi[7] == 1
    assert phi[0] < phi[3] < phi[9] < phi[7]


@pytest.mark.parametrize("value", [0.0, 0.1, 3e7])
def test_equal_clients_have_phi_zero(value: float) -> None:
    assert set(relative_deviations(dict.fromkeys(range(7), value)).values()) == {0.0}
    assert relative_deviations({}) == {}


def test_with_range_zero_every_kind_of_rate_is_frozen(federate) -> None:
    frozen = federate("fedmezo").server.state
    for rates in ("random", "round-wise", "five-round", "model-diff"):
        found = federate("fedmezo", rates=rates, lr_range=0.0).server.state
        assert all(torch.equal(tensor, found[name]) for name, tensor in frozen.items())


def test_with_rate_zero_nothing_is_learnt(federate) -> None:
    start, end = federate("fedmezo", rounds=0).server.state, federate("fedmezo", lr=0.0).server.state
    assert all(torch.equal(tensor, end[name]) for name, tensor in start.items())


def test_personal_rates_start_once_their_signal_is_known(federate) -> None:
    rates = {"lr": 1e-2, "lr_range": 5e-3}
    for kind, rounds, varied in (("round-wise", 0, False), ("round-wise", 1, True), ("five-round", 1, False)):
        found = federate("fedmezo", rounds=rounds, rates=kind, **rates)
        given = found.sites.method.learning_rates(found.server, [0, 1, 2, 3])
        assert (len(set(given.values())) > 1) == varied
        assert all(5e-3 <= rate <= 1.5e-2 for rate in given.values())
    found = federate("fedmezo", rounds=1, rates="model-diff", **rates)
    distances = dict(found.server.state["server.differences"].tolist())
    given = found.sites.method.learning_rates(found.server, [0, 1, 2, 3])
    assert max(given, key=given.__getitem__) == max(distances, key=distances.__getitem__)


def test_rates_from_single_replies_are_refused_under_central_privacy(federate) -> None:
    central = {"privacy.kind": "central", "privacy.noise_key": "ab" * 16}
    with pytest.raises(PrivacyError):
        federate("fedmezo", rates="model-diff", lr_range=0.0, overrides=central)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"eps": 0.0}, "eps is 0.0; expected above 0"),
        ({"rates": "random", "lr_range": 1.0}, "lr_range"),
    ],
)
def test_fields_out_of_range_are_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(KilofedError, match=words):
        FedMeZO(**fields)  # type: ignore[arg-type]


def test_defaults_and_bounds_are_those_that_runs_rely_on() -> None:
    assert stated(FedMeZO) == {
        "steps": (30, "at least 1"),
        "batch_size": (1, "at least 1"),
        "eps": (0.001, "above 0"),
        "lr": (1e-05, "at least 0"),
        "lr_range": (5e-06, "at least 0"),
    }
