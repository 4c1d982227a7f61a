import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kilofed.errors import KilofedError, PayloadError
from kilofed.zeroth.codec import (
    DELTA,
    FLOATS,
    HEADERS,
    MAX_LEVEL,
    MAX_VERSION,
    SCALARS,
    STATE,
    State,
    advance,
    decode_scalars,
    encode_scalars,
    encode_state,
    receive,
)

BITS = st.integers(2, 16)
FINITE = st.floats(-1e6, 1e6, allow_subnormal=False)
VECTORS = arrays(np.float64, st.integers(0, 50), elements=FINITE)


@given(values=VECTORS, bits=BITS)
def test_scalars_come_back_within_half_a_step(values, bits):
    decoded = decode_scalars(encode_scalars(values, bits=bits), count=len(values))
    step = np.abs(values).max(initial=0) / ((1 << (bits - 1)) - 1)
    assert np.abs(decoded - values).max(initial=0) <= 0.5001 * step + 1e-38


@given(
    values=arrays(np.float32, st.integers(0, 50), elements=st.floats(width=32, allow_nan=False, allow_infinity=False))
)
def test_32_bits_are_exact(values):
    assert np.array_equal(
        decode_scalars(encode_scalars(values, bits=32), count=len(values)), values.astype(np.float64)
    )


@given(levels=arrays(np.int64, 20, elements=st.integers(-31, 31)), step=st.integers(-20, 20))
def test_without_rounding_error_few_bits_equal_float32(levels, step):
    levels[0] = 31
    values = levels * 2.0**step
    exact = decode_scalars(encode_scalars(values, bits=32), count=20)
    assert np.array_equal(decode_scalars(encode_scalars(values, bits=6), count=20), exact)
    state, message = advance(State.zeros(20), values, bits=6)
    assert np.array_equal(state.values, exact)
    assert _same(receive(State.zeros(20), message, count=20), state)


@settings(deadline=None)
@given(
    rounds=st.lists(arrays(np.float64, 8, elements=FINITE), min_size=1, max_size=8),
    bits=BITS,
    join=st.integers(0, 7),
)
def test_deltas_telescope_to_the_full_state(rounds, bits, join):
    server = client = late = State.zeros(8)
    exact = np.zeros(8)
    for i, movement in enumerate(rounds):
        exact = exact + movement
        server, message = advance(server, exact, bits=bits)
        client = receive(client, message, count=8)
        if i == join:
            late = receive(None, encode_state(server), count=8)
        elif i > join:
            late = receive(late, message, count=8)
        assert _same(client, server)
        # What is rounded away stays below half a step; it does not add up over rounds.
        assert np.abs(server.values - exact).max() <= 2.0 ** (server.exponent - 1)
    if join < len(rounds):
        assert _same(late, server)
    assert _same(receive(None, encode_state(server), count=8), server)


def _same(first, second):
    return (
        np.array_equal(first.levels, second.levels)
        and (first.exponent, first.version) == (second.exponent, second.version)
        and np.array_equal(first.values, second.values)
    )


@given(scale=st.floats(1e-20, 1e20))
def test_a_first_delta_spends_its_bits(scale):
    exact = scale * np.random.default_rng(0).normal(size=100)
    state, _ = advance(State.zeros(100), exact, bits=8)
    assert 62 <= np.abs(state.levels).max() <= 127


def test_the_grid_follows_the_movement_both_ways():
    rng, exact, state = np.random.default_rng(0), np.zeros(500), State.zeros(500)
    for scale in (1e-3, 1e3, 1e-9, 0.0, 1.0):
        before = np.abs(state.values - exact).max()
        exact = exact + rng.normal(size=500) * scale
        moved, message = advance(state, exact, bits=6)
        assert _same(receive(state, message, count=500), moved)
        assert np.abs(moved.values - exact).max() <= (before + 5 * scale) / 31
        assert len(message) < 500
        state = moved


def test_a_delta_without_change_takes_few_bytes():
    state, _ = advance(State.zeros(4096), np.arange(4096.0) % 32)
    moved, message = advance(state, np.arange(4096.0) % 32)
    assert np.array_equal(moved.levels, state.levels)
    assert len(message) < 40


@pytest.mark.parametrize(("num_seeds", "limit"), [(4096, 2000), (1024, 1000)])
def test_a_round_costs_less_than_promised(num_seeds, limit):
    rng, exact, state = np.random.default_rng(0), np.zeros(num_seeds), State.zeros(num_seeds)
    for _ in range(10):
        gradients = rng.standard_t(5, size=(10, 200))
        up = [encode_scalars(row) for row in gradients]
        for message in up:
            np.add.at(exact, rng.integers(num_seeds, size=200), decode_scalars(message, count=200) / 10)
        state, down = advance(state, exact)
        assert max(map(len, up)) + len(down) < limit


