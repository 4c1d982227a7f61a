"""Norms of updates, and which of them are far above the median."""

import math

import pytest
import torch

from kilofed.federation.outliers import Start, far_out, scaled
from kilofed.payload import Payload


def test_the_norm_is_of_what_changed_over_all_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kilofed.federation.outliers._CHUNK", 3)
    start = torch.full((7,), 100.0)
    reply = Payload({"new": torch.full((2,), 2.0), "old": start + 3.0})
    assert Start(Payload({"old": start})).norm(reply) == pytest.approx(math.sqrt(2 * 4 + 7 * 9))
    assert Start(Payload()).norm(reply) == pytest.approx(math.sqrt(2 * 4 + 7 * 103**2))
    assert Start(Payload()).norm(Payload({"n": torch.tensor([3, 4], dtype=torch.int8)})) == 5.0


def test_large_numbers_do_not_overflow() -> None:
    assert Start(Payload()).norm(Payload({"x": torch.full((4,), 3e38)})) == pytest.approx(6e38)


@pytest.mark.parametrize(
    ("norms", "limit", "far"),
    [
        ({0: 1.0, 1: 2.0, 2: 3.0}, 20.0, []),
        ({0: 1.0, 1: 2.0, 2: 20.0}, 20.0, []),
        ({0: 1.0, 1: 2.0, 2: 20.1}, 20.0, [2]),
        ({0: 500.0, 1: 2.0, 2: 1.0, 3: 1.0}, 15.0, [0]),
        ({0: 0.0, 1: 0.0, 2: 0.0, 3: 1.0, 4: 1.0, 5: 99.0}, 10.0, [5]),
        ({0: 1.0, 1: 999.0}, math.inf, []),
        ({0: 0.0, 1: 0.0, 2: 5.0}, math.inf, []),
    ],
)
def test_the_limit_is_a_multiple_of_the_median_of_those_who_moved(
    norms: dict[int, float], limit: float, far: list[int]
) -> None:
    found, above = far_out(norms, 10.0)
    assert found == limit
    assert above == {client: norms[client] for client in far}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_an_update_is_scaled_in_its_own_dtype_and_values_are_moved_towards_the_start(dtype: torch.dtype) -> None:
    start = torch.tensor([10.0, 20.0]).to(dtype)
    reply = Payload({"old": torch.tensor([18.0, 4.0]).to(dtype), "new": torch.tensor([4.0, 8.0]).to(dtype)}, {"w": 3})
    half = scaled(reply, Payload({"old": start}), 0.5)
    assert half.tensors["old"].tolist() == [14.0, 12.0]
    assert half.tensors["new"].tolist() == [2.0, 4.0]
    assert {tensor.dtype for tensor in half.tensors.values()} == {dtype}
    assert half.scalars == {"w": 3}


def test_a_start_serves_replies_of_several_layouts() -> None:
    start = Start(Payload({"a": torch.ones(3), "b": torch.full((2,), 2.0, dtype=torch.bfloat16)}))
    one = Payload({"a": torch.full((3,), 3.0), "b": torch.full((2,), 4.0, dtype=torch.bfloat16), "c": torch.ones(1)})
    other = Payload({"a": torch.full((3,), 3.0)})
    for reply, norm in ((one, math.sqrt(12 + 8 + 1)), (other, math.sqrt(12)), (one, math.sqrt(21))):
        assert start.norm(reply) == pytest.approx(norm)
