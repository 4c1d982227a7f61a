"""Payload: what is encoded is what is decoded; what is not whole is refused."""

import json
import math
import struct
import tracemalloc
from base64 import urlsafe_b64encode
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kilofed.errors import PayloadError
from kilofed.payload import MAX_HEADER, MAX_KNOWN, MAX_SCALARS, SCALARS, Pack, Payload, Scalar

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip

quick = settings(deadline=None, max_examples=60)
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(
    lambda n: n not in (SCALARS, "__metadata__")
)
words = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    source = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    if dtype.is_floating_point:
        return torch.randn(shape, generator=source).to(dtype)
    return torch.randint(0, 2, shape, generator=source).to(dtype)


payloads = st.builds(Payload, st.dictionaries(names, tensors(), max_size=6), st.dictionaries(names, words, max_size=5))


def same(one: Payload, other: Payload) -> bool:
    return (
        dict(one.scalars) == dict(other.scalars)
        and [type(v) for _, v in sorted(one.scalars.items())] == [type(v) for _, v in sorted(other.scalars.items())]
        and one.tensors.keys() == other.tensors.keys()
        and all(
            torch.equal(one.tensors[n], other.tensors[n]) and one.tensors[n].dtype == other.tensors[n].dtype
            for n in one.tensors
        )
    )


def example() -> Payload:
    tensors = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)}
    return Payload(tensors, {"weight": 3, "loss": 0.25, "on": True, "word": "grüß"})


@quick
@given(payloads)
def test_decode_gives_back_what_was_encoded(payload: Payload) -> None:
    decoded = Payload.decode(payload.encode())
    assert same(decoded, payload)
    assert list(decoded.tensors) == sorted(payload.tensors)
    assert decoded.encode() == payload.encode()


@quick
@given(payloads)
def test_safetensors_reads_it(payload: Payload) -> None:
    read = safetensors.torch.load(payload.encode())
    text = bytes(read.pop(SCALARS).tolist())
    assert json.loads(text).keys() == payload.scalars.keys()
    assert same(Payload(read, payload.scalars), payload)


@quick
@given(payloads, st.randoms())
def test_order_of_names_does_not_matter(payload: Payload, random) -> None:  # type: ignore[no-untyped-def]
    shuffled = list(payload.tensors)
    random.shuffle(shuffled)
    assert Payload({n: payload.tensors[n] for n in shuffled}, payload.scalars).encode() == payload.encode()


def test_order_of_scalars_does_not_matter() -> None:
    one, other = Payload(scalars={"b": 1, "a": 0.5}), Payload(scalars={"a": 0.5, "b": 1})
    assert one.encode() == other.encode()
    assert list(Payload.decode(one.encode()).scalars) == ["a", "b"]


@quick
@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**31))
def test_length_does_not_depend_on_the_numbers(loss: float, count: int, seed: int) -> None:
    torch.manual_seed(seed)
    made_up = Payload({"w": torch.zeros(3, 5)}, {"loss": 0.0, "count": 0, "on": False})
    real = Payload({"w": torch.randn(3, 5)}, {"loss": loss, "count": count, "on": True})
    assert real.num_bytes == made_up.num_bytes


@quick
@given(payloads, st.data())
def test_every_cut_is_refused(payload: Payload, data: st.DataObject) -> None:
    body = payload.encode()
    with pytest.raises(PayloadError, match="not a whole kilofed payload"):
        Payload.decode(body[: data.draw(st.integers(0, len(body) - 1))])


def test_every_cut_of_one_payload_is_refused() -> None:
    body = example().encode()
    for length in range(len(body)):
        with pytest.raises(PayloadError):
            Payload.decode(body[:length])
    with pytest.raises(PayloadError):
        Payload.decode(body + b"\0")


