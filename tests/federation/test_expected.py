"""What a reply must be: names, dtypes, shapes and scalars, and the longest that it can be."""

import pytest
import torch

from kilofed.errors import PayloadError
from kilofed.federation.expected import Expected, TensorLike
from kilofed.payload import Payload

OUTLINE = Payload({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.int8)}, {"weight": 1, "loss": 0.0})


def test_a_reply_like_the_outline_passes_whatever_its_numbers() -> None:
    like = Expected.like(OUTLINE)
    reply = Payload({"b": torch.ones(4, dtype=torch.int8), "a": torch.full((2, 3), 7.0)}, {"loss": 3, "weight": 2.5})
    like.check(reply)
    assert len(reply.encode()) == like.max_bytes


@pytest.mark.parametrize(("size", "fits"), [(0, False), (1, True), (9, True), (10, False)])
def test_a_dimension_that_varies_has_both_its_ends(size: int, fits: bool) -> None:
    like = Expected({"a": TensorLike(torch.float32, (range(1, 10), 2))})
    reply = Payload({"a": torch.zeros(size, 2)})
    if fits:
        like.check(reply)
        assert len(reply.encode()) <= like.max_bytes
    else:
        with pytest.raises(PayloadError, match=r"it sent a of shape .*; expected \(1 to 9, 2\)"):
            like.check(reply)
    assert like.max_bytes == len(Payload({"a": torch.zeros(9, 2)}).encode())


@pytest.mark.parametrize(
    ("scalars", "words"),
    [
        ({"weight": 1, "loss": "x"}, "loss='x'; expected a number"),
        ({"weight": False, "loss": 0.0}, "weight=False; expected a number"),
        ({"weight": 1}, "'loss' is missing"),
        ({"weight": 1, "loss": 0.0, "clients": 3}, "'clients' is too many"),
    ],
)
def test_scalars_are_held_to_their_names_and_kinds(scalars: dict[str, object], words: str) -> None:
    with pytest.raises(PayloadError, match=words):
        Expected.like(OUTLINE).check(Payload(OUTLINE.tensors, scalars))  # type: ignore[arg-type]


def test_text_and_switches_are_expected_as_such() -> None:
    like = Expected({}, {"word": str, "flag": bool})
    like.check(Payload(scalars={"word": "hm", "flag": True}))
    for scalars, words in (({"word": 1, "flag": True}, "expected text"), ({"word": "", "flag": 1}, "true or false")):
        with pytest.raises(PayloadError, match=words):
            like.check(Payload(scalars=scalars))  # type: ignore[arg-type]


def test_only_what_a_policy_leaves_is_expected() -> None:
    left = Expected.like(OUTLINE).only(Payload({"a": torch.zeros(9)}))
    assert (list(left.tensors), list(left.scalars)) == (["a"], [])
    assert left.max_bytes == len(Payload({"a": torch.zeros(2, 3)}).encode())
