"""FedAvg against means worked out beside it, bf16 on the wire, privacy that does nothing."""

import math

import pytest
import torch

from kilofed.federation.wire import shared
from kilofed.methods.fedavg import FedAvg
from kilofed.models import loading, training

UNEVEN = {"data.partition.kind": "size", "data.partition.num_clients": 3, "train.epochs": 1}


def replies(federation) -> list[tuple[dict[str, torch.Tensor], int]]:
    """What each client would reply in round 1 and the examples it trains on, without any kilofed method."""
    sites, server = federation.sites, federation.server
    found = []
    for client in sites.client_ids():
        loading.write_trained(server.model, server.state)
        owner = sites.site(client).client
        owner.round = 1
        done = training.fit_round(
            server.model,
            owner.data,
            owner.train,
            round=1,
            num_rounds=2,
            order=owner.order,
            dropout=owner.rng("dropout"),
        )
        found.append((loading.read_trained(server.model), done.num_examples))
    return found


@pytest.mark.parametrize("weights", ["examples", "uniform"])
def test_a_round_is_the_weighted_mean_of_the_clients(federate, weights: str) -> None:
    parts = replies(federate("fedavg", rounds=0, overrides=UNEVEN))
    assert len({count for _, count in parts}) == 3
    w = torch.tensor([count if weights == "examples" else 1 for _, count in parts], dtype=torch.float64)
    found = federate("fedavg", rounds=1, client_weighting=weights, overrides=UNEVEN)
    for name, tensor in found.server.state.items():
        stack = torch.stack([end[name].double() for end, _ in parts])
        expected = (stack * w.reshape(-1, *[1] * tensor.dim())).sum(0) / w.sum()
        torch.testing.assert_close(tensor, expected.float(), rtol=1e-7, atol=1e-9)


def test_weights_matter_where_clients_differ_in_size(federate) -> None:
    examples, uniform = (
        federate("fedavg", client_weighting=kind, overrides=UNEVEN) for kind in ("examples", "uniform")
    )
    assert examples.content != uniform.content


def test_bfloat16_halves_the_bytes_and_stays_close(federate) -> None:
    wide, narrow = federate("fedavg"), federate("fedavg", wire="bfloat16")
    numbers = 2 * sum(t.numel() for t in wide.server.state.values())  # Two rounds.
    for way in ("down", "up"):
        saved = wide.ledger.per_client(way)[0] - narrow.ledger.per_client(way)[0]
        # Two bytes less per number; up, each name grows by `delta.`, and headers are padded to eight bytes.
        names = 2 * len(wide.server.state) * len("delta.") if way == "up" else 0
        assert abs(saved - (2 * numbers - names)) <= 2 * (len(wide.server.state) + 16)
    start = federate("fedavg", rounds=0).server.state
    for name, tensor in wide.server.state.items():
        off = (tensor - narrow.server.state[name]).norm()
        assert off < 0.2 * (tensor - start[name]).norm()


def test_the_state_stays_float32_whatever_is_on_the_wire(federate) -> None:
    assert {t.dtype for t in federate("fedavg", wire="bfloat16").server.state.values()} == {torch.float32}


def test_an_update_below_the_precision_of_bfloat16_is_not_lost(federate) -> None:
    small = {"train.lr": 1e-6, "train.steps": 1, "train.optimizer": "adamw"}
    start = federate("fedavg", rounds=0).server.state
    wide, narrow = federate("fedavg", overrides=small), federate("fedavg", wire="bfloat16", overrides=small)
    for name, tensor in wide.server.state.items():
        moved = tensor - start[name]
        off = narrow.server.state[name] - start[name] - moved
        if moved.norm() > 1e-6:
            assert off.norm() < 0.5 * moved.norm()


def test_infinite_clip_and_no_noise_is_no_mechanism_bit_for_bit(federate) -> None:
    idle = {"privacy.kind": "central", "privacy.clip": math.inf, "privacy.noise_multiplier": 0.0}
    private = federate("fedavg", overrides=idle)
    assert private.content == federate("fedavg", client_weighting="uniform").content
    assert private.metrics == [{}, {}]  # No loss leaves a client.


def test_a_clip_bounds_what_a_round_moves(federate) -> None:
    clipped = {"privacy.kind": "central", "privacy.clip": 0.01, "privacy.noise_multiplier": 0.0}
    start, end = federate("fedavg", rounds=0), federate("fedavg", rounds=1, overrides=clipped)
    moved = math.sqrt(sum((end.server.state[n] - t).square().sum().item() for n, t in start.server.state.items()))
    assert 0 < moved <= 0.01 * (1 + 1e-5)


def test_full_parameters_travel_as_adapters_do(federate) -> None:
    found = federate("fedavg", overrides={"adapter.kind": "full"})
    numbers = sum(t.numel() for t in loading.read_trained(found.server.model).values())
    assert sum(t.numel() for t in shared(found.server.state).values()) == numbers
    assert found.ledger.per_client("up")[0] > 2 * 4 * numbers


def test_all_cores_of_the_class_fit_on_a_page() -> None:
    import inspect

    lines = inspect.getsource(inspect.getmodule(FedAvg)).split('"""', 2)[2].splitlines()  # type: ignore[arg-type]
    code = [line for line in lines if line.strip() and not line.strip().startswith(('"""', "#"))]
    assert len(code) <= 45