@settings(deadline=None, max_examples=300)
@given(payloads, st.data())
def test_damage_to_the_header_is_refused(payload: Payload, data: st.DataObject) -> None:
    body = bytearray(payload.encode())
    num_header = 8 + int.from_bytes(body[:8], "little")
    before = bytes(body)
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, num_header - 1))] = data.draw(st.integers(0, 255))
    if bytes(body) == before:
        return
    try:
        decoded = Payload.decode(bytes(body))
    except PayloadError:
        return
    # What still reads is a payload of its own, such as one with another name: never a half of two.
    assert decoded.encode() == bytes(body)


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=200))
def test_foreign_bytes_are_refused(body: bytes) -> None:
    with pytest.raises(PayloadError):
        Payload.decode(body)


def by_hand(table: dict[str, tuple[str, object, int, int]] | str, data: bytes) -> bytes:
    """A payload with a header as given: by name (dtype, shape, begin, end), or its text."""
    if not isinstance(table, str):
        entries = {n: {"dtype": t, "shape": s, "data_offsets": [b, e]} for n, (t, s, b, e) in table.items()}
        table = json.dumps(entries, separators=(",", ":"))
    text = table.encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def test_headers_made_by_hand_are_those_of_encode() -> None:
    # Else the tests below could refuse something else than what they name.
    payload = Payload({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])})
    data = struct.pack("<4f", 1, 2, 3, 4) + b"{}"
    table = {"a": ("F32", [2], 0, 8), "b": ("F32", [2], 8, 16), SCALARS: ("U8", [2], 16, 18)}
    assert by_hand(table, data) == payload.encode()  # type: ignore[arg-type]


def test_swapped_offsets_are_refused_not_read_as_the_other_tensor() -> None:
    data = struct.pack("<4f", 1, 2, 3, 4) + b"{}"
    table = {"a": ("F32", [2], 8, 16), "b": ("F32", [2], 0, 8), SCALARS: ("U8", [2], 16, 18)}
    for read in (Payload.decode, Payload.peek):
        with pytest.raises(PayloadError, match="the header is not as kilofed writes it"):
            read(by_hand(table, data))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "begin", "end"),
    [
        ("a", "F32", [3], 0, 8),
        ("a", "F31", [2], 0, 8),
        ("a", ["F32"], [2], 0, 8),
        ("a", "F32", [2], 8, 0),
        ("a", "F32", [2], 0, 8_000_000_000_000),
        ("a", "F32", [-2], 0, 8),
        ("a", "F32", [2.0], 0, 8),
        ("a", "F32", [True, 2], 0, 8),
        ("a", "F32", 2, 0, 8),
        ("a", "F32", "2", 0, 8),
        ("a", "F32", [2, 1.5], 0, 8),
        ("a", "F32", [2**32] * 3, 0, 8),
        ("a", "F32", [2**63], 0, 8),
        ("a", "F32", [0, 2**62, 2**62], 0, 0),
        ("a", "F32", [0, 2**57, 2**57], 0, 0),
        ("a", "F32", [1] * 33, 0, 4),
        ("a", "U8", [2**62], 0, 8),
        ("__metadata__", "F32", [2], 0, 8),
    ],
)
def test_headers_that_lie_are_refused(name: str, dtype: str, shape: object, begin: int, end: int) -> None:
    size = min(max(begin, end), 8)
    table = {name: (dtype, shape, begin, end), SCALARS: ("U8", [2], size, size + 2)}
    with pytest.raises(PayloadError, match="not a whole kilofed payload"):
        Payload.decode(by_hand(table, bytes(size) + b"{}"))


@pytest.mark.parametrize(
    "header", ['{"a":"F32"}', "[" * 5000, "null", "{}", "7", '{"@":' * 200_000, '{"@":{"shape":[' + "9" * 5000 + "]}}"],
    ids=lambda header: header[:20],
)  # fmt: skip
def test_headers_that_are_none_are_refused(header: str) -> None:
    with pytest.raises(PayloadError, match="not a whole kilofed payload"):
        Payload.decode(by_hand(header, b"{}"))