def test_pinned_messages_are_read():
    """A run's log is read by later versions."""
    values = [0.0, 1.0, -31.0, 4.0]
    for name in ("scalars", "floats"):
        assert decode_scalars(bytes.fromhex(PINNED[name]), count=4).tolist() == values
    delta = receive(State.zeros(4), bytes.fromhex(PINNED["delta"]), count=4)
    assert delta.values.tolist() == values
    assert _same(receive(None, bytes.fromhex(PINNED["state"]), count=4), delta)
    long = decode_scalars(bytes.fromhex(PINNED["long"]), count=100)
    assert np.abs(long - (np.arange(-50, 50) % 7 - 3)).max() < 0.05


PINNED = {
    "scalars": "010400000000803f1000023d08927889ab",
    "floats": "02040000000000000000803f0000f8c1000080402565155b",
    "delta": "030400000000000000001000023d08e56555d8",
    "state": "040400000100000000001000023d083fb5da82",
    "long": "016400008c31c63d1100007d0000403e3d291300142a3e0100a9a9700142278cdd",
}


@given(data=st.binary(max_size=64))
def test_random_bytes_are_refused(data):
    for read in (lambda d: decode_scalars(d, count=4), lambda d: receive(State.zeros(4), d, count=4)):
        with pytest.raises(PayloadError):
            read(data)


@given(where=st.integers(0, 10_000), flip=st.integers(1, 255))
def test_a_damaged_byte_is_detected(where, flip):
    message = bytearray(encode_scalars(np.arange(100.0)))
    message[where % len(message)] ^= flip
    with pytest.raises(PayloadError, match="is damaged"):
        decode_scalars(bytes(message), count=100)


def whole(kind, count, header, body):
    """A message with a checksum that fits, whatever is inside."""
    message = struct.pack("<BI", kind, count)[:4] + header + body
    return message + struct.pack("<I", zlib.crc32(message))


def integers(values, width, frame=None):
    """A block of integers of `width` bytes, not compressed unless there is a frame."""
    zigzag = np.array([2 * v if v >= 0 else -2 * v - 1 for v in values], dtype="<u8")
    planes = zigzag.view(np.uint8).reshape(-1, 8)[:, :width].T.tobytes()
    return bytes([width << 4]) + planes if frame is None else bytes([width << 4 | 1]) + frame(planes)


@settings(deadline=None)
@given(body=st.binary(max_size=40), kind=st.integers(0, 5), count=st.integers(0, 12), seed=st.integers(0, 2**32 - 1))
def test_whole_messages_with_nonsense_inside_are_refused_or_in_range(body, kind, count, seed):
    held = State(np.random.default_rng(seed).integers(-MAX_LEVEL, MAX_LEVEL, count, endpoint=True), seed % 221 - 120)
    try:
        values = decode_scalars(whole(kind, count, b"", body), count=count)
    except PayloadError:
        pass
    else:
        assert values.shape == (count,)
        assert np.isfinite(values).all()
    for state in (None, held):
        try:
            found = receive(state, whole(kind, count, b"", body), count=count)
        except PayloadError:
            continue
        assert found.levels.shape == (count,)
        assert np.isfinite(found.values).all()
        assert _same(receive(None, encode_state(found), count=count), found)


@pytest.mark.parametrize("bits", [6, 32])
def test_another_count_than_expected_is_refused(bits):
    for count in (0, 9, 11, 2**24 - 1):
        with pytest.raises(PayloadError, match=f"a message of 10 numbers; expected {count}"):
            decode_scalars(encode_scalars(np.ones(10), bits=bits), count=count)
        for message in (encode_state(State.zeros(10)), advance(State.zeros(10), np.ones(10))[1]):
            with pytest.raises(PayloadError, match=f"a message of 10 numbers; expected {count}"):
                receive(State.zeros(10), message, count=count)


def compress(planes, **options):
    chosen = zstandard.ZstdCompressionParameters.from_level(
        3, **{"format": zstandard.FORMAT_ZSTD1_MAGICLESS, "write_content_size": False, **options}
    )
    return zstandard.ZstdCompressor(compression_params=chosen).compress(planes)


