"""Damage that knows where a message's lengths, numbers, headers and checksums are, so that it gets past the first check."""

import json
import re
import struct
import zlib
from collections.abc import Callable
from random import Random

import torch
import zstandard
from torch import Tensor

from kilofed.errors import PayloadError
from kilofed.payload import Payload
from messages import DTYPES, Message, pick

NUMBERS = [0, 1, 2, 3, 5, 7, 16, 60, 127, 128, 129, 255, 256, 32767, 32768, 65535, 2**24 - 1, 2**24, 2**31 - 1, 2**31,
           2**32 - 1, 2**53, 2**57, 2**62, 2**63 - 1, 2**63, 2**64 - 1]  # fmt: skip
JSON_NUMBERS = [*map(str, NUMBERS), "-1", "1.5", "1e400", "NaN", "true", "null", "01", "9" * 5000, '"8"', "[1]", "[]"]
FLOATS = [
    struct.pack("<f", value) for value in (float("nan"), float("inf"), -float("inf"), -1.0, -0.0, 0.0, 3e38, 1e-45)
]
WORDS = [
    "i",
    "f",
    "b",
    "",
    "b7",
    "b1",
    "iAAAAAAAAAAA",
    "fAAAAAAAAAAA",
    "f9_4AAAAAAAA",
    "f__AAAAAAAAA",
    "sx",
    "x",
    "fzz",
    "i*AAAAAAAAAA",
]
TEXTS = [
    b"", b"{}", b"[]", b"null", b"7", b'{"a":1}', b'{"a":["s"]}', b"[" * 3000, b'{"a":' * 1500, b"{\xff}",
    b'{"a":' + b"9" * 5000 + b"}", b'{"b":"b1","a":"b1"}', b'{"a":"b1","a":"b0"}', b'{"a": "b1"}', b'{"\\ud800":"s"}',
]  # fmt: skip
INTEGER = re.compile(rb"(?<=[\[,])\d+(?=[\],])")
SIZE = re.compile(rb'"shape":\[(\d+)\],"data_offsets":\[(\d+),\d+\]\}\}( *)$')


def plain(rng: Random, data: bytes, other: bytes) -> bytes:
    """`data` with one change that knows nothing of it."""
    if not data:
        return other
    at, choice = int(rng.random() * len(data)), int(rng.random() * 9)
    if choice == 0:
        return data[:at] + bytes([data[at] ^ 1 << rng.getrandbits(3)]) + data[at + 1 :]
    if choice == 1:
        return data[:at] + bytes([rng.getrandbits(8)]) + data[at + 1 :]
    if choice == 2:
        return data[:at]
    if choice == 3:
        return data + rng.randbytes(1 + rng.getrandbits(4))
    if choice == 4:
        return data[:at] + data[at + 1 + rng.getrandbits(3) :]
    if choice == 5:
        return data[:at] + data[at : at + 1 + rng.getrandbits(5)] + data[at:]
    if choice == 6:
        return data[:at] + other[int(rng.random() * len(other)) :]
    if choice == 7:
        return data[:at] + rng.choice(FLOATS) + data[at + 4 :]
    width = 1 << rng.getrandbits(2)
    number = rng.choice(NUMBERS) & (1 << 8 * width) - 1
    return data[:at] + number.to_bytes(width, "little") + data[at + width :]


def several(rng: Random, data: bytes, other: bytes) -> bytes:
    """One change, or a few."""
    for _ in range(1 if rng.random() < 0.7 else 2 + rng.getrandbits(2)):
        data = plain(rng, data, other)
    return data


def coded(rng: Random, data: bytes, other: bytes) -> bytes:
    """A codec message with damage behind its checksum, which is right again."""
    inner, choice = data[:-4], rng.random()
    if choice < 0.15 and len(inner) > 5:
        kind = inner[0]
        inner = bytes([kind]) + rng.choice(NUMBERS).to_bytes(8, "little")[:3] + inner[4:]
    elif choice < 0.3 and len(inner) > 9:
        inner = refit(rng, inner)
    elif choice < 0.4:
        inner = inner[:4] + rng.choice(FLOATS) + inner[8:]
    elif choice < 0.5:
        inner = inner[:4] + rng.randbytes(6) + inner[10:]
    else:
        inner = several(rng, inner, other[:-4])
    return inner + struct.pack("<I", zlib.crc32(inner))