@pytest.mark.parametrize("change", ["order of keys", "order of tensors", "spaces", "twice", "gap", "wider run last"])
def test_another_header_for_the_same_tensors_is_refused(change: str) -> None:
    a = '"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    b = '"b":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}'
    scalars, data = f'"{SCALARS}":{{"dtype":"U8","shape":[2],"data_offsets":[16,18]}}', bytes(16) + b"{}"
    Payload.decode(by_hand(f"{{{a},{b},{scalars}}}", data))
    wide = '"b":{"dtype":"F64","shape":[1],"data_offsets":[8,16]}'
    header = {
        "order of keys": "{" + ",".join(['"a":{"shape":[2],"dtype":"F32","data_offsets":[0,8]}', b, scalars]) + "}",
        "order of tensors": f"{{{b},{a},{scalars}}}",
        "spaces": f"{{{a}, {b},{scalars}}}",
        "twice": f"{{{a},{a},{b},{scalars}}}",
        "gap": f"{{{a},{b},{scalars}}}".replace("[16,18]", "[24,26]").replace("[8,16]", "[16,24]"),
        "wider run last": f"{{{a},{wide},{scalars}}}",
    }[change]
    with pytest.raises(PayloadError, match="not a whole kilofed payload"):
        Payload.decode(by_hand(header, data if change != "gap" else bytes(24) + b"{}"))


def test_lengths_of_a_header_out_of_range_are_refused() -> None:
    body = example().encode()
    for length in (2**64 - 1, 2**63, len(body), len(body) - 7, MAX_HEADER + 8, 0):
        with pytest.raises(PayloadError, match="not a whole kilofed payload"):
            Payload.decode(struct.pack("<Q", length) + body[8:])


def test_what_decode_would_refuse_is_not_encoded() -> None:
    with pytest.raises(PayloadError, match="send fewer tensors, shorter names or shorter words"):
        Payload(scalars={"word": "x" * MAX_SCALARS}).encode()
    with pytest.raises(PayloadError, match="send fewer tensors, shorter names or shorter words"):
        Payload({"x" * MAX_HEADER: torch.zeros(1)}).encode()
    with pytest.raises(PayloadError, match="33 dimensions"):
        Payload({"a": torch.zeros([1] * 33)}).encode()


def test_a_longest_text_of_scalars_round_trips() -> None:
    payload = Payload(scalars={"w": "x" * (MAX_SCALARS - len('{"w":"s"}'))})
    assert same(Payload.decode(payload.encode()), payload)


