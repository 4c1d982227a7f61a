"""FedKSeed collapses to FedAvg of the clients' models; quantisation, disclosure and new pools do only what they state."""

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from tests.conftest import stated

from kilofed.config.recipe import TrainSpec
from kilofed.engines.inprocess import InProcess
from kilofed.errors import ClientError, KilofedError, PayloadError
from kilofed.federation.cohort import Cohort, Rules
from kilofed.federation.ledger import Ledger
from kilofed.federation.site import answering
from kilofed.methods.fedkseed import FedKSeed
from kilofed.models import loading, training
from kilofed.payload import Payload
from kilofed.zeroth import codec, seed_log, two_point
from kilofed.zeroth.seed_log import Report, Request

FULL = {"adapter.kind": "full"}
EXACT = {"bits_up": 32, "bits_down": 32, "overrides": FULL}
UNEVEN = {**FULL, "data.partition.kind": "size", "data.partition.num_clients": 3}


def delivered(federation) -> dict[str, torch.Tensor]:
    return loading.read_trained(federation.sites.method.deliver(federation.server))


def test_the_server_model_is_fedavg_of_the_clients_models(federate) -> None:
    found = federate("fedkseed", rounds=1, bits_up=32, bits_down=32, overrides=UNEVEN)
    method, seed, weights, ends = found.sites.method, found.server.seed, [], []
    perturbed, pool = method.perturbed(found.server.model), method.pools.pool(seed, 0)
    start = two_point.Point((pool.at(np.zeros(64, np.float32)),))
    for number in found.sites.client_ids():
        client = found.sites.site(number).client
        stretch = training.batches(client.data, TrainSpec(batch_size=1), first=0, count=3, order=client.order)
        seeds = pool.sample(1, number, 3).tolist()
        done = two_point.take_steps(perturbed, start, seeds, stretch, two_point.StepSettings(method.eps, method.lr))
        ends.append({name: tensor.double().clone() for name, tensor in perturbed.weights(done.end)})
        weights.append(len(client.data))
    assert len(set(weights)) > 1
    for name, tensor in delivered(found).items():
        mean = sum(w * end[name] for w, end in zip(weights, ends, strict=True)) / sum(weights)
        torch.testing.assert_close(tensor.double(), mean, rtol=0, atol=2e-7)


def test_the_start_stays_in_the_shared_model(federate) -> None:
    found = federate("fedkseed", overrides=FULL)
    base = loading.read_trained(federate("fedkseed", rounds=0, overrides=FULL).server.model)
    kept = loading.read_trained(found.server.model)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in base.items())
    assert not all(torch.equal(tensor, delivered(found)[name]) for name, tensor in base.items())


def test_sums_and_scalars_lead_to_the_same_model(federate) -> None:
    scalars, sums = federate("fedkseed", **EXACT), federate("fedkseed", disclose="sums", **EXACT)
    for name, tensor in delivered(scalars).items():
        torch.testing.assert_close(tensor, delivered(sums)[name], rtol=0, atol=1e-6)
    assert scalars.metrics[1]["train_loss"] == pytest.approx(sums.metrics[1]["train_loss"], abs=1e-5)


def test_fine_quantisation_is_float32_on_the_wire(federate) -> None:
    fine = federate("fedkseed", rounds=1, bits_up=16, bits_down=16, overrides=FULL)
    exact, coarse = federate("fedkseed", rounds=1, **EXACT), federate("fedkseed", rounds=1, overrides=FULL)
    sums = [one.server.state["sums"][0] for one in (exact, fine, coarse)]
    assert (sums[1] - sums[0]).norm() < 1e-4 * sums[0].norm() < (sums[2] - sums[0]).norm()
    start = loading.read_trained(exact.server.model)
    for name, tensor in delivered(exact).items():
        assert (tensor - delivered(fine)[name]).norm() <= 1e-3 * (tensor - start[name]).norm() + 1e-6


def test_numbers_on_the_grid_are_exact() -> None:
    exact = np.arange(-31, 33, dtype=np.float64) / 1024
    state, delta = codec.advance(codec.State.zeros(64), exact, bits=8)
    assert np.array_equal(state.values, exact.astype(np.float32))
    assert np.array_equal(codec.decode_scalars(codec.encode_scalars(exact, bits=32), count=len(exact)), exact)
    for reached in (
        codec.receive(codec.State.zeros(64), delta, count=64),
        codec.receive(None, codec.encode_state(state), count=64),
    ):
        assert np.array_equal(reached.values, state.values)
        assert reached.version == state.version == 1


