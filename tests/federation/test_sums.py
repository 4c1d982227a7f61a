"""The weighted sum: the bits of adding tensor by tensor in float64, whole replies or none."""

import pytest
import torch

from kilofed.errors import PayloadError
from kilofed.federation.sums import WeightedSum
from kilofed.payload import Payload


def reply(seed: int, dtype: torch.dtype = torch.float32) -> Payload:
    source = torch.Generator().manual_seed(seed)
    shapes = {"a": (7, 3), "b": (5,), "c": ()}
    tensors = {name: torch.randn(shape, generator=source).to(dtype) for name, shape in shapes.items()}
    return Payload({**tensors, "n": torch.randint(0, 9, (3,), generator=source)}, {"loss": float(seed)})


WEIGHTS = [3.0, 0.1, 1 / 3, 17.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_mean_has_the_bits_of_adding_tensor_by_tensor(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kilofed.federation.sums._CHUNK", 8)
    total = WeightedSum()
    expected: dict[str, torch.Tensor] = {}
    for seed, weight in enumerate(WEIGHTS):
        one = reply(seed, dtype)
        total.add(Payload.decode(one.encode()), weight)
        for name, tensor in one.tensors.items():
            expected[name] = expected.get(name, torch.zeros(())) + tensor.double() * weight
    mean = total.mean()
    for name, tensor in mean.tensors.items():
        kind = dtype if name != "n" else torch.float64
        assert tensor.dtype == kind
        assert torch.equal(tensor, (expected[name] / sum(WEIGHTS)).to(kind))
    assert mean.scalars["loss"] == pytest.approx((0.1 + 2 / 3 + 3 * 17) / sum(WEIGHTS))


def test_adding_leaves_the_reply_as_it_was() -> None:
    one = Payload.decode(reply(1, torch.float64).encode())
    before = one.encode()
    WeightedSum().add(one, 0.3)
    assert one.encode() == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_reply_that_is_no_number_is_refused_whole(bad: float) -> None:
    total = WeightedSum()
    total.add(reply(1), 1.0)
    spoilt = Payload.decode(reply(2).encode())
    spoilt.tensors["b"][3] = bad
    with pytest.raises(PayloadError, match="NaN or infinite numbers in b"):
        total.add(spoilt, 1.0)
    assert total.num == 1
    assert torch.equal(total.mean().tensors["a"], reply(1).tensors["a"])


def test_large_finite_numbers_are_numbers() -> None:
    total = WeightedSum()
    large = torch.full((4,), 3e38)
    total.add(Payload({"a": large}), 1.0)
    assert torch.equal(total.mean().tensors["a"], large)


@pytest.mark.parametrize(
    "other",
    [
        Payload({"a": torch.ones(2, dtype=torch.bfloat16)}, {"x": 1.0}),
        Payload({"b": torch.ones(2)}, {"x": 1.0}),
        Payload({"a": torch.ones(3)}, {"x": 1.0}),
        Payload({"a": torch.ones(2)}, {"x": 1.0, "more": 3}),
        Payload({"a": torch.ones(2)}),
    ],
)
def test_what_is_unlike_the_rest_is_refused_whole(other: Payload) -> None:
    total = WeightedSum()
    total.add(Payload({"a": torch.ones(2)}, {"x": 2.0}), 1.0)
    with pytest.raises(PayloadError, match="than what was added before"):
        total.add(other, 1.0)
    assert total.mean().encode() == Payload({"a": torch.ones(2)}, {"x": 2.0}).encode()


def test_scalars_are_averaged_by_weight() -> None:
    total = WeightedSum()
    total.add(Payload({"a": torch.ones(2)}, {"x": 1.0}), 1.0)
    total.add(Payload({"a": torch.zeros(2)}, {"x": 5}), 3.0)
    assert total.mean().tensors["a"].tolist() == [0.25, 0.25]
    assert total.mean().scalars == {"x": 4.0}
    assert total.weight == 4.0


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_refused(weight: float) -> None:
    with pytest.raises(PayloadError, match="expected a number from 0"):
        WeightedSum().add(reply(1), weight)


def test_nothing_added_is_an_empty_mean() -> None:
    assert not WeightedSum().mean().tensors


def test_an_exact_mean_is_rounded_once_however_much_is_added_to_it() -> None:
    total = WeightedSum()
    for value in (1000.0, 1000.5, 1000.0):  # float16 has steps of 0.5 here.
        total.add(Payload({"a": torch.full((3,), value, dtype=torch.float16), "n": torch.tensor([7])}), 1.0)
    exact = total.exact_mean()
    assert exact.tensors["a"].dtype == exact.tensors["n"].dtype == torch.float64
    torch.testing.assert_close(exact.tensors["a"], torch.full((3,), 3000.5 / 3, dtype=torch.float64))
    assert total.mean().tensors["a"].tolist() == [1000.0] * 3
    moved = total.rounded(Payload({name: tensor + 0.1 for name, tensor in exact.tensors.items()}))
    assert moved.tensors["a"].tolist() == [1000.5] * 3
    assert moved.tensors["a"].dtype == torch.float16
    assert moved.tensors["n"].dtype == torch.float64


def test_a_mean_shares_no_memory_with_the_sum_or_another_mean() -> None:
    total = WeightedSum()
    total.add(reply(1, torch.float64), 2.0)
    first, second = total.mean(), total.mean()
    first.tensors["a"].zero_()
    assert torch.equal(second.tensors["a"], reply(1, torch.float64).tensors["a"])
    assert torch.equal(total.mean().tensors["a"], second.tensors["a"])