def test_many_senders_with_headers_of_their_own_do_not_fill_the_memory() -> None:
    bodies = (by_hand({f"{number:02d}" * (MAX_KNOWN // 8): ("F32", [0], 0, 0), SCALARS: ("U8", [2], 0, 2)}, b"{}")
              for number in range(60))  # fmt: skip
    tracemalloc.start()
    try:
        for body in bodies:
            Payload.decode(body)
        del body
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 4 * MAX_KNOWN


def test_a_refused_payload_takes_no_more_memory_than_its_own_length() -> None:
    whole = Payload({"w": torch.zeros(1 << 20)}, {"round": 1}).encode()
    honest = peak(lambda: Payload.decode(whole))
    assert honest < 1.2 * len(whole)
    for wrong in (whole[:-1], whole + b" ", whole[:-1] + b",", whole.replace(b"[1048576]", b"[1048575]", 1)):
        assert peak(lambda wrong=wrong: refused(wrong)) < 1.2 * len(whole)  # type: ignore[misc]
    switches = Payload({"on": torch.ones(1 << 20, dtype=torch.bool)}).encode()
    assert peak(lambda: Payload.decode(switches)) < 1.2 * len(switches)


def refused(body: bytes) -> None:
    with pytest.raises(PayloadError):
        Payload.decode(body)


def peak(action: Callable[[], object]) -> int:
    """Bytes that Python holds at most while `action` runs."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_safetensors_file_of_someone_else_is_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(PayloadError, match="foreign"):
        Payload.decode((tmp_path / "other.safetensors").read_bytes())


@pytest.mark.parametrize(
    "text",
    [
        b"[]", b'{"a":1}', b'{"a":""}', b'{"a":"q1"}', b'{"a":"fzz"}', b'{"a":"b"}', b"{\xff}",
        b'{"a":"i"}', b'{"a":"iAAAAAAAAAA"}', b'{"a":"iAAAAAAAAAAAAAAAAAAAAAA"}', b'{"a":"i\\u00e4AAAAAAAAAA"}',
        b'{"a":"iAAAAAAAAAA*"}', b'{"a":"iAAAAAAAAAAB"}', b'{"a":"f"}', b'{"a":"b7"}', b'{"a":"b01"}', b'{"a":"b 1"}',
        b'{"a":["s","x"]}', b'{"a":{"0":"s"}}', b'{"a":null}', b'{"a":' + b"9" * 4400 + b"}",
        b"[" * 60_000, b'{"a":' * 12_000, b"null", b"7", b"",
        b'{"a": "b1"}', b'{"a":"b1"} ', b' {"a":"b1"}', b'{"a":"b1"}\n', b'{"b":"b1","a":"b1"}', b'{"a":"b1","a":"b1"}',
        b'{"a":"b0","a":"b1"}', b'{"\\u0061":"b1"}', b'{"a":"s\\u0061"}', '{"a":"sü"}'.encode(), b'{"a":"s\\u00FC"}',
    ],
    ids=lambda text: repr(text[:24]),
)  # fmt: skip
def test_scalars_that_encode_does_not_write_are_refused(text: bytes) -> None:
    body = by_hand({SCALARS: ("U8", [len(text)], 0, len(text))}, text)
    for read in (Payload.decode, Payload.peek):
        with pytest.raises(PayloadError, match="not a whole kilofed payload"):
            read(body)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_scalar_that_is_not_finite_is_refused(value: float) -> None:
    word = urlsafe_b64encode(struct.pack(">d", value))[:-1].decode()
    text = f'{{"loss":"f{word}"}}'.encode()
    body = by_hand({SCALARS: ("U8", [len(text)], 0, len(text))}, text)
    for read in (Payload.decode, Payload.peek):
        with pytest.raises(PayloadError, match="expected a finite number"):
            read(body)


def test_a_bool_of_another_bit_is_refused() -> None:
    body = Payload({"on": torch.tensor([True, False])}).encode()
    at = len(body) - len(b"{}") - 2
    assert body[at : at + 2] == b"\1\0"
    with pytest.raises(PayloadError, match="neither 0 nor 1"):
        Payload.decode(body[:at] + b"\2\0{}")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2**63, 10**5000, None, [1.0], ["x"] * 10_000], ids=type)
def test_scalars_that_are_no_plain_numbers_are_refused(value: Scalar) -> None:
    with pytest.raises(PayloadError, match="scalar 'x' is"):
        Payload(scalars={"x": value}).encode()


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("z", torch.zeros(2, dtype=torch.complex64), r"'z' is torch\.complex64; expected one of"),
        ("s", torch.zeros(2, 2).to_sparse(), "'s' is torch.sparse_coo; expected a dense one"),
        (SCALARS, torch.zeros(2), "no tensor may be named"),
        ("__metadata__", torch.zeros(2), "no tensor may be named"),
        ("\ud800", torch.zeros(2), "name is not text"),
    ],
)
def test_tensors_that_cannot_travel_are_refused(name: str, tensor: Tensor, message: str) -> None:
    with pytest.raises(PayloadError, match=message):
        Payload({name: tensor}).encode()


def test_layouts_in_memory_do_not_matter() -> None:
    base = torch.arange(24.0).reshape(4, 6)
    strided = Payload({"t": base.T, "s": base[::2, 1::2], "e": base[:1].expand(3, 6), "p": nn_parameter(base)})
    assert same(Payload.decode(strided.encode()), strided)


def nn_parameter(values: Tensor) -> Tensor:
    return torch.nn.Parameter(values.clone())


def test_writing_to_one_decoded_tensor_leaves_the_others() -> None:
    body = example().encode()
    decoded = Payload.decode(body)
    decoded.tensors["w"].fill_(7)
    assert torch.equal(decoded.tensors["b"], example().tensors["b"])
    assert decoded.tensors["w"].eq(7).all()
    assert same(Payload.decode(body), example())


def test_decoded_tensors_train_apart_from_each_other() -> None:
    decoded = Payload.decode(Payload({"a": torch.ones(3), "b": torch.ones(3)}).encode())
    a = decoded.tensors["a"].requires_grad_()
    loss = a.square().sum()
    decoded.tensors["b"].add_(1)  # A write beside it, between forward and backward.
    loss.backward()
    with torch.no_grad():
        a -= 0.5 * a.grad
    assert a.tolist() == [0.0, 0.0, 0.0]
    assert decoded.tensors["b"].tolist() == [2.0, 2.0, 2.0]


def test_a_pack_sends_what_was_written_to_it() -> None:
    decoded = Payload.decode(example().encode())
    decoded.tensors["w"].fill_(7)
    assert torch.equal(Payload.decode(decoded.encode()).tensors["w"], torch.full((2, 3), 7.0))


def test_equal_structures_share_a_layout() -> None:
    one = Pack.of(Payload.decode(Payload({"a": torch.zeros(2)}, {"x": 1}).encode()).tensors)
    other = Pack.of(Payload.decode(Payload({"a": torch.ones(2)}, {"x": 2.5, "y": "long word"}).encode()).tensors)
    assert one.layout.like(other.layout)
    assert not one.layout.like(Pack.of({"a": torch.zeros(2, dtype=torch.float64)}).layout)
    assert not one.layout.like(Pack.of({"a": torch.zeros(1, 2)}).layout)


def test_an_empty_payload_is_one() -> None:
    assert same(Payload.decode(Payload().encode()), Payload())


def test_scalars_in_any_order_are_the_same_bytes() -> None:
    scalars = {"weight": 41, "loss": 0.5, "word": "x", "last": True}
    backwards = dict(reversed(scalars.items()))
    assert Payload(scalars=scalars).encode() == Payload(scalars=backwards).encode()


@pytest.mark.parametrize("number", [2**63 - 1, -(2**63)])
def test_integers_of_64_bits_are_sent_and_longer_ones_refused(number: int) -> None:
    assert Payload.decode(Payload(scalars={"n": number}).encode()).scalars["n"] == number
    with pytest.raises(PayloadError, match="expected a finite number of 64 bits"):
        Payload(scalars={"n": number + (1 if number > 0 else -1)}).encode()


def test_bytes_that_no_header_stands_for_are_refused() -> None:
    body = Payload({"x": torch.ones(3)}, {"n": 1}).encode()
    text = body.index(b'{"n"')
    with pytest.raises(PayloadError):
        Payload.decode(body[:text] + bytes(8) + body[text:])


def test_headers_and_scalars_of_exactly_the_largest_size_pass_and_longer_ones_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Names of one length have headers of one length, and each is made anew.
    whole = Payload({"size a": torch.ones(2)}, {"word": "long"}).encode()
    header, scalars = int.from_bytes(whole[:8], "little"), len(whole) - whole.index(b'{"word"')
    monkeypatch.setattr("kilofed.payload.MAX_HEADER", header)
    monkeypatch.setattr("kilofed.payload.MAX_SCALARS", scalars)
    fits = Payload({"size b": torch.ones(2)}, {"word": "long"})
    assert Payload.decode(fits.encode()).scalars == fits.scalars
    for name, value in (("size that is longer", "long"), ("size c", "longer")):
        with pytest.raises(PayloadError, match="send fewer tensors, shorter names or shorter words"):
            Payload({name: torch.ones(2)}, {"word": value}).encode()
