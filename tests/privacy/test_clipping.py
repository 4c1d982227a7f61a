"""The clip holds for what is stored, in every dtype, and both ends measure the same."""

import math

import pytest
import torch

from kilofed.errors import PrivacyError
from kilofed.payload import Payload
from kilofed.privacy.clipping import clipped, norm, scaled, update_of

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def drawn(seed: int, size: float, dtype: torch.dtype, prefix: str = "") -> Payload:
    stream = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 10, 41), "b": (7,), "c": ()}
    return Payload({prefix + n: (size * torch.randn(s, generator=stream)).to(dtype) for n, s in shapes.items()})


def moved(start: Payload, seed: int, size: float) -> Payload:
    """`start` with something added, rounded to its dtype."""
    step = drawn(seed, size, torch.float64).tensors
    return Payload({n: (t.double() + step[n]).to(t.dtype) for n, t in start.tensors.items()})


def plain_norm(reply: Payload, ask: Payload) -> float:
    squares = 0.0
    for name, tensor in reply.tensors.items():
        start = ask.tensors.get(name, torch.zeros_like(tensor))
        squares += sum((x - y) ** 2 for x, y in zip(tensor.flatten().tolist(), start.flatten().tolist(), strict=True))
    return math.sqrt(squares)


def test_a_norm_is_that_of_three_four_twelve() -> None:
    reply = Payload({"a": torch.tensor([4.0, 5.0]), "delta.b": torch.tensor([[12.0]])})
    assert norm(reply, Payload({"a": torch.tensor([1.0, 1.0]), "unused": torch.ones(3)})) == 13.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_is_that_of_the_stored_numbers_over_all_tensors(dtype: torch.dtype) -> None:
    start = drawn(1, 3.0, dtype)
    reply = moved(start, 2, 0.5)
    assert norm(reply, start) == pytest.approx(plain_norm(reply, start), rel=1e-13)
    assert norm(reply, Payload()) == pytest.approx(plain_norm(reply, Payload()), rel=1e-13)


def test_a_norm_over_several_chunks_is_the_same_bits_with_any_number_of_threads() -> None:
    reply = Payload({"a": torch.randn(2**20 + 2**19 + 41, generator=torch.Generator().manual_seed(3))})
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = norm(reply, Payload())
        torch.set_num_threads(2)
        assert norm(reply, Payload()) == one
    finally:
        torch.set_num_threads(before)
    assert one == pytest.approx(float(reply.tensors["a"].double().norm()), rel=1e-12)


@pytest.mark.parametrize(("bad", "found"), [(math.nan, math.nan), (math.inf, math.inf), (-math.inf, math.inf)])
def test_a_number_that_is_not_finite_gives_a_norm_that_is_not(bad: float, found: float) -> None:
    size = norm(Payload({"a": torch.ones(100), "b": torch.tensor([1.0, bad])}), Payload())
    assert size == found or (math.isnan(size) and math.isnan(found))