def test_deltas_and_whole_states_lead_to_the_same_state(federate) -> None:
    found = federate("fedkseed", rounds=3, rounds_per_pool=2, fresh=True, overrides={**FULL, "rounds": 3})
    server, method = found.server, found.sites.method
    method.pools.begin(server.state, 4)
    point = method.pools.point(server.seed, server.state)
    for held in [(-1, -1), (0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]:
        client = found.sites.site(0).client
        client.state = {}
        if held[0] >= 0:  # What a client that left after that round has on its disk.
            past = federate(
                "fedkseed", rounds=2 * held[0] + held[1], rounds_per_pool=2, overrides={**FULL, "rounds": 3}
            )
            client.state = {k: t for k, t in past.server.state.items() if k.startswith("state.")}
        method._receive(client, Request(1, updates=method.pools.updates(server.state, held)))
        reached = method.pools.point(server.seed, client.state, num_pools=2)
        assert all(np.array_equal(a.a, b.a) for a, b in zip(reached.chain, point.chain, strict=True))


def test_a_new_pool_starts_from_the_weights_of_the_last_one(federate) -> None:
    found = federate("fedkseed", rounds=2, rounds_per_pool=1, **EXACT)
    one = federate("fedkseed", rounds=1, **EXACT)
    chain = found.sites.method.pools.point(found.server.seed, found.server.state).chain
    assert len(chain) == 2
    assert chain[0].pool.key != chain[1].pool.key
    assert np.array_equal(chain[0].a, one.sites.method.pools.point(one.server.seed, one.server.state).chain[0].a)


@pytest.mark.parametrize("sampling", ["pro", "pro-unbiased"])
def test_pro_counts_alike_whatever_is_disclosed(federate, sampling: str) -> None:
    scalars, sums = (
        federate("fedkseed", sampling=sampling, disclose=kind, bits_up=32, bits_down=32, overrides=UNEVEN)
        for kind in ("scalars", "sums")
    )
    assert scalars.server.state["sums"][2].sum() == 2 * 3 * 3  # Rounds, clients, steps.
    torch.testing.assert_close(scalars.server.state["sums"], sums.server.state["sums"], rtol=1e-3, atol=1e-4)


def test_a_client_with_another_base_model_is_named(federate) -> None:
    found = federate("fedkseed", rounds=1, fresh=True, overrides=FULL)
    client, method = found.sites.site(2).client, found.sites.method
    asks = method._asks(found.server, [2])
    with torch.no_grad():
        next(iter(loading.trained(client.model).values()))[0] += 1e-3
    client.state, client.round = {}, 2
    with pytest.raises(ClientError, match=r"the rebuilt weights hash to .* base model, dtype"):
        method.walk(client, asks[2])


def test_a_client_with_wrong_weights_stops_a_run_or_is_left_out_and_sent_everything_again(federate) -> None:
    found = federate("fedkseed", rounds=1, fresh=True, overrides=FULL)
    ids, sites = found.sites.client_ids(), found.sites

    def answer(number: int, body: bytes) -> bytes:
        parameter = next(iter(loading.trained(sites.store.model(sites.recipe.model)).values()))
        with torch.no_grad():
            parameter[0] += 1e-3 * (number == 1)
            try:
                return sites.handle(number, body)
            finally:
                parameter[0] -= 1e-3 * (number == 1)

    found.server.round = 2
    engine = InProcess(ids, answer)
    with pytest.raises(ClientError, match="client 1: the rebuilt weights hash"):
        sites.method.round(found.server, Cohort(ids, engine, Ledger(), sites.policy, round=2))
    cohort = Cohort(ids, engine, Ledger(), sites.policy, round=2, rules=Rules(skip_failures=True))
    sites.method.round(found.server, cohort)
    assert list(cohort.failures) == [1]
    held = {client: (pool, version) for client, pool, version in found.server.state["held"].tolist()}
    assert held == {0: (0, 1), 1: (-1, -1), 2: (0, 1)}


def test_charts_show_every_coefficient_in_order_and_probabilities_that_sum_to_k(federate) -> None:
    found = federate("fedkseed", sampling="pro", overrides=FULL)
    walked, chances = found.sites.method.presentation().charts(found.server, [])
    sizes = [y for _, y in walked.lines["coefficients"]]
    assert len(sizes) == 64
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == np.abs(found.sites.method.pools.coefficients(found.server.state, 0)).max() > 0
    assert sum(y for _, y in chances.lines["pro"]) == pytest.approx(64)
    uniform = federate("fedkseed", overrides=FULL)
    assert len(uniform.sites.method.presentation().charts(uniform.server, [])) == 1


def test_gradients_out_of_range_are_refused_and_their_client_named(federate) -> None:
    method = federate("fedkseed", rounds=0, max_scalar_gradient=1e4, overrides=FULL).sites.method
    good, steep = Report(9, 1.0, (), np.ones(3)).pack(6), Report(9, 1.0, (), np.full(3, 1e5)).pack(32)
    for broken, words in ((steep, "gradient of magnitude 100000"), (good[:-1], "checksum"), (b"", "truncated")):
        with pytest.raises(PayloadError, match=words):
            method.pools.report(broken)


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "steep": (lambda: Report(9, 1.0, (), np.full(3, 1e7)).pack(32), "gradient of magnitude 1e.07"),
    "heavy": (lambda: Report(10**9, 1.0, (), np.ones(3)).pack(6), "weight 1e.09; its rows allow at most"),
    "long": (lambda: Report(9, 1.0, (), np.ones(4)).pack(6), "expected 3|4 numbers|of 4"),
    "cut": (lambda: Report(9, 1.0, (), np.ones(3)).pack(6)[:-1], "checksum"),
}


