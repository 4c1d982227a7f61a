"""The noise against its definition, against the normal distribution, and streams against each other."""

import hashlib
import math
import time
import tracemalloc
from statistics import NormalDist

import numpy as np
import pytest
import torch
from scipy import stats

from kilofed.privacy.noise import Noise, quantiles

KEY = "0123456789abcdef" * 2
NUM = 200_000
CHUNK = 2**15


def drawn(*parts: int | bytes, num: int = NUM, key: str = KEY, purpose: str = "test") -> np.ndarray:
    values = torch.zeros(num, dtype=torch.float64)
    Noise(key, purpose, *parts).add_into(values, 1.0)
    return values.numpy()


def test_a_number_is_the_normal_quantile_of_64_bits_of_the_hash() -> None:
    secret = bytes.fromhex(KEY) + b"mean\x00" + b"3\x00" + b"1\x00"
    words = hashlib.shake_256(secret + bytes(8)).digest(8 * 10)
    for i, found in enumerate(drawn(3, 1, num=10, purpose="mean")):
        word = int.from_bytes(words[8 * i : 8 * i + 8], "little")
        sign, tail = (-1, word - 2**63) if word >= 2**63 else (1, word)
        assert found == pytest.approx(-sign * NormalDist().inv_cdf((tail + 0.5) / 2**64), rel=1e-12)


def test_the_second_chunk_comes_from_the_next_number_of_the_counter() -> None:
    found = drawn(1, num=CHUNK + 3)
    secret = bytes.fromhex(KEY) + b"test\x001\x00"
    for counter, some in enumerate((found[:CHUNK], found[CHUNK:])):
        words = hashlib.shake_256(secret + counter.to_bytes(8, "big")).digest(8 * some.size)
        assert np.array_equal(some, quantiles(words))


def test_noise_is_normal_in_shape_moments_and_tails() -> None:
    found = drawn(1, 0)
    assert stats.kstest(found, "norm").pvalue > 1e-3
    assert abs(found.mean()) < 4 / math.sqrt(NUM)
    assert found.var() == pytest.approx(1, abs=4 * math.sqrt(2 / NUM))
    assert stats.skew(found) == pytest.approx(0, abs=4 * math.sqrt(6 / NUM))
    assert stats.kurtosis(found) == pytest.approx(0, abs=4 * math.sqrt(24 / NUM))
    for bound in (0.1, 1.0, 2.0, 3.0, 3.8):
        for beyond in (found > bound, found < -bound):
            share = NormalDist().cdf(-bound)
            assert beyond.sum() == pytest.approx(share * NUM, abs=4 * math.sqrt(share * NUM))


def test_no_word_gives_a_number_that_is_not_finite() -> None:
    words = np.array([0, 1, 2**62, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1], dtype="<u8")
    found = quantiles(words.tobytes())
    assert np.isfinite(found).all()
    assert found[0] == -found[4] == pytest.approx(9.155, abs=0.001)
    assert found[3] == found[6] == 0
    assert (found[:3] > 0).all()
    assert found[5] < 0


def test_equal_inputs_give_equal_noise_scaled_as_asked_and_added() -> None:
    values = torch.full((3, 10, 41), 5.0, dtype=torch.float64)
    Noise(KEY, "test", 1).add_into(values, 0.5)
    assert np.array_equal(values.numpy(), 5.0 + 0.5 * drawn(1, num=1230).reshape(3, 10, 41))


def test_streams_that_differ_anywhere_have_nothing_to_do_with_each_other() -> None:
    streams = {
        "one": drawn(1, 0),
        "next exchange": drawn(1, 1),
        "next round": drawn(2, 0),
        "swapped": drawn(0, 1),
        "joined": drawn(10),
        "bytes": drawn(b"\x01", 0),
        "purpose": drawn(1, 0, purpose="rows"),
        "key": drawn(1, 0, key="1" + KEY[1:]),
    }
    names = sorted(streams)
    for i, one in enumerate(names):
        for other in names[:i]:
            for power in (1, 2):
                correlation = np.corrcoef(streams[one] ** power, streams[other] ** power)[0, 1]
                assert abs(correlation) < 5 / math.sqrt(NUM), (one, other)


def test_numbers_of_one_stream_have_nothing_to_do_with_each_other() -> None:
    values = [torch.zeros(CHUNK, dtype=torch.float64) for _ in range(2)]
    noise = Noise(KEY, "test", 1)
    for one in values:
        noise.add_into(one, 1.0)
    first, second = (one.numpy() for one in values)
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / math.sqrt(CHUNK)
    for lag in (1, 2, 3, 17, 1024):
        assert abs(np.corrcoef(first[:-lag], first[lag:])[0, 1]) < 5 / math.sqrt(CHUNK)


def test_no_more_than_a_chunk_is_expanded_at_a_time() -> None:
    values = torch.zeros(2**21, dtype=torch.float64)  # 16 MiB
    Noise(KEY, "test").add_into(values[:10], 1.0)
    tracemalloc.start()
    Noise(KEY, "test").add_into(values, 1.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 2**18 < peak < 2 * 2**20


def test_drawing_takes_less_than_three_times_numpys_normal() -> None:
    values, ratios = torch.zeros(2**21, dtype=torch.float64), []
    for seed in range(3):
        began = time.process_time()
        Noise(KEY, "test", seed).add_into(values, 1.0)
        middle = time.process_time()
        values.numpy()[:] += np.random.default_rng(seed).normal(size=2**21)
        ratios.append((middle - began) / (time.process_time() - middle))
    assert min(ratios) < 3.0
