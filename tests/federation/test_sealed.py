"""What is sealed comes back whole or not at all: every single bit counts."""

import pytest
import torch

from kilofed.errors import PayloadError
from kilofed.federation.sealed import SEAL, seal, unseal
from kilofed.payload import Payload

TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor([3, -1])}
SCALARS = {"round": 2, "run": "ab"}


def test_what_was_sealed_comes_back_with_its_digest() -> None:
    found = unseal(seal(TENSORS, SCALARS))
    assert {name: value for name, value in found.scalars.items() if name != SEAL} == SCALARS
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in TENSORS.items())
    assert seal(found.tensors, SCALARS) == seal(TENSORS, SCALARS)
    assert found.scalars[SEAL] != unseal(seal(TENSORS, {**SCALARS, "round": 3})).scalars[SEAL]


def test_a_flip_of_any_bit_is_seen() -> None:
    whole = seal(TENSORS, SCALARS)
    for place in range(8 * len(whole)):
        spoilt = bytearray(whole)
        spoilt[place // 8] ^= 1 << place % 8
        with pytest.raises(PayloadError):
            unseal(bytes(spoilt))


def test_without_a_digest_it_is_not_believed() -> None:
    with pytest.raises(PayloadError, match="carries no digest"):
        unseal(Payload(TENSORS, SCALARS).encode())
