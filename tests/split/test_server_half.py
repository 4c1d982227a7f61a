"""The server's half: validation of batches, client weights in a joint step, undone steps."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kilofed.config.recipe import AdapterSpec, ModelSpec, TrainSpec
from kilofed.data.examples import IGNORED, Example
from kilofed.errors import NonFiniteLoss, PayloadError
from kilofed.models import halves, loading, training
from kilofed.models.halves import Halves
from kilofed.split import activation_codec, server_half
from kilofed.split.server_half import BatchLimits, ClientBatch, ServerHalf, Sharing

SGD = TrainSpec(optimizer="sgd", lr=0.5)
TOKENS = BatchLimits(8, 16, 16, "float32", "tokens", 259)
CLASSES = replace(TOKENS, targets="classes", num_outputs=5)


def batch(seed: int, lengths: list[int]) -> training.TokenBatch:
    """Rows of random tokens; the first two of each are not learnt."""
    draws = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 259, (length,), generator=draws).tolist() for length in lengths]
    return training.collate_tokens([Example(row, [IGNORED] * 2 + row[2:], [], []) for row in rows])


@pytest.fixture
def model(tiny_model: Path) -> torch.nn.Module:
    return loading.load_model(ModelSpec(str(tiny_model)), AdapterSpec(rank=2), 0)


@pytest.fixture
def make_server(model: torch.nn.Module) -> Callable[[Sharing], ServerHalf]:
    """A server's side whose first step has begun."""
    names = loading.trained_names(model)
    held = loading.read_trained(model)
    own = {n: held[n] for n, full in names.items() if not halves.held_by_client(model, full, cut=1, head=False)}

    def make(sharing: Sharing) -> ServerHalf:
        make_server = ServerHalf(model, 1, own, SGD, sharing, lambda purpose: torch.Generator().manual_seed(0))
        make_server.begin_step(0, SGD.lr)
        return make_server

    return make


def sent(model: torch.nn.Module, one: training.Batch) -> ClientBatch:
    hidden = Halves(model, 1).below(one.input_ids, one.attention_mask).detach()
    tensors, _ = activation_codec.encode(activation_codec.unpad(hidden, one.attention_mask), "float32")
    return server_half.decode_batch(tensors | server_half.lengths(one) | server_half.labels(one), TOKENS)


def test_batches_round_trip(model: torch.nn.Module) -> None:
    one = batch(0, [5, 3])
    read = sent(model, one)
    assert torch.equal(read.mask_BT, one.attention_mask)
    assert isinstance(read.batch, training.TokenBatch)
    assert torch.equal(read.batch.labels, one.labels)
    assert not read.batch.input_ids.any()
    assert not read.hidden_BTD[1, 3:].any()
    without = {"rows": torch.zeros(8, 16), **server_half.lengths(one)}
    assert server_half.decode_batch(without, replace(TOKENS, targets="none")).batch is None
    classes = training.ClassBatch(one.input_ids, one.attention_mask, torch.tensor([4, 1]))
    found = server_half.decode_batch(without | server_half.labels(classes), CLASSES).batch
    assert isinstance(found, training.ClassBatch)
    assert found.classes.tolist() == [4, 1]


def test_limits_are_those_of_the_model_and_the_recipe(model: torch.nn.Module) -> None:
    spec = TrainSpec(batch_size=7)
    found = BatchLimits.of(model, spec, length=9, dtype="int8", labels=True)
    assert found == BatchLimits(7, 9, 16, "int8", "tokens", 259)
    assert BatchLimits.of(model, spec, length=9, dtype="int8", labels=False).targets == "none"


def test_limits_of_a_classifier(tiny_encoder: Path) -> None:
    model = loading.load_model(ModelSpec(str(tiny_encoder)), AdapterSpec(rank=2), 0, ("a", "b", "c"))
    found = BatchLimits.of(model, TrainSpec(), length=9, dtype="int8", labels=True)
    assert (found.targets, found.num_outputs) == ("classes", 3)


def reply(*, targets: server_half.Targets = "tokens") -> dict[str, torch.Tensor]:
    """Hidden states of rows of 5 and 3 tokens, and what is learnt from them."""
    one = batch(0, [5, 3])
    sent = {"rows": torch.ones(8, 16), **server_half.lengths(one)}
    if targets == "tokens":
        return sent | server_half.labels(one)
    return sent | ({"classes": torch.tensor([4, -100], dtype=torch.int32)} if targets == "classes" else {})