def refit(rng: Random, inner: bytes) -> bytes:
    """Another width, coding or frame for the integers of a message."""
    at = {1: 8, 3: 10, 4: 10}.get(inner[0], 4)
    width = rng.choice([0, 1, 2, 3, 4, 5, 7, 8, 15])
    planes = rng.choice([bytes(40), bytes(60), bytes(128), bytes(120), b"\1" * 128, rng.randbytes(60), bytes(10**5)])
    frame = planes if rng.random() < 0.3 else rng.choice(COMPRESSORS)().compress(planes)
    if rng.random() < 0.2:
        frame = several(rng, frame, planes)
    return inner[:at] + bytes([width << 4 | rng.choice([0, 1, 1, 2])]) + frame


def _compressor(**options: bool | int) -> Callable[[], zstandard.ZstdCompressor]:
    chosen = {"format": zstandard.FORMAT_ZSTD1_MAGICLESS, "write_content_size": False, **options}
    parameters = zstandard.ZstdCompressionParameters.from_level(1, **chosen)
    made = zstandard.ZstdCompressor(compression_params=parameters)
    return lambda: made


COMPRESSORS = [
    _compressor(),
    _compressor(write_content_size=True),
    _compressor(write_checksum=True),
    _compressor(format=zstandard.FORMAT_ZSTD1),
    _compressor(window_log=20),
]


def nested(rng: Random, message: Message, other: Message) -> bytes:
    """Damage within one of the codec messages of a message, whose length is right again."""
    start, end, length_at = message.inner[int(rng.random() * len(message.inner))]
    first = other.inner[int(rng.random() * len(other.inner))]
    new = coded(rng, message.body[start:end], other.body[first[0] : first[1]])
    body = bytearray(message.body[:start] + new + message.body[end:])
    if length_at is not None:
        (length,) = struct.unpack_from("<I", body, length_at)
        struct.pack_into("<I", body, length_at, length + len(new) - (end - start))
    return bytes(body)


def headed(header: bytes, data: bytes) -> bytes:
    """A payload with this text as its header."""
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data


def header_edited(rng: Random, message: Message, other: Message) -> bytes:
    """A payload with another header and a length that fits it."""
    num = int.from_bytes(message.body[:8], "little")
    header, data = message.body[8 : 8 + num].rstrip(b" "), message.body[8 + num :]
    choice = rng.random()
    if choice < 0.5:
        places = list(INTEGER.finditer(header))
        one, two = rng.choice(places), rng.choice(places)
        if choice < 0.35:
            new = rng.choice(JSON_NUMBERS).encode() if rng.random() < 0.6 else str(rng.getrandbits(5)).encode()
            return headed(header[: one.start()] + new + header[one.end() :], data)
        one, two = sorted((one, two), key=lambda found: found.start())
        if one is two or one.start() == two.start():
            return headed(header, data)
        middle = header[one.end() : two.start()]
        return headed(header[: one.start()] + two.group() + middle + one.group() + header[two.end() :], data)
    if choice < 0.65:
        return headed(reordered(rng, header), data)
    return headed(several(rng, header, other.body[8:]), data)


def reordered(rng: Random, header: bytes) -> bytes:
    """A header that says the same or something else in another way."""
    table = json.loads(header)
    names = list(table)
    choice = rng.getrandbits(2)
    if choice == 0:
        rng.shuffle(names)
        return json.dumps({name: table[name] for name in names}, separators=(",", ":"), ensure_ascii=False).encode()
    if choice == 1:  # The offsets of two tensors change places.
        one, two = rng.choice(names), rng.choice(names)
        table[one]["data_offsets"], table[two]["data_offsets"] = table[two]["data_offsets"], table[one]["data_offsets"]
        return json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    if choice == 2:
        table[rng.choice(names)]["dtype"] = rng.choice(["F32", "BF16", "I64", "BOOL", "U8", "F8_E4M3", "X", ""])
        return json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    return json.dumps(table, ensure_ascii=rng.random() < 0.5).encode()


