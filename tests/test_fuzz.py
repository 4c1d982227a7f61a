"""A bounded part of `benchmarks/robustness/fuzz.py`: every decoder names what it refuses and keeps its promises."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kilofed.errors import KilofedError, PayloadError
from kilofed.payload import Payload

FOLDER = Path(__file__).parents[1] / "benchmarks" / "robustness"
NUM_KINDS = 18
INPUTS = 1_500
"""Mutated messages of each kind."""


@pytest.fixture(scope="module")
def fuzz() -> Iterator[ModuleType]:
    """The script, whose folder is on the path as when it is started."""
    sys.path.insert(0, str(FOLDER))
    try:
        import fuzz

        yield fuzz
    finally:
        sys.path.remove(str(FOLDER))
        for name in ("fuzz", "bombs", "messages", "message_damage"):
            sys.modules.pop(name, None)


def test_all_kinds_are_here(fuzz: ModuleType) -> None:
    assert len(fuzz.KINDS) == NUM_KINDS


@pytest.mark.parametrize("number", range(NUM_KINDS))
def test_damaged_messages_are_refused_by_name_or_keep_their_promises(fuzz: ModuleType, number: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fuzz.chunk((number, 0, INPUTS, 20))
    assert found.failures == []
    assert found.unnamed == found.broken == 0
    # Damage that is always refused, or never, would reach no decoder.
    assert INPUTS / 2 < found.refused < INPUTS


@settings(deadline=None, max_examples=40)
@given(number=st.integers(0, NUM_KINDS - 1), seed=st.integers(0, 2**32 - 1), damage=st.integers(0, 2**32 - 1))
def test_honest_messages_of_any_seed_are_read_and_their_damage_is_named(
    fuzz: ModuleType, number: int, seed: int, damage: int
) -> None:
    kind = fuzz.KINDS[number]
    honest = kind.make(np.random.default_rng(seed))
    kind.read(honest.body)
    with suppress(KilofedError):
        kind.read(fuzz.mutated(Random(damage), [honest]))


def test_the_same_seed_makes_the_same_inputs_and_all_are_counted(fuzz: ModuleType) -> None:
    assert sum(inputs for _, _, inputs, _ in fuzz.tasks(100_003, 1)) == 100_003
    bodies = [fuzz.mutated(Random(7), fuzz.corpus(kind, 3)) for kind in fuzz.KINDS for _ in range(3)]
    assert bodies == [fuzz.mutated(Random(7), fuzz.corpus(kind, 3)) for kind in fuzz.KINDS for _ in range(3)]


def test_an_error_without_a_name_and_a_broken_promise_are_found(
    fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Payload, "peek", staticmethod(lambda body: {}))
    found = fuzz.chunk((0, 0, 100, 0))
    assert found.broken
    assert "peek differs from decode" in found.failures[0]
    monkeypatch.setattr(Payload, "decode", staticmethod(lambda body: 1 / 0))
    found = fuzz.chunk((0, 0, 50, 0))
    assert found.unnamed == 50
    assert "ZeroDivisionError" in found.failures[0]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="largest resident memory is read from /proc")
def test_memory_of_a_decoder_is_seen_and_that_of_a_refusal_is_small(fuzz: ModuleType) -> None:
    from bombs import peak

    honest = Payload({"w": torch.ones(1_000_000)}).encode()
    most, refused = peak(Payload.decode, honest, honest)
    assert 3.9e6 < most < 6e6
    assert not refused
    most, refused = peak(Payload.decode, honest, honest[:-1])
    assert most < 1e6
    assert "not a whole kilofed payload" in refused

    def wasteful(body: bytes) -> None:
        kept = torch.ones(5_000_000)
        raise PayloadError(f"{len(body)} bytes and {len(kept)} numbers")

    most, _ = peak(lambda body: wasteful(body) if body is not honest else None, honest, honest[:-1])
    assert most > 19e6