def int32(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": torch.tensor([5, 3])}, r"lengths of torch\.int64 \(2,\)"),
        ({"lengths": int32(5, 3)[None]}, r"lengths of torch\.int32 \(1, 2\)"),
        ({"lengths": torch.tensor([5.0, 3.0])}, "lengths of torch.float32"),
        ({"lengths": int32()}, "0 rows; expected 1 to 4"),
        ({"lengths": int32(2, 2, 2, 1, 1)}, "5 rows; expected 1 to 4"),
        ({"lengths": int32(8, 0)}, "8 among its lengths; expected 1 to 6"),
        ({"lengths": int32(9, -1)}, "9 among its lengths; expected 1 to 6"),
        ({"lengths": int32(5, 0)}, "0 among its lengths; expected 1 to 6"),
        ({"lengths": int32(5, -3)}, "-3 among its lengths; expected 1 to 6"),
        ({"lengths": int32(1, 7)}, "7 among its lengths; expected 1 to 6"),
        ({"lengths": int32(5, 4)}, r"rows of torch\.float32 \(8, 16\); expected torch\.float32 \(9, 16\)"),
        ({"lengths": int32(6, 6, 6, 6)}, r"expected torch\.float32 \(24, 16\)"),
        ({"rows": torch.ones(8, 15)}, r"expected torch\.float32 \(8, 16\)"),
        ({"rows": torch.ones(8, 16).bfloat16()}, r"rows of torch\.bfloat16"),
        ({"rows": torch.full((8, 16), torch.nan)}, "NaN or infinite"),
        ({"rows": torch.full((8, 16), -torch.inf)}, "NaN or infinite"),
        ({"rows": torch.ones(8, 16).index_fill(0, torch.tensor(7), torch.nan)}, "NaN or infinite"),
        ({"rows": torch.full((8, 16), 3e38)}, r"values up to 3e\+38; expected at most 1e\+06"),
        ({"rows": -torch.full((8, 16), 1.1e6)}, r"values up to 1\.1e\+06; expected at most 1e\+06"),
        ({"labels": int32(*[1] * 7)}, "7 labels for 8 tokens in 2 rows"),
        ({"labels": int32(*[1] * 7, 259)}, "259 among its labels; expected 0 to 258"),
        ({"labels": int32(*[1] * 7, -1)}, "-1 among its labels"),
        ({"labels": int32(*[-100] * 8)}, "no labels to learn from in 2 rows"),
        ({"labels": int32(1, *[-100] * 4, 1, -100, -100)}, "no labels to learn from"),  # First tokens have no loss.
        ({"labels": torch.ones(8)}, "labels of torch.float32"),
        ({"scales": torch.ones(8)}, r"which differs in \['scales'\]"),
        ({"classes": int32(1, 1)}, r"which differs in \['classes'\]"),
        ({"more": int32(1)}, r"which differs in \['more'\]"),
    ],
)
def test_a_batch_out_of_its_limits_is_refused(change: dict[str, torch.Tensor], message: str) -> None:
    limits = replace(TOKENS, num_rows=4, length=6)
    server_half.decode_batch(reply(), limits)
    with pytest.raises(PayloadError, match=message):
        server_half.decode_batch(reply() | change, limits)


@pytest.mark.parametrize("missing", ["rows", "lengths", "labels"])
def test_a_batch_without_a_tensor_is_refused(missing: str) -> None:
    kept = {name: tensor for name, tensor in reply().items() if name != missing}
    with pytest.raises(PayloadError, match=rf"which differs in \['{missing}'\]"):
        server_half.decode_batch(kept, TOKENS)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (int32(4), "1 classes for 8 tokens in 2 rows"),
        (int32(4, 5), "5 among its classes; expected 0 to 4"),
        (int32(4, -1), "-1 among its classes"),
        (int32(-100, -100), "no classes to learn from"),
    ],
)
def test_classes_that_do_not_fit_are_refused(classes: torch.Tensor, message: str) -> None:
    assert server_half.decode_batch(reply(targets="classes"), CLASSES).batch is not None
    with pytest.raises(PayloadError, match=message):
        server_half.decode_batch(reply(targets="classes") | {"classes": classes}, CLASSES)
    with pytest.raises(PayloadError, match=r"which differs in \['classes', 'labels'\]"):
        server_half.decode_batch(reply(targets="tokens"), CLASSES)
    with pytest.raises(PayloadError, match=r"which differs in \['labels'\]"):
        server_half.decode_batch(reply(targets="tokens"), replace(TOKENS, targets="none"))


@pytest.mark.parametrize("sharing", ["averaged", "sequential", "joint"])
def test_the_largest_values_that_pass_overflow_nothing(
    model: torch.nn.Module, make_server: Callable[[Sharing], ServerHalf], sharing: Sharing
) -> None:
    largest, half = server_half.MAX_MAGNITUDE, make_server(sharing)
    source = torch.Generator().manual_seed(0)
    signs = torch.randn(8, 16, generator=source).sign()
    given = server_half.decode_batch(reply() | {"rows": signs * largest}, TOKENS)
    answer = half.train({0: given})[0]
    assert math.isfinite(answer.loss)
    assert answer.gradient_BTD.isfinite().all()
    assert all(tensor.isfinite().all() for tensor in half.result({0: 1.0}).values())
    # The same for gradients from heads that are at the clients.
    half.begin_step(1, SGD.lr)
    top = half.forward_to_head(0, replace(given, batch=None))
    answer = half.train({0: ClientBatch(given.hidden_BTD, given.mask_BT, top_BTD=top.sign() * largest)})[0]
    assert answer.gradient_BTD.isfinite().all()
    assert all(tensor.isfinite().all() for tensor in half.result({0: 1.0}).values())