STEP = struct.pack("<f", 1.0)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (lambda planes: compress(bytes(100_000_000), write_content_size=True), "is not as kilofed writes it"),
        (lambda planes: compress(planes, write_content_size=True), "is not as kilofed writes it"),
        (lambda planes: compress(planes, write_checksum=True), "is not as kilofed writes it"),
        (lambda planes: compress(planes, format=zstandard.FORMAT_ZSTD1), "is not as kilofed writes it"),
        (lambda planes: compress(bytes(100_000_000)), "cannot be decompressed"),
        (lambda planes: compress(planes + bytes(1)), "cannot be decompressed"),
        (lambda planes: compress(planes[:-1]), "4000 integers of 1 bytes expected, the message has 3999"),
        (lambda planes: compress(planes) + b"\0", "cannot be decompressed"),
        (lambda planes: compress(planes)[:-1], "cannot be decompressed"),
        # The second byte of a frame tells its window: 2**27 bytes.
        (lambda planes: compress(planes)[:1] + b"\x88" + compress(planes)[2:], "too much memory"),
        (lambda planes: compress(np.random.default_rng(0).bytes(5000)), "is not as kilofed writes it"),
        (lambda planes: b"", "is not as kilofed writes it"),
    ],
    ids=[
        "declares a size of 100 MB", "declares its size", "has a checksum", "has a magic number", "100 MB", "one too many",
        "one too few", "trailing byte", "cut", "window of 128 MB", "longer than plain", "empty",
    ],
)  # fmt: skip
def test_a_frame_that_kilofed_does_not_write_is_refused_and_takes_no_memory(frame, message):
    values = np.arange(4000) % 5
    good = whole(SCALARS, 4000, STEP, integers(values, 1, compress))
    assert decode_scalars(good, count=4000).tolist() == values.tolist()
    bad = whole(SCALARS, 4000, STEP, integers(values, 1, frame))
    honest = peak(lambda: decode_scalars(good, count=4000))
    assert peak(lambda: refused(bad, 4000, message)) <= 2 * honest


def refused(data, count, message):
    with pytest.raises(PayloadError, match=message):
        decode_scalars(data, count=count)


