"""Split learning is plain training, cut in two."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from tests.conftest import stated

from kilofed.engines.inprocess import InProcess
from kilofed.errors import ClientError, PrivacyError, RecipeError, TooFewReplies
from kilofed.federation.cohort import Cohort, Rules
from kilofed.methods.split import Split
from kilofed.payload import Payload

ALONE = {"data.partition.kind": "iid", "data.partition.num_clients": 1}
FULL = {"adapter.kind": "full"}
OTHER_SHAPES = [("server", "joint"), ("server", "averaged"), ("client", "sequential"), ("client", "averaged")]


def assert_equal(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) == 0.0


@pytest.mark.parametrize(
    ("labels", "part"),
    [
        ("server", "sequential"),
        ("client", "joint"),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in OTHER_SHAPES),
    ],
)
def test_with_one_client_it_is_plain_training(federate, labels: str, part: str) -> None:
    split = federate("split", overrides=ALONE, labels=labels, server_part=part)
    plain = federate("fedavg", overrides=ALONE)
    assert_equal(split.server.state, plain.server.state)
    assert split.metrics == plain.metrics


@pytest.mark.parametrize("labels", ["server", "client"])
@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("sgd", marks=pytest.mark.slow)])
def test_averaged_parts_are_fedavg_whatever_the_number_of_clients(federate, labels: str, optimizer: str) -> None:
    how = {"train.optimizer": optimizer, "train.weight_decay": 0.1}
    # The server's part has one schedule for all, so a schedule needs equally many steps.
    for steps in ({"train.epochs": 1}, {"train.schedule": "cosine"}):
        split = federate("split", overrides={**how, **steps}, labels=labels, server_part="averaged")
        plain = federate("fedavg", overrides={**how, **steps})
        assert_equal(split.server.state, plain.server.state)


def test_all_parameters_are_trained_with_the_head_at_the_client_as_without_a_cut(federate) -> None:
    split = federate("split", overrides=FULL, labels="client", server_part="averaged")
    assert_equal(split.server.state, federate("fedavg", overrides=FULL).server.state)


@pytest.mark.slow
@pytest.mark.parametrize("labels", ["server", "client"])
def test_a_round_with_an_average_after_half_its_steps_is_two_rounds(federate, labels: str) -> None:
    sgd = {"train.optimizer": "sgd"}  # It remembers nothing that a new round would forget.
    words = {"labels": labels, "server_part": "averaged"}
    once = federate("split", rounds=1, overrides={**sgd, "train.steps": 4}, average_every=2, **words)
    twice = federate("split", rounds=2, overrides={**sgd, "train.steps": 2}, **words)
    assert_equal(once.server.state, twice.server.state)


@pytest.mark.slow
def test_every_client_moves_a_shared_part_of_the_server(federate) -> None:
    start = federate("split", rounds=0)
    ends = {part: federate("split", server_part=part).server.state for part in ("sequential", "joint", "averaged")}
    theirs = start.sites.method.shares(start.server)[1]
    for one, other in (("sequential", "joint"), ("joint", "averaged"), ("averaged", "sequential")):
        assert all(not torch.equal(ends[one][name], ends[other][name]) for name in theirs)


@pytest.mark.slow
def test_a_step_on_a_joint_part_follows_the_mean_of_the_clients_losses(federate) -> None:
    # With plain gradient descent, one step from the mean gradient is the mean of the clients' steps: FedAvg's.
    sgd = {"train.optimizer": "sgd", "train.steps": 1}
    for labels in ("server", "client"):
        joint = federate(
            "split", rounds=1, overrides=sgd, server_part="joint", labels=labels, client_weighting="uniform"
        )
        plain = federate("fedavg", rounds=1, overrides=sgd, client_weighting="uniform")
        for name, tensor in plain.server.state.items():
            torch.testing.assert_close(joint.server.state[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("labels", ["server", "client"])
def test_exchanges_are_one_or_two_per_batch_and_one_for_the_parts(federate, labels: str) -> None:
    def actions(part: str) -> list[str]:
        found = federate("split", rounds=1, labels=labels, server_part=part)
        return [action for _, action in sorted({(row.exchange, row.action) for row in found.ledger.rows()})]

    heads = [] if labels == "server" else ["head"]
    assert actions("joint") == actions("averaged") == [*["forward", *heads] * 2, "part"]
    assert actions("sequential") == [*["forward", *heads * 3] * 2, "part"]


def bytes_of(federation, action: str, way: str) -> int:
    return sum(row.bytes for row in federation.ledger.rows() if (row.action, row.direction) == (action, way))


def test_int8_activations_take_a_quarter_of_the_bytes_and_bfloat16_half(federate) -> None:
    one = {**ALONE, "data.partition.num_clients": 1, "train.batch_size": 32}
    wide = {
        width: federate("split", rounds=1, overrides=one, activations=width)
        for width in ("float32", "bfloat16", "int8")
    }
    up = {width: bytes_of(found, "forward", "up") for width, found in wide.items()}
    rows = sum(row.bytes for row in wide["float32"].ledger.rows() if row.action == "forward" and row.direction == "up")
    num, width = (up["float32"] - up["bfloat16"]) // (2 * 16), 16  # Tokens that were sent, numbers per token.
    assert up["float32"] - up["int8"] == pytest.approx(num * (3 * width - 2), abs=256)
    assert rows > num * width * 4


@pytest.mark.slow
@pytest.mark.parametrize("labels", ["server", "client"])
def test_16_and_8_bit_activations_train_almost_the_same(federate, labels: str) -> None:
    words = {"labels": labels, "server_part": "averaged"}
    sgd = {"train.optimizer": "sgd", "train.lr": 0.1, "train.steps": 4}
    start = federate("split", rounds=0, overrides=sgd, **words).server.state
    exact = federate("split", rounds=1, overrides=sgd, **words).server.state
    for width, most in (("bfloat16", 0.02), ("int8", 0.05)):
        found = federate("split", rounds=1, overrides=sgd, activations=width, gradients=width, **words).server.state
        moved = sum(float((exact[name] - start[name]).square().sum()) for name in exact)
        missed = sum(float((found[name] - exact[name]).square().sum()) for name in exact)
        assert 0 < missed < most**2 * moved


@pytest.mark.slow
@pytest.mark.parametrize("words", [{}, {"labels": "client"}, {"labels": "client", "server_part": "joint"}])
def test_residuals_and_averages_survive_a_restart(federate, words: dict[str, str], tmp_path: Path) -> None:
    all_of_it = {**words, "activations": "int8", "gradients": "int8", "average_every": 1}
    how = {"adapter.dropout": 0.2, "train.max_grad_norm": 0.5}
    whole = federate("split", rounds=1, overrides=how, **all_of_it)
    again = federate("split", rounds=1, overrides=how, folder=tmp_path, forgetful=True, **all_of_it)
    assert again.content == whole.content


class Leaves(InProcess):
    """The client with the highest number answers `num` messages and then never again."""

    num = 0

    def exchange(self, asks: Mapping[int, bytes]) -> Iterator[tuple[int, bytes]]:
        last = self._ids[-1]
        if last in asks:
            self.num -= 1
        yield from super().exchange({c: body for c, body in asks.items() if c != last or self.num >= 0})


def leaving_after(num: int) -> type[Leaves]:
    return type("LeavesAfter", (Leaves,), {"num": num})


@pytest.mark.parametrize(
    ("words", "num"),
    [
        ({"server_part": "averaged"}, 1),
        pytest.param({"server_part": "averaged"}, 2, marks=pytest.mark.slow),
        pytest.param({"server_part": "averaged", "labels": "client"}, 1, marks=pytest.mark.slow),
        pytest.param({"server_part": "averaged", "labels": "client"}, 2, marks=pytest.mark.slow),
        ({"server_part": "joint"}, 1),
        pytest.param({"server_part": "joint", "labels": "client"}, 1, marks=pytest.mark.slow),
        pytest.param({"server_part": "joint", "labels": "client"}, 2, marks=pytest.mark.slow),
    ],
)
def test_a_client_lost_in_its_first_batch_has_no_effect(federate, words: dict[str, str], num: int) -> None:
    sgd = {"train.optimizer": "sgd", "train.lr": 0.1}
    found = federate("split", rounds=1, overrides=sgd, engine=leaving_after(num), **words)
    without = federate("split", rounds=1, overrides=sgd, engine=leaving_after(0), **words)
    for name, tensor in without.server.state.items():
        torch.testing.assert_close(found.server.state[name], tensor, rtol=1e-5, atol=1e-7)


def test_a_lost_step_of_a_sequential_part_is_undone(federate) -> None:
    # Under plain descent with a tiny rate, steps add up: all that is missing is the lost client's.
    sgd = {"train.optimizer": "sgd", "train.lr": 1e-3}
    start = federate("split", rounds=0, overrides=sgd)
    for labels in ("server", "client"):
        num = 1 if labels == "server" else 2
        lost = federate("split", rounds=1, overrides=sgd, engine=leaving_after(num), labels=labels).server.state
        never = federate("split", rounds=1, overrides=sgd, engine=leaving_after(0), labels=labels).server.state
        for name in start.sites.method.shares(start.server)[1]:
            torch.testing.assert_close(lost[name], never[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_steps_whose_gradients_arrived_stay(federate) -> None:
    sgd = {"train.optimizer": "sgd", "train.lr": 0.1}
    late = federate("split", rounds=1, overrides=sgd, engine=leaving_after(2)).server.state
    early = federate("split", rounds=1, overrides=sgd, engine=leaving_after(1)).server.state
    theirs = federate("split", rounds=0).sites.method.shares(federate("split", rounds=0).server)[1]
    assert all(not torch.equal(late[name], early[name]) for name in theirs if "lora_B" in name)


class Sends(InProcess):
    """The client with the highest number sends what is no batch."""

    wrong: Callable[[Payload], Payload]

    def exchange(self, asks: Mapping[int, bytes]) -> Iterator[tuple[int, bytes]]:
        for client, body in super().exchange(asks):
            yield client, self.wrong(Payload.decode(body)).encode() if client == self._ids[-1] else body


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (lambda r: Payload({**r.tensors, "rows": r.tensors["rows"] * torch.nan}, r.scalars), "NaN or infinite"),
        (lambda r: Payload({**r.tensors, "rows": r.tensors["rows"][1:]}, r.scalars), "expected"),
        (lambda r: Payload({**r.tensors, "labels": r.tensors["labels"][1:]}, r.scalars), "labels for"),
        (lambda r: Payload({n: t for n, t in r.tensors.items() if n != "lengths"}, r.scalars), "'lengths' is missing"),
    ],
)
def test_an_invalid_reply_is_named_and_its_client_dropped(
    federate, wrong: Callable[[Payload], Payload], why: str
) -> None:
    found = federate("split", rounds=0, fresh=True)
    engine = type("Wrong", (Sends,), {"wrong": staticmethod(wrong)})(found.sites.client_ids(), found.sites.handle)
    found.server.round = 1
    cohort = Cohort(
        found.sites.client_ids(), engine, found.ledger, found.sites.policy, round=1, rules=Rules(skip_failures=True)
    )
    found.sites.method.round(found.server, cohort)
    assert list(cohort.failures) == [2]
    assert why in cohort.failures[2]
    strict = Cohort(found.sites.client_ids(), engine, found.ledger, found.sites.policy, round=1)
    with pytest.raises(ClientError, match=f"client 2: (.*){why}"):
        found.sites.method.round(found.server, strict)


def test_a_round_ends_when_too_few_are_left(federate) -> None:
    found = federate("split", rounds=0, fresh=True)
    engine = leaving_after(1)(found.sites.client_ids(), found.sites.handle)
    found.server.round = 1
    cohort = Cohort(found.sites.client_ids(), engine, found.ledger, found.sites.policy, round=1, rules=Rules(3, True))
    with pytest.raises(TooFewReplies):
        found.sites.method.round(found.server, cohort)


def test_clients_never_hold_a_block_of_the_server(federate) -> None:
    for labels in ("server", "client"):
        found = federate("split", labels=labels)
        names = [name for name, _ in found.sites.site(0).client.model.named_parameters()]
        assert any(".layers.0." in name for name in names)
        assert not any(".layers.1." in name for name in names)
        assert any(name.endswith("model.norm.weight") for name in names) == (labels == "client")


@pytest.mark.parametrize("cut", [2, 3])
def test_a_cut_that_leaves_a_side_empty_is_refused(federate, cut: int) -> None:
    with pytest.raises(RecipeError, match=f"method.cut is {cut}, and the model has 2 blocks: expected 1 to 1"):
        federate("split", cut=cut)


def test_settings_that_cannot_be_split_are_refused(federate) -> None:
    with pytest.raises(RecipeError, match=r"set method\.labels=client"):
        federate("split", overrides=FULL)
    with pytest.raises(RecipeError, match=r"set 1 and a smaller train\.batch_size"):
        federate("split", overrides={"train.accumulation": 2})
    with pytest.raises(PrivacyError, match="lets the server see single replies"):
        federate("split", overrides={"privacy.kind": "central"})


def test_the_report_has_the_reconstruction_attacks(federate) -> None:
    found = federate("split")
    rows = [row for client in found.sites.client_ids() for row in found.sites.corpus.test_examples(client)]
    (chart,) = found.sites.method.presentation().charts(found.server, rows)
    assert set(chart.lines) == {"linear inverter", "nearest embedding"}
    assert [x for x, _ in chart.lines["linear inverter"]] == [1]
    assert "tokens from the activations" in chart.words
    assert found.sites.method.presentation().charts(found.server, []) == []


@pytest.mark.parametrize("labels", ["server", pytest.param("client", marks=pytest.mark.slow)])
def test_noise_on_hidden_states_comes_through_the_policy(federate, labels: str) -> None:
    rows = {"privacy.kind": "activations", "privacy.noise_key": "ab" * 16, "privacy.clip": 1e6}
    plain = federate("split", labels=labels)
    still = federate("split", labels=labels, overrides={**rows, "privacy.noise_multiplier": 0.0})
    assert_equal(still.server.state, plain.server.state)
    noisy = federate("split", labels=labels, overrides={**rows, "privacy.clip": 0.5, "privacy.noise_multiplier": 0.1})
    assert all(bool(tensor.isfinite().all()) for tensor in noisy.server.state.values())
    assert noisy.content != plain.content
    assert noisy.ledger.total("up") == plain.ledger.total("up")
    with pytest.raises(PrivacyError, match="noise needs floating-point rows"):
        federate("split", labels=labels, activations="int8", overrides=rows)


def test_clients_count_by_the_examples_they_trained_on(federate) -> None:
    # One epoch: the clients train on all of their 3, 8 and 33 rows, in one, two and nine batches.
    epoch = {"train.epochs": 1}
    by_rows = federate("split", rounds=1, overrides=epoch, server_part="averaged").server.state
    alike = federate("split", rounds=1, overrides=epoch, server_part="averaged", client_weighting="uniform")
    plain = federate("fedavg", rounds=1, overrides=epoch, client_weighting="uniform")
    assert_equal(alike.server.state, plain.server.state)
    assert_equal(by_rows, federate("fedavg", rounds=1, overrides=epoch).server.state)
    assert all(not torch.equal(by_rows[name], tensor) for name, tensor in alike.server.state.items())


def test_defaults_and_bounds_are_those_that_runs_rely_on() -> None:
    assert stated(Split) == {
        "cut": (1, "at least 1"),
        "average_every": (0, "at least 0"),
    }
