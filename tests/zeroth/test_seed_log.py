"""Formats of a seed-pool run round-trip and refuse what is damaged; sampling probabilities follow the paper's formula."""

import struct

import numpy as np
import pytest
import torch

from kilofed.errors import KilofedError, PayloadError
from kilofed.zeroth import codec, seed_log
from kilofed.zeroth.seed_log import Report, Request


@pytest.mark.parametrize(
    "request_",
    [
        Request(0),
        Request(3, b"8 bytes.", ((2, b"delta"), (3, b"")), b"levels"),
        Request(65535, updates=((0, bytes(1000)),)),
        Request(300, updates=tuple((number, b"x") for number in range(255))),
    ],
    ids=["plain", "updates and levels", "long", "many updates"],
)
def test_a_request_round_trips(request_: Request) -> None:
    assert Request.unpack(request_.pack(), pool=request_.pool) == request_


@pytest.mark.parametrize("length", [0, 5, 10, 12, 16, 17, 21])
def test_a_truncated_request_is_refused(length: int) -> None:
    packed = Request(1, updates=((1, b"delta"),)).pack()
    with pytest.raises(PayloadError, match=f"the request of {length} bytes is truncated"):
        Request.unpack(packed[:length], pool=1)


def test_a_request_that_is_not_bytes_is_refused() -> None:
    with pytest.raises(PayloadError, match=r"torch\.float32 of shape \(20,\) where bytes were expected"):
        Request.unpack(torch.zeros(20), pool=0)
    with pytest.raises(PayloadError, match=r"torch\.uint8 of shape \(1, 11\) where bytes were expected"):
        Request.unpack(Request(0).pack()[None], pool=0)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(65535), "a request for pool 65535 with 0 updates; expected pool 1 and at most 2"),
        (Request(0), "a request for pool 0 with 0 updates; expected pool 1"),
        (
            Request(1, updates=((0, b""), (1, b""), (2, b""))),
            "for pool 1 with 3 updates; expected pool 1 and at most 2",
        ),
        (Request(1, updates=((2, b""),)), "an update of pool 2 in the request; expected pools up to 1 in order"),
        (Request(1, updates=((1, b""), (0, b""))), "an update of pool 0 in the request"),
        (Request(1, updates=((1, b""), (1, b""))), "an update of pool 1 in the request"),
    ],
)
def test_requests_of_another_round_or_out_of_order_are_refused(request_: Request, message: str) -> None:
    with pytest.raises(PayloadError, match=message):
        Request.unpack(request_.pack(), pool=1)


def test_more_updates_than_a_request_holds_are_not_sent() -> None:
    with pytest.raises(KilofedError, match=r"needs 256 pools; a request holds at most 255"):
        Request(255, updates=tuple((number, b"") for number in range(256))).pack()


def test_a_report_round_trips_and_sums_by_seed() -> None:
    report = Report(12, 1.5, (1, 3), np.array([1.0, 0.0, -2.0, 0.0]))
    back = Report.unpack(report.pack(32), num_steps=4, max_gradient=10)
    assert (back.weight, back.loss, back.skipped) == (12, 1.5, (1, 3))
    assert np.array_equal(back.gradients, report.gradients)
    sums = back.sums(np.array([5, 6, 5, 7]), 64)
    assert sums[0, 5] == -1
    assert sums[1, 5] == 3
    assert sums[2].tolist()[5:8] == [2, 0, 0]


def test_magnitudes_are_clipped_in_the_sums_and_gradients_are_not() -> None:
    sums = Report(1, 0.0, (), np.array([-5000.0])).sums(np.array([3]), 64)
    assert sums[:, 3].tolist() == [-5000.0, seed_log.MAX_AMPLITUDE, 1.0]


@pytest.mark.parametrize(
    ("report", "message"),
    [
        (Report(9, 1.0, (), np.full(3, 1e5)), "a gradient of magnitude 100000 in the report; expected at most 10000"),
        (Report(9, 1.0, (), np.ones(4)), "a message of 4 numbers; expected 3"),
        (
            Report(9, 1.0, (3,), np.ones(3)),
            "skipped steps out of order or out of range; expected ascending ones below 3",
        ),
        (Report(9, 1.0, (1, 1), np.zeros(3)), "skipped steps out of order or out of range"),
        (Report(9, 1.0, (2, 1), np.zeros(3)), "skipped steps out of order or out of range"),
        (Report(9, 1.0, (0, 1, 2, 2), np.zeros(3)), "4 skipped steps in the report; expected at most 3"),
        (Report(9, 1.0, (1,), np.ones(3)), "a gradient of a skipped step in the report; expected 0"),
        (Report(9, float("inf"), (), np.ones(3)), "weight 9 and loss inf in the report"),
        (Report(0, 1.0, (), np.ones(3)), "weight 0 and loss 1.0 in the report"),
        (Report(9, float("nan"), (), np.ones(3)), "weight 9 and loss nan in the report"),
    ],
)
def test_reports_out_of_range_are_refused(report: Report, message: str) -> None:
    with pytest.raises(PayloadError, match=message):
        Report.unpack(report.pack(32), num_steps=3, max_gradient=1e4)


