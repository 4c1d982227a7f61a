"""Payload: what is encoded is what is decoded; what is not whole is refused."""

import json
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kilofed.errors import PayloadError
from kilofed.payload import SCALARS, Pack, Payload, Scalar

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


def by_hand(header: str, data: bytes) -> bytes:
    text = header.encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}', 14),
        ('{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}', 10),
        ('{"a":{"dtype":"F31","shape":[2],"data_offsets":[0,8]}}', 10),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}', 10),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8000000000000]}}', 10),
        ('{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}', 10),
        ('{"a":{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,8]}}', 10),
        ('{"a":"F32"}', 10),
        ("[" * 5000, 10),
        ("null", 2),
    ],
)  # fmt: skip
def test_headers_that_lie_are_refused(header: str, data: int) -> None:
    text = f'"{SCALARS}":{{"dtype":"U8","shape":[2],"data_offsets":[{data - 2},{data}]}}'
    whole = header[:-1] + "," + text + "}" if header.endswith("}") else header
    with pytest.raises(PayloadError):
        Payload.decode(by_hand(whole, bytes(data - 2) + b"{}"))


def test_a_safetensors_file_of_someone_else_is_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(PayloadError, match="foreign"):
        Payload.decode((tmp_path / "other.safetensors").read_bytes())


@pytest.mark.parametrize(
    "text", [b"[]", b'{"a":1}', b'{"a":""}', b'{"a":"q1"}', b'{"a":"fzz"}', b'{"a":"b"}', b"{\xff}"]
)
def test_scalars_that_encode_does_not_write_are_refused(text: bytes) -> None:
    header = f'{{"{SCALARS}":{{"dtype":"U8","shape":[{len(text)}],"data_offsets":[0,{len(text)}]}}}}'
    with pytest.raises(PayloadError):
        Payload.decode(by_hand(header, text))


def test_a_bool_of_another_bit_is_refused() -> None:
    body = Payload({"on": torch.tensor([True, False])}).encode()
    at = len(body) - len(b"{}") - 2
    assert body[at : at + 2] == b"\1\0"
    with pytest.raises(PayloadError, match="neither 0 nor 1"):
        Payload.decode(body[:at] + b"\2\0{}")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2**63, None, [1.0]])
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