def test_lengths_that_claim_the_largest_numbers_cost_nothing() -> None:
    most = 2**31 - 1
    with torch.profiler.profile(profile_memory=True) as profile:
        for lengths in (int32(most), int32(most, most), int32(*[most] * 4)):
            with pytest.raises(PayloadError, match=f"{most} among its lengths"):
                server_half.decode_batch(reply() | {"lengths": lengths}, TOKENS)
    assert sum(max(event.cpu_memory_usage, 0) for event in profile.key_averages()) < 10_000


def test_the_loss_is_that_of_the_whole_model(
    model: torch.nn.Module, make_server: Callable[[Sharing], ServerHalf]
) -> None:
    one = batch(0, [6, 4])
    for sharing in ("averaged", "sequential", "joint"):
        answer = make_server(sharing).train({0: sent(model, one)})[0]
        assert answer.loss == float(training.loss(model, one).detach())
        assert answer.gradient_BTD.shape == (2, 6, 16)


def test_in_a_joint_step_clients_have_equal_weights_and_get_their_own_gradients(
    model: torch.nn.Module, make_server: Callable[[Sharing], ServerHalf]
) -> None:
    both = {0: sent(model, batch(0, [9])), 1: sent(model, batch(1, [4, 5, 3]))}
    joint, averaged = make_server("joint"), make_server("averaged")
    together, alone = joint.train(both), averaged.train(both)
    for client in both:
        assert together[client].loss == pytest.approx(alone[client].loss, rel=1e-6)
        torch.testing.assert_close(together[client].gradient_BTD, alone[client].gradient_BTD, rtol=1e-4, atol=1e-7)
    # Of plain descent, the mean of steps is the step along the mean.
    mean, ours = averaged.result({0: 1.0, 1: 1.0}), joint.result({})
    for name, tensor in mean.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-6)


def test_only_a_step_whose_gradient_may_be_lost_is_undone(
    model: torch.nn.Module, make_server: Callable[[Sharing], ServerHalf]
) -> None:
    first, second = (sent(model, batch(seed, [6, 5])) for seed in (0, 1))
    start, one = make_server("sequential").result({}), make_server("sequential")
    one.train({7: first})
    after = one.result({})
    one.train({8: second})
    one.drop(8)
    assert all(torch.equal(tensor, after[name]) for name, tensor in one.result({}).items())
    one.acknowledge(7)
    one.drop(7)
    assert all(torch.equal(tensor, after[name]) for name, tensor in one.result({}).items())
    two = make_server("sequential")
    two.train({7: first})
    two.drop(7)
    assert all(torch.equal(tensor, start[name]) for name, tensor in two.result({}).items())


def test_a_lost_copy_does_not_count(model: torch.nn.Module, make_server: Callable[[Sharing], ServerHalf]) -> None:
    both = {0: sent(model, batch(0, [9])), 1: sent(model, batch(1, [4, 5]))}
    lost, alone = make_server("averaged"), make_server("averaged")
    lost.train(both)
    lost.drop(0)
    alone.train({1: both[1]})
    assert all(torch.equal(t, alone.result({1: 2.0})[name]) for name, t in lost.result({1: 2.0}).items())
    nobody = make_server("averaged")
    assert nobody.result({}).keys() == lost.result({1: 1.0}).keys()


def test_a_loss_that_is_not_finite_is_named(
    model: torch.nn.Module, make_server: Callable[[Sharing], ServerHalf]
) -> None:
    one = sent(model, batch(0, [5]))
    broken = ClientBatch(one.hidden_BTD * torch.nan, one.mask_BT, one.batch)
    with pytest.raises(NonFiniteLoss, match="on a batch of client 3 is nan"):
        make_server("sequential").train({3: broken})


def test_copies_of_the_servers_part_are_averaged_by_weight(
    model: torch.nn.Module, make_server: Callable[[Sharing], ServerHalf]
) -> None:
    both = {0: sent(model, batch(0, [9])), 1: sent(model, batch(1, [4, 5, 3]))}
    server = make_server("averaged")
    server.train(both)
    one, other = server.result({0: 1.0}), server.result({1: 1.0})
    assert any(not torch.equal(one[name], other[name]) for name in one)
    for name, tensor in server.result({0: 3.0, 1: 41.0}).items():
        expected = (3 * one[name].double() + 41 * other[name].double()) / 44
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)