@pytest.mark.parametrize("bits", [6, 32])
def test_a_report_that_is_cut_or_goes_on_is_refused(bits: int) -> None:
    body = Report(9, 1.0, (1,), np.array([1.0, 0.0, 3.0])).pack(bits)
    Report.unpack(body, num_steps=3, max_gradient=9)
    for wrong in (*(body[:length] for length in range(len(body))), body + b"\0"):
        with pytest.raises(PayloadError, match=r"is truncated|is damaged"):
            Report.unpack(wrong, num_steps=3, max_gradient=9)


@pytest.mark.parametrize(
    "report",
    [Report(2**32, 1.0, (), np.ones(1)), Report(1, 1e39, (), np.ones(1)), Report(1, 1.0, (2**16,), np.ones(1))],
)
def test_a_report_that_cannot_be_sent_is_not(report: Report) -> None:
    with pytest.raises(KilofedError, match="cannot be sent"):
        report.pack(32)


def test_reports_of_a_round_are_one_record() -> None:
    replies = {7: b"a", 2: b"", 40: bytes(range(200))}
    record = seed_log.pack_reports(replies)
    assert seed_log.unpack_reports(record) == replies
    assert list(seed_log.unpack_reports(record)) == [2, 7, 40]
    assert seed_log.unpack_reports(seed_log.pack_reports({})) == {}
    for length in (4, 12, len(record) - 1):
        with pytest.raises(PayloadError, match=f"the record of a round of {length} bytes is truncated"):
            seed_log.unpack_reports(record[:length])
    for clients in ((7, 7), (7, 2)):
        wrong = b"".join(struct.pack("<II", client, 0) for client in clients)
        with pytest.raises(PayloadError, match=f"client {clients[1]} after client 7 in the record of a round"):
            seed_log.unpack_reports(seed_log.to_tensor(wrong))


def test_equal_amplitudes_are_uniform_and_unequal_follow_the_papers_formula() -> None:
    equal = seed_log.normalized_amplitudes(np.full(64, 3.0), np.ones(64), "pro")
    assert np.allclose(seed_log.probabilities(equal), 1 / 64)
    totals, counts = np.array([6.0, 2.0, 0.0, 4.0]), np.array([2.0, 1.0, 0.0, 3.0])
    a = totals / (counts + 1)  # The history of a seed begins with a zero.
    n = (a - a.min()) / (a.max() + 1e-10 - a.min())
    expected = np.exp(n) / np.exp(n).sum()
    found = seed_log.probabilities(seed_log.normalized_amplitudes(totals, counts, "pro"))
    assert np.allclose(found, expected, atol=1e-12)
    unbiased = seed_log.normalized_amplitudes(totals, counts, "pro-unbiased")  # Means 3, 2, 4/3; 2 where unknown.
    assert np.allclose(unbiased, [1, 0.4, 0.4, 0], atol=1e-9)
    assert np.array_equal(seed_log.normalized_amplitudes(np.zeros(4), np.zeros(4), "pro-unbiased"), np.zeros(4))


def test_probabilities_arrive_within_a_thirtieth_of_a_nat() -> None:
    amplitudes = np.random.default_rng(0).random(256)
    amplitudes[:2] = 0, 1
    weights = seed_log.sampling_weights(seed_log.encode_levels(amplitudes), num_seeds=256)
    assert weights is not None
    off = np.log(weights / weights.sum()) - np.log(seed_log.probabilities(amplitudes))
    assert np.abs(off - off.mean()).max() < 1 / 30 + 2e-3
    assert seed_log.sampling_weights(b"", num_seeds=256) is None


def test_levels_out_of_range_are_refused() -> None:
    with pytest.raises(PayloadError, match="expected 0 to 15"):
        seed_log.sampling_weights(seed_log.encode_levels(np.array([0.0, 1.2])), num_seeds=2)
    with pytest.raises(PayloadError, match=r"levels from -1 to 15; expected 0 to 15"):
        seed_log.sampling_weights(codec.encode_scalars([-1.0, 15.0], bits=5), num_seeds=2)
    with pytest.raises(PayloadError, match=r"levels from 0 to 1e\+30; expected 0 to 15"):
        seed_log.sampling_weights(codec.encode_scalars([0.0, 1e30], bits=32), num_seeds=2)
    with pytest.raises(PayloadError, match="a message of 64 numbers; expected 4096"):
        seed_log.sampling_weights(seed_log.encode_levels(np.ones(64)), num_seeds=4096)


@pytest.mark.parametrize("num_steps", [1, 3, 200])
def test_no_report_is_longer_than_one_in_float32_whose_steps_were_all_skipped(num_steps: int) -> None:
    longest = Report(41, 0.5, tuple(range(num_steps)), np.zeros(num_steps)).pack(32)
    assert len(longest) == Report.max_bytes(num_steps)


def test_sums_that_noise_made_negative_count_as_none_and_no_amplitude_is_above_1() -> None:
    counts, amplitudes = np.array([-0.5, 1.0, 3.0]), np.array([2.0, 1.0, -9.0])
    found = seed_log.normalized_amplitudes(amplitudes, counts, "pro")
    assert np.array_equal(found, seed_log.normalized_amplitudes(amplitudes.clip(0), counts.clip(0), "pro"))
    assert 0 <= found.min() < 0.999 < found.max() <= 1