def peak(action):
    """Bytes that Python and numpy hold at most while `action` runs."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_few_bytes_that_stand_for_millions_of_integers_cost_nothing():
    bomb = whole(SCALARS, 2**24 - 1, STEP, integers(np.zeros(0), 1, lambda _: compress(bytes(2**24 - 1))))
    assert len(bomb) < 4000
    honest = encode_scalars(np.random.default_rng(0).normal(size=200))
    most = peak(lambda: decode_scalars(honest, count=200))
    assert peak(lambda: refused(bomb, 200, "a message of 16777215 numbers; expected 200")) <= 2 * most


@pytest.mark.parametrize(
    ("kind", "header", "body", "message"),
    [
        (SCALARS, STEP, integers([1, 2, 3], 2), "2 bytes per integer in the message; fewer are enough"),
        (SCALARS, STEP, integers([1, 2, 300], 3), "integers of width 3 in coding 0; expected 1 to 2"),
        (SCALARS, STEP, integers([1, 2, -(2**15)], 2), "an integer of 32768"),
        (SCALARS, STEP, b"\x12\0\0\0", "integers of width 1 in coding 2"),
        (SCALARS, STEP, b"\x00", "integers of width 0"),
        (SCALARS, STEP, b"", "integers of width 0"),
        (SCALARS, STEP, integers([1, 2, 3], 1) + b"\0", "the message has 4 bytes"),
        (SCALARS, struct.pack("<f", np.nan), integers([0, 0, 0], 1), "the step of the grid is nan"),
        (SCALARS, struct.pack("<f", np.inf), integers([0, 1, 0], 1), "the step of the grid is inf"),
        (SCALARS, struct.pack("<f", -1), integers([0, 1, 0], 1), r"the step of the grid is -1\.0"),
        (SCALARS, struct.pack("<f", -0.0), integers([0, 0, 0], 1), r"the step of the grid is -0\.0"),
        (SCALARS, struct.pack("<f", 0), integers([0, 1, 0], 1), r"an integer of 1 at a step of 0\.0"),
        (FLOATS, b"", struct.pack("<4f", 1, 2, 3, 4), "3 float32 numbers take 12 bytes; the message has 16"),
        (FLOATS, b"", struct.pack("<3f", 1, np.inf, 3), "a number that is not finite"),
    ],
)
def test_scalars_that_encode_does_not_write_are_refused(kind, header, body, message):
    with pytest.raises(PayloadError, match=message):
        decode_scalars(whole(kind, 3, header, body), count=3)


def test_the_widest_scalars_are_read():
    found = decode_scalars(whole(SCALARS, 3, STEP, integers([32767, -32767, 0], 2)), count=3)
    assert found.tolist() == [32767, -32767, 0]


def state_of(levels, exponent=0, version=1, kind=STATE, width=4):
    return whole(kind, len(levels), struct.pack(HEADERS[kind], version, exponent), integers(levels, width))


@pytest.mark.parametrize("sign", [1, -1])
def test_levels_beyond_24_bits_are_refused_at_both_ends(sign):
    largest = np.array([0, sign * MAX_LEVEL])
    assert MAX_LEVEL == 2**24 - 1
    assert receive(None, encode_state(State(largest, 3, 1)), count=2).values.tolist() == [0, sign * MAX_LEVEL * 8]
    for beyond in (2**24, 2**25 + 1):
        with pytest.raises(KilofedError, match=f"integers up to {beyond}"):
            State(np.array([0, sign * beyond]))
        with pytest.raises(PayloadError, match=f"out of the range of a state: a state of integers up to {beyond}"):
            receive(None, state_of([0, sign * beyond]), count=2)
    step = state_of([0, sign], version=1, kind=DELTA, width=1)
    with pytest.raises(PayloadError, match=f"integers up to {2**24}"):
        receive(State(largest, version=1), step, count=2)
    back = receive(State(largest, version=1), state_of([0, -sign], kind=DELTA, width=1), count=2)
    assert back.levels.tolist() == [0, sign * (MAX_LEVEL - 1)]


@pytest.mark.parametrize("kind", [STATE, DELTA])
def test_exponents_have_bounds(kind):
    for exponent in (-120, 100):
        found = receive(State.zeros(1), state_of([1], exponent, 0, kind, 1), count=1)
        assert found.values.tolist() == [2.0**exponent]
    for exponent in (-121, 101, -(2**15), 2**15 - 1):
        with pytest.raises(PayloadError, match=f"exponent {exponent} "):
            receive(State.zeros(1), state_of([1], exponent, 0, kind, 1), count=1)
        with pytest.raises(KilofedError, match=f"exponent {exponent} "):
            State(np.ones(1, dtype=np.int64), exponent)


def test_the_last_version_takes_no_delta():
    last = receive(None, state_of([1], version=MAX_VERSION, width=1), count=1)
    with pytest.raises(PayloadError, match=f"version {MAX_VERSION + 1}; expected"):
        receive(last, state_of([1], version=MAX_VERSION, kind=DELTA, width=1), count=1)


def test_a_coarser_grid_rounds_to_the_nearest_and_ties_up():
    held = State(np.array([1, 3, -1, -3, 2, 5, -4, 7]))
    nothing = [0] * 8
    for exponent, expected in (
        (1, [1, 2, 0, -1, 1, 3, -2, 4]),
        (2, [0, 1, 0, -1, 1, 1, -1, 2]),
        (3, [0, 0, 0, 0, 0, 1, 0, 1]),
        (100, nothing),
        (-2, [4, 12, -4, -12, 8, 20, -16, 28]),
    ):
        found = receive(held, state_of(nothing, exponent, 0, DELTA, 1), count=8)
        assert found.levels.tolist() == expected


def test_deltas_to_clients_out_of_sync_are_refused():
    state, message = advance(State.zeros(3), [1.0, 2.0, 3.0])
    for held, words in (
        (None, "holds nothing"),
        (state, "holds version 1 of 3"),
        (State.zeros(4), "holds version 0 of 4"),
    ):
        with pytest.raises(PayloadError, match=f"a delta from version 0 of 3 numbers, but this client {words}"):
            receive(held, message, count=3)


def test_kinds_are_not_confused():
    with pytest.raises(PayloadError, match="a message of kind 1"):
        receive(None, encode_scalars([1.0]), count=1)
    with pytest.raises(PayloadError, match="a message of kind 4"):
        decode_scalars(encode_state(State.zeros(1)), count=1)


@pytest.mark.parametrize("bits", [1, 17, 0, 64])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(KilofedError, match=f"bits is {bits}; expected 2 to 16"):
        encode_scalars([1.0], bits=bits)


def test_bad_vectors_are_refused():
    with pytest.raises(KilofedError, match="number 1 is not finite"):
        encode_scalars([1.0, np.nan])
    with pytest.raises(KilofedError, match="expected a vector"):
        encode_scalars([[1.0]])
    with pytest.raises(KilofedError, match="too large for float32"):
        encode_scalars([1e300], bits=32)
    with pytest.raises(KilofedError, match="too large for float32"):
        encode_scalars([1e300])
    with pytest.raises(KilofedError, match="the state has 2 numbers"):
        advance(State.zeros(2), [1.0])
    with pytest.raises(KilofedError, match=r"below 2\*\*120"):
        advance(State.zeros(1), [1e40])
