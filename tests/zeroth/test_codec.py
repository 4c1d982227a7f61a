import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kilofed.errors import KilofedError, PayloadError
from kilofed.zeroth.codec import State, advance, decode_scalars, encode_scalars, encode_state, receive

BITS = st.integers(2, 16)
FINITE = st.floats(-1e6, 1e6, allow_subnormal=False)
VECTORS = arrays(np.float64, st.integers(0, 50), elements=FINITE)


@given(values=VECTORS, bits=BITS)
def test_scalars_come_back_within_half_a_step(values, bits):
    decoded = decode_scalars(encode_scalars(values, bits=bits))
    step = np.abs(values).max(initial=0) / ((1 << (bits - 1)) - 1)
    assert np.abs(decoded - values).max(initial=0) <= 0.5001 * step + 1e-38


@given(
    values=arrays(np.float32, st.integers(0, 50), elements=st.floats(width=32, allow_nan=False, allow_infinity=False))
)
def test_32_bits_are_exact(values):
    assert np.array_equal(decode_scalars(encode_scalars(values, bits=32)), values.astype(np.float64))


@given(levels=arrays(np.int64, 20, elements=st.integers(-31, 31)), step=st.integers(-20, 20))
def test_without_rounding_error_few_bits_equal_float32(levels, step):
    levels[0] = 31
    values = levels * 2.0**step
    exact = decode_scalars(encode_scalars(values, bits=32))
    assert np.array_equal(decode_scalars(encode_scalars(values, bits=6)), exact)
    state, message = advance(State.zeros(20), values, bits=6)
    assert np.array_equal(state.values, exact)
    assert _same(receive(State.zeros(20), message), state)


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
        client = receive(client, message)
        if i == join:
            late = receive(None, encode_state(server))
        elif i > join:
            late = receive(late, message)
        assert _same(client, server)
        # What is rounded away stays below half a step; it does not add up over rounds.
        assert np.abs(server.values - exact).max() <= 2.0 ** (server.exponent - 1)
    if join < len(rounds):
        assert _same(late, server)
    assert _same(receive(None, encode_state(server)), server)


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
        assert _same(receive(state, message), moved)
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
            np.add.at(exact, rng.integers(num_seeds, size=200), decode_scalars(message) / 10)
        state, down = advance(state, exact)
        assert max(map(len, up)) + len(down) < limit


def test_pinned_messages_are_read():
    """A run's log is read by later versions."""
    values = [0.0, 1.0, -31.0, 4.0]
    for name in ("scalars", "floats"):
        assert decode_scalars(bytes.fromhex(PINNED[name])).tolist() == values
    delta = receive(State.zeros(4), bytes.fromhex(PINNED["delta"]))
    assert delta.values.tolist() == values
    assert _same(receive(None, bytes.fromhex(PINNED["state"])), delta)
    assert np.abs(decode_scalars(bytes.fromhex(PINNED["long"])) - (np.arange(-50, 50) % 7 - 3)).max() < 0.05


PINNED = {
    "scalars": "010400000000803f1000023d08927889ab",
    "floats": "02040000000000000000803f0000f8c1000080402565155b",
    "delta": "030400000000000000001000023d08e56555d8",
    "state": "040400000100000000001000023d083fb5da82",
    "long": "016400008c31c63d1100007d0000403e3d291300142a3e0100a9a9700142278cdd",
}


@given(data=st.binary(max_size=64))
def test_random_bytes_are_refused(data):
    for read in (decode_scalars, lambda d: receive(State.zeros(4), d)):
        with pytest.raises(PayloadError):
            read(data)


@given(where=st.integers(0, 10_000), flip=st.integers(1, 255))
def test_a_damaged_byte_is_detected(where, flip):
    message = bytearray(encode_scalars(np.arange(100.0)))
    message[where % len(message)] ^= flip
    with pytest.raises(PayloadError, match="is damaged"):
        decode_scalars(bytes(message))


@given(body=st.binary(max_size=40), kind=st.integers(0, 5), count=st.integers(0, 1000))
def test_whole_messages_with_nonsense_inside_are_refused_or_read(body, kind, count):
    from kilofed.zeroth.codec import _assemble

    for read in (decode_scalars, lambda d: receive(State.zeros(count), d)):
        try:
            read(_assemble(kind, count, b"", body))
        except PayloadError:
            continue


def test_deltas_to_clients_out_of_sync_are_refused():
    state, message = advance(State.zeros(3), [1.0, 2.0, 3.0])
    for held, words in (
        (None, "holds nothing"),
        (state, "holds version 1 of 3"),
        (State.zeros(4), "holds version 0 of 4"),
    ):
        with pytest.raises(PayloadError, match=f"a delta from version 0 of 3 numbers, but this client {words}"):
            receive(held, message)


def test_kinds_are_not_confused():
    with pytest.raises(PayloadError, match="a message of kind 1"):
        receive(None, encode_scalars([1.0]))
    with pytest.raises(PayloadError, match="a message of kind 4"):
        decode_scalars(encode_state(State.zeros(1)))


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