def text_edited(rng: Random, message: Message, other: Message) -> bytes:
    """A payload with other scalars, and a header that tells their length."""
    num = int.from_bytes(message.body[:8], "little")
    header = message.body[8 : 8 + num]
    found = SIZE.search(header)
    if found is None:
        return message.body
    length, end = int(found.group(1)), int(found.group(2))
    data, text = message.body[8 + num : 8 + num + end], message.body[8 + num + end :]
    choice = rng.random()
    if choice < 0.3:
        text = rng.choice(TEXTS)
    elif choice < 0.65:
        text = json.dumps({"a": rng.choice(WORDS), "b": rng.choice(WORDS)}, separators=(",", ":")).encode()
    else:
        text = several(rng, text, other.body[-length:])
    size = f'"shape":[{len(text)}],"data_offsets":[{end},{end + len(text)}]}}}}'.encode()
    return headed(header[: found.start()] + size, data + text)


def data_edited(rng: Random, message: Message, other: Message) -> bytes:
    """A payload with other bytes in its tensors and scalars."""
    num = 8 + int.from_bytes(message.body[:8], "little")
    data = bytearray(message.body[num:])
    for _ in range(1 + rng.getrandbits(2)):
        at = int(rng.random() * len(data))
        if rng.random() < 0.5:
            data[at] = rng.choice((0x7F, 0xFF, 0x80, 0, 0xC0, rng.getrandbits(8)))
        else:
            data[at : at + 4] = rng.choice(FLOATS)[: len(data) - at]
    return message.body[:num] + bytes(data)


def tensors_edited(rng: Random, message: Message, other: Message) -> bytes:
    """A well-formed payload whose tensors are not those of the kind."""
    tensors = dict(message.tensors or {})
    if not tensors:
        return message.body
    name, choice = rng.choice(sorted(tensors)), int(rng.random() * 9)
    one = tensors[name]
    if choice == 0:
        del tensors[name]
    elif choice == 1:
        tensors[rng.choice(["rows", "scales", "labels", "classes", "lengths", "values", "x"])] = one
    elif choice == 2:
        tensors[name] = one.to(rng.choice(DTYPES))
    elif choice == 3:
        tensors[name] = one.reshape(-1).view(torch.uint8) if one.numel() else one
    elif choice == 4:
        tensors[name] = one[: int(rng.random() * (len(one) + 1))] if one.dim() else one[None]
    elif choice == 5:
        tensors[name] = rng.choice(
            (one[None], one.reshape(-1), one.T, torch.cat([one, one]))
            if one.dim() == 2
            else (one[None], one.reshape(-1))
        )
    elif choice == 6 and other.tensors and name in other.tensors:
        tensors[name] = other.tensors[name]
    else:
        tensors[name] = spoilt(rng, one)
    try:
        return Payload(tensors, {"steps": rng.choice(NUMBERS[:24])}).encode()
    except PayloadError:  # Such as one with too many dimensions.
        return message.body


def spoilt(rng: Random, one: Tensor) -> Tensor:
    """The tensor with one number of the extremes of its type."""
    if not one.numel():
        return one
    flat = one.clone().reshape(-1)
    if one.dtype.is_floating_point:
        flat[int(rng.random() * len(flat))] = rng.choice(
            (float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1.0, -1.0)
        )
    elif one.dtype == torch.bool:
        flat[0] = not flat[0]
    else:
        most = torch.iinfo(one.dtype)
        value = rng.choice((most.min, most.max, most.max - 1, 0, -1 if most.min else 1, 1, -100 if most.min else 1))
        flat[int(rng.random() * len(flat))] = max(min(value, most.max), most.min)
    return flat.reshape(one.shape)


OF_PAYLOADS = (header_edited, text_edited, data_edited, tensors_edited)


def mutated(rng: Random, messages: list[Message]) -> bytes:
    """A message with damage, chosen for its kind."""
    message, other = pick(rng, messages), pick(rng, messages)
    if rng.random() < 0.2:
        return several(rng, message.body, other.body)
    if message.inner:
        # The head around the inner messages, whose checksums do not cover it.
        if rng.random() < 0.25 and len(message.inner) + message.inner[0][0] > 1:
            at = message.inner[int(rng.random() * len(message.inner))][0]
            return several(rng, message.body[:at], other.body) + message.body[at:]
        return nested(rng, message, other)
    return OF_PAYLOADS[int(rng.random() * 4)](rng, message, other)