@pytest.mark.parametrize("numbers", [[1e200, 1e200], [1.3e154] * 2])
def test_a_sum_of_squares_above_float64_is_infinite_not_a_crash(numbers: list[float]) -> None:
    assert norm(Payload({"a": torch.tensor(numbers, dtype=torch.float64)}), Payload()) == math.inf


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clip", [1e-6, 0.01, 0.3, 1.0, 5.0])
@pytest.mark.parametrize("size", [0.001, 1.0, 100.0])
def test_new_values_leave_within_the_clip_in_their_own_dtype(dtype: torch.dtype, clip: float, size: float) -> None:
    start = drawn(1, size, dtype)
    reply = moved(start, 2, 10 * clip)
    found = clipped(reply, start, clip)
    assert norm(found, start) <= clip
    assert {n: t.dtype for n, t in found.tensors.items()} == {n: t.dtype for n, t in reply.tensors.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clip", [1e-6, 0.01, 0.3, 1.0, 5.0])
def test_differences_leave_within_the_clip_and_near_it(dtype: torch.dtype, clip: float) -> None:
    reply = drawn(2, 10 * clip, dtype, "delta.")
    found = clipped(reply, Payload(), clip)
    assert norm(found, Payload()) <= clip
    if clip > 1e-6 or dtype != torch.float16:  # Below that float16 has steps of 6e-8 for numbers of 1e-8.
        assert norm(found, Payload()) >= 0.98 * clip


def test_coarse_numbers_that_rounding_pushes_far_over_the_clip_are_pulled_back() -> None:
    # Steps of 0.5 around 1000: plain scaling rounds 0.26 up to 0.5 and leaves with 1.9 times the clip.
    start = Payload({"a": torch.full((400,), 1000.0, dtype=torch.float16)})
    reply = Payload({"a": torch.full((400,), 1002.0, dtype=torch.float16)})
    clip = 0.26 * 20
    plain = scaled(reply, start, clip / norm(reply, start))
    assert norm(plain, start) == pytest.approx(1.92 * clip, rel=0.01)
    assert norm(clipped(reply, start, clip), start) <= clip


def test_the_search_keeps_what_coarse_numbers_can_hold() -> None:
    start = Payload({"a": torch.full((400,), 1000.0, dtype=torch.float16)})
    reply = Payload({"a": 1000.0 + 0.5 * torch.arange(400).to(torch.float16)})
    found = clipped(reply, start, 20.0)
    assert 0.95 * 20.0 <= norm(found, start) <= 20.0


def test_shrinking_in_one_step_that_loses_too_much_is_followed_by_a_search() -> None:
    # Scaled plainly, updates lie between 0 and 0.4 on steps of 0.5: 37 of 100 round up, and the norm is 1.3 clips. Scaled
    # by as much less, 17 of 100 round up, and the norm is 0.89 clips.
    start = Payload({"a": torch.full((400,), 1000.0, dtype=torch.float16)})
    reply = Payload({"a": 1000.0 + 0.5 * torch.arange(400).to(torch.float16)})
    clip = 0.002 * norm(reply, start)
    assert norm(scaled(reply, start, 0.002), start) > 1.3 * clip
    assert norm(scaled(reply, start, 0.0015), start) < 0.9 * clip
    found = clipped(reply, start, clip)
    assert 0.98 * clip <= norm(found, start) <= clip
    assert (found.tensors["a"] >= 1000).all()


@pytest.mark.parametrize("scale", [0.00151, 0.0016, 0.0017, 0.0018, 0.0019, 0.0021, 0.0022, 0.0023])
def test_a_search_comes_near_the_clip_from_wherever_it_begins(scale: float) -> None:
    start = Payload({"a": torch.full((400,), 1000.0, dtype=torch.float16)})
    reply = Payload({"a": 1000.0 - 0.5 * torch.arange(400).to(torch.float16)})
    clip = scale * norm(reply, start)
    found = clipped(reply, start, clip)
    assert 0.98 * clip <= norm(found, start) <= clip
    assert (found.tensors["a"] <= 1000).all()


def test_float32_that_was_right_by_plain_scaling_keeps_those_bits() -> None:
    start = drawn(1, 1.0, torch.float32)
    right = 0
    for seed in range(20):
        reply = moved(start, seed, 0.1)
        plain = scaled(reply, start, 1.0 / norm(reply, start))
        found = clipped(reply, start, 1.0)
        assert norm(found, start) == pytest.approx(1.0, rel=1e-6)
        if norm(plain, start) <= 1.0:
            right += 1
            assert all(torch.equal(found.tensors[n], plain.tensors[n]) for n in plain.tensors)
    assert right > 3


def test_a_clipped_update_is_not_clipped_again() -> None:
    for dtype in DTYPES:
        start = drawn(1, 1.0, dtype)
        once = clipped(moved(start, 2, 1.0), start, 0.5)
        body = Payload.decode(once.encode())
        assert clipped(body, Payload.decode(start.encode()), 0.5) is body


def test_an_update_of_exactly_the_clip_is_the_very_object() -> None:
    reply = Payload({"a": torch.tensor([3.0, 4.0])}, {"weight": 3.0})
    assert clipped(reply, Payload(), 5.0) is reply
    assert clipped(reply, Payload(), 4.999) is not reply


def test_an_ask_that_the_replys_dtype_cannot_hold_is_refused() -> None:
    start = Payload({"a": torch.full((100,), 1000.1)})
    reply = Payload({"a": torch.full((100,), 1005.0, dtype=torch.float16)})
    with pytest.raises(PrivacyError, match=r"numbers of the ask do not fit torch\.float16"):
        clipped(reply, start, 0.5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_cannot_be_clipped_but_can_leave_as_no_update(bad: float) -> None:
    ask = Payload({"a": torch.ones(3)})
    reply = Payload({"a": torch.tensor([1.0, bad, 2.0]), "b": torch.full((2,), bad)})
    with pytest.raises(PrivacyError, match="expected a finite one"):
        clipped(reply, ask, 1.0)
    left = scaled(reply, ask, 0.0)
    assert torch.equal(left.tensors["a"], torch.ones(3))
    assert torch.equal(left.tensors["b"], torch.zeros(2))


def test_tensors_without_an_update_are_refused_by_name() -> None:
    with pytest.raises(PrivacyError, match=r"'a' is torch\.int64"):
        norm(Payload({"a": torch.ones(2, dtype=torch.int64)}), Payload())
    with pytest.raises(PrivacyError, match=r"'a' has shape \(2,\), the ask's has \(3, 1\)"):
        update_of("a", torch.ones(2), Payload({"a": torch.ones(3, 1)}))