@pytest.mark.parametrize("liar", [0, 1, 2])
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_report_is_its_clients_failure_and_no_part_of_the_round(federate, kind: str, liar: int) -> None:
    pack, words = HOSTILE[kind]

    def round(hostile: bool, skip: bool) -> tuple[object, Cohort]:
        how = {"on_failure": "skip" if skip else "stop"}
        found = federate("fedkseed", rounds=1, fresh=True, overrides={**FULL, **how})
        found.server.round = 2

        def answer(number: int, body: bytes) -> bytes:
            if number == liar and not hostile:
                raise ConnectionError("no answer is no report either")
            reply = Payload.decode(found.sites.handle(number, body))
            tensors = {"b": seed_log.to_tensor(pack())} if number == liar else reply.tensors
            return Payload(tensors, reply.scalars).encode()

        ids = found.sites.client_ids()
        engine = InProcess(ids, answering(answer, found.sites.policy))
        cohort = found.sites.cohort(ids, engine, Ledger(), round=2)
        found.sites.method.round(found.server, cohort)
        return found, cohort

    found, cohort = round(hostile=True, skip=True)
    assert list(cohort.failures) == [liar]
    assert re.search(words, cohort.failures[liar])
    without, _ = round(hostile=False, skip=True)
    assert found.content == without.content
    with pytest.raises(ClientError, match=words):
        round(hostile=True, skip=False)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_seeds": 1000}, "power of two"),
        ({"num_seeds": 16}, "power of two, from 64"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"lr": math.inf}, "lr is inf"),
        ({"bits_up": 1}, "bits_up is 1; expected from 2 to 16, or 32"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_fields_out_of_range_are_refused(fields: dict[str, float], words: str) -> None:
    with pytest.raises(KilofedError, match=words):
        FedKSeed(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"train.schedule": "cosine"}, {"train.weight_decay": 0.1}, {"train.warmup": 0.1}])
def test_a_schedule_or_decay_that_sums_cannot_stand_for_is_refused(federate, change) -> None:
    with pytest.raises(KilofedError, match="one constant learning rate without decay"):
        federate("fedkseed", rounds=0, overrides={**FULL, **change})


def test_a_client_that_failed_is_sent_all_that_it_may_have_missed(federate, away_in) -> None:
    # It holds the coefficients of round 1, and the change from round 2 to 3 does not fit those.
    found = federate("fedkseed", rounds=3, engine=away_in(2), overrides={**FULL, "rounds": 3})
    assert [sorted(failed) for failed in found.failures] == [[], [1], []]
    assert found.server.state["held"].tolist() == [[0, 0, 2], [1, 0, 2], [2, 0, 2]]
    down = {(row.round, row.client): row.bytes for row in found.ledger.rows() if row.direction == "down"}
    assert down[2, 1] == down[2, 0]
    assert down[3, 1] > down[3, 0] == down[3, 2]


def test_defaults_and_bounds_are_those_that_runs_rely_on() -> None:
    assert stated(FedKSeed) == {
        "num_seeds": (4096, "a power of two, from 64 to 1048576"),
        "steps": (200, "from 1 to 65535"),
        "batch_size": (1, "at least 1"),
        "eps": (5e-4, "above 0"),
        "lr": (3e-07, "at least 0"),
        "bits_up": (6, "from 2 to 16, or 32"),
        "bits_down": (5, "from 2 to 16, or 32"),
        "rounds_per_pool": (0, "at least 0"),
        "max_scalar_gradient": (1e6, "above 0"),
        "max_gradient_ratio": (10.0, "at least 0"),
        "check_every": (1, "at least 0"),
    }
