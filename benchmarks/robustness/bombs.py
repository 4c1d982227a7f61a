"""Messages that want to stand for far more than their bytes, and the memory that refusing them takes.

Each message is decoded in a forked process of its own, and the growth of its largest resident memory (VmHWM) read after it:
that counts what zstd, numpy and torch allocate as well. The honest message is the largest of the setting.
"""

import ctypes
import gc
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import zstandard
from torch import Tensor

from kilofed.distillation import ensemble
from kilofed.errors import KilofedError
from kilofed.payload import MAX_HEADER, Payload
from kilofed.split import activation_codec, server_half
from kilofed.split.server_half import BatchLimits
from kilofed.zeroth import codec, seed_log
from kilofed.zeroth.pools import SeedPools
from kilofed.zeroth.seed_log import Report, Request
from message_damage import headed

MOST = 2.0
K, STEPS = 1 << 20, 65_535
POOLS = SeedPools(K, STEPS, lr=0.5, sampling="pro", bits=5, rounds_per_pool=0, max_gradient=1e6)
LIMITS = BatchLimits(num_rows=16, length=256, width=256, dtype="int8", targets="tokens", num_outputs=4096)
Read = Callable[[bytes], object]


@dataclass(frozen=True)
class Peak:
    """One bomb against the honest message of its kind."""

    group: str
    what: str
    size: int
    refused: int
    """Bytes of memory at the peak, beyond the message itself."""
    honest_size: int
    honest: int

    @property
    def ratio(self) -> float:
        """Times the honest message's peak."""
        return self.refused / max(self.honest, 1)


def peaks() -> list[Peak]:
    """All bombs."""
    found = []
    for group, read, honest, bombs in settings():
        usual, named = peak(read, honest, honest)
        if named:
            raise SystemExit(f"{group}: the honest message is refused: {named}")
        for what, body in bombs:
            most, named = peak(read, honest, body)
            if not named:
                raise SystemExit(f"{group}, {what}: not refused")
            found.append(Peak(group, what, len(body), most, len(honest), usual))
    return found


def peak(read: Read, honest: bytes, body: bytes) -> tuple[int, str]:
    """(growth of the largest resident memory in bytes, the error's text or nothing) of reading `body`."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        read(honest)  # What libraries set up at their first use is no matter of the message.
        # What was freed goes back to the system; else it would be used again and not counted.
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", "ascii")  # The largest is that from here on.
        text, before = "", _memory("VmRSS")
        try:
            kept = read(body)
        except KilofedError as error:
            text, kept = str(error), None
        grown = _memory("VmHWM") - before
        del kept
        os.write(writer, f"{grown} {text[:200]}".encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as stream:
        said = stream.read().decode()
    os.waitpid(child, 0)
    grown, _, text = said.partition(" ")
    return int(grown), text


def _memory(name: str) -> int:
    """Bytes, from /proc."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def settings() -> Iterator[tuple[str, Read, bytes, list[tuple[str, bytes]]]]:
    """(group, decoder, honest message, bombs with what they are)."""
    rng = np.random.default_rng(0)
    yield from payloads()
    yield from seed_pools(rng)
    yield from tensors()


def payloads() -> Iterator[tuple[str, Read, bytes, list[tuple[str, bytes]]]]:
    honest = Payload({"w": torch.ones(2_000_000)}, {"round": 1, "train_loss": 0.5}).encode()
    switches = Payload({"on": torch.ones(8_000_000, dtype=torch.bool)}).encode()
    entry = '"%06d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
    num = MAX_HEADER // len(entry % 0) - 1
    many = "".join(entry % number for number in range(num))
    last = '"@":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}'
    wide = '{"w":{"dtype":"F32","shape":[0,4611686018427387904,4611686018427387904],"data_offsets":[0,0]},'
    text = b"{" + b",".join(b'"%05d":"b1"' % number for number in range(600_000)) + b"}"
    words = f'{{"@":{{"dtype":"U8","shape":[{len(text)}],"data_offsets":[0,{len(text)}]}}}}'.encode()
    yield (
        "payload",
        Payload.decode,
        honest,
        [
            ("cut by one byte", honest[:-1]),
            ("shape [0, 2^62, 2^62]", headed((wide + last.replace("3", "2")).encode(), b"{}")),
            ("a header of 2^63 bytes", struct.pack("<Q", 2**63) + honest[8:]),
            ("a header that nests", headed(b"[" * 8_000_000, b"{}")),
            ("600,000 scalars", headed(words, text)),
            ("scalars that nest", headed(words, b"[" * len(text))),
        ],
    )
    yield ("payload of switches", Payload.decode, switches, [("a switch of 2", switches[:-3] + b"\2{}")])
    whole = Payload({f"{number:06d}": torch.zeros(0) for number in range(num)}).encode()
    yield (
        "payload of many tensors",
        Payload.decode,
        whole,
        [("as many, and three bytes of scalars", headed(("{" + many + last).encode(), b"{ }"))],
    )


def coded(kind: int, count: int, header: bytes, width: int, frame: bytes) -> bytes:
    """A codec message whose checksum is right."""
    message = struct.pack("<BI", kind, count)[:4] + header + bytes([width << 4 | codec.ZSTANDARD]) + frame
    return message + struct.pack("<I", zlib.crc32(message))


def compressed(num: int, **options: bool | int) -> bytes:
    """A frame of `num` zeros."""
    chosen = {"format": zstandard.FORMAT_ZSTD1_MAGICLESS, "write_content_size": False, **options}
    parameters = zstandard.ZstdCompressionParameters.from_level(19, **chosen)
    return zstandard.ZstdCompressor(compression_params=parameters).compress(bytes(num))


def seed_pools(rng: np.random.Generator) -> Iterator[tuple[str, Read, bytes, list[tuple[str, bytes]]]]:
    step, zeros, large = struct.pack("<f", 1.0), compressed(2**24 - 1), compressed(1 << 31, write_content_size=True)
    report = Report(3, 1.0, (), rng.normal(size=STEPS))
    head = struct.pack("<IfH", 3, 1.0, 0)
    inside = [
        ("a frame that declares 2 GB", coded(codec.SCALARS, STEPS, step, 1, large)),
        ("a frame of 2^24 - 1 that declares nothing", coded(codec.SCALARS, STEPS, step, 1, zeros)),
        ("2^24 - 1 integers claimed", coded(codec.SCALARS, 2**24 - 1, step, 1, zeros)),
        ("a window of 128 MB", coded(codec.SCALARS, STEPS, step, 1, zeros[:1] + b"\x88" + zeros[2:])),
        ("2^24 - 1 float32 claimed", coded(codec.FLOATS, 2**24 - 1, b"", 1, zeros)),
    ]
    yield (
        "scalars",
        lambda body: codec.decode_scalars(body, count=STEPS),
        codec.encode_scalars(report.gradients),
        inside,
    )
    skipped = struct.pack("<IfH", 3, 1.0, 65_535) + bytes(2 * 65_535)
    reports = [(what, head + body) for what, body in inside]
    yield ("report", POOLS.report, report.pack(6), [*reports, ("65,535 skipped steps", skipped + inside[0][1])])
    entries = [(what, struct.pack("<II", 1, len(body)) + body) for what, body in reports]
    yield (
        "record of a round",
        lambda body: POOLS.limits(seed_log.to_tensor(body)),
        seed_log.to_bytes(seed_log.pack_reports({1: report.pack(6)})),
        [*entries, ("an entry of 2^32 - 1 bytes", struct.pack("<II", 1, 2**32 - 1) + report.pack(6))],
    )
    moved, delta = codec.advance(codec.State.zeros(K), rng.normal(size=K), bits=8)
    place = struct.pack("<Ih", 0, 0)
    for group, kind, honest in (("state", codec.STATE, codec.encode_state(moved)), ("delta", codec.DELTA, delta)):
        yield (
            group,
            lambda body: codec.receive(codec.State.zeros(K), body, count=K),
            honest,
            [
                ("a frame that declares 2 GB", coded(kind, K, place, 4, large)),
                ("a frame of 2^24 - 1", coded(kind, K, place, 4, zeros)),
                ("2^24 - 1 integers claimed", coded(kind, 2**24 - 1, place, 1, zeros)),
                ("7 bytes per integer", coded(kind, K, place, 7, compressed(7 * K))),
                ("exponent 32767", coded(kind, K, struct.pack("<Ih", 0, 32767), 1, compressed(K))),
            ],
        )
    levels = seed_log.encode_levels(rng.random(K))
    bombs = [(what, coded(codec.SCALARS, count, step, 1, frame)) for what, count, frame in (
        ("a frame that declares 2 GB", K, large), ("a frame of 2^24 - 1", K, zeros), ("2^24 - 1 claimed", 2**24 - 1, zeros),
    )]  # fmt: skip
    yield ("sampling levels", POOLS.weights, levels, bombs)

    def read(body: bytes) -> object:
        request = POOLS.request(seed_log.to_tensor(body), 1)
        POOLS.receive(held := {}, request.updates)
        return held, POOLS.weights(request.levels)

    def packed(update: bytes, pool: int = 0) -> bytes:
        return seed_log.to_bytes(Request(pool, updates=((0, update),), levels=levels).pack())

    yield (
        "request",
        read,
        packed(codec.encode_state(moved)),
        [
            ("an update that declares 2 GB", packed(coded(codec.STATE, K, place, 4, large))),
            ("an update of 2^24 - 1", packed(coded(codec.STATE, 2**24 - 1, place, 1, zeros))),
            ("pool 65,535", packed(codec.encode_state(moved), 65_535)),
            ("255 updates that are not there", struct.pack("<H8sB", 0, bytes(8), 255) + levels),
        ],
    )


def tensors() -> Iterator[tuple[str, Read, bytes, list[tuple[str, bytes]]]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.full((LIMITS.num_rows,), LIMITS.length, dtype=torch.int32)
    num = int(lengths.sum())
    rows = torch.randn(num, LIMITS.width, generator=generator)
    labels = torch.ones(num, dtype=torch.int32)

    def sent(limits: BatchLimits, **changes: Tensor) -> bytes:
        encoded = activation_codec.encode(rows, limits.dtype)[0]
        return Payload({**encoded, "lengths": lengths, "labels": labels, **changes}, {"steps": 1}).encode()

    one = torch.tensor([num - 15, *[1] * 15], dtype=torch.int32)
    for dtype in ("int8", "float32"):
        limits = replace(LIMITS, dtype=dtype)
        yield (
            f"activations, {dtype}",
            lambda body, limits=limits: server_half.decode_batch(Payload.decode(body).tensors, limits),  # type: ignore[misc]
            sent(limits),
            [
                ("a row of 2^31 - 1 tokens", sent(limits, lengths=torch.full((16,), 2**31 - 1, dtype=torch.int32))),
                ("one row of nearly all tokens", sent(limits, lengths=one)),
                ("a row per token", sent(limits, lengths=torch.ones(num, dtype=torch.int32))),
                ("a label beyond the vocabulary", sent(limits, labels=torch.full((num,), 4096, dtype=torch.int32))),
                ("no label to learn", sent(limits, labels=torch.full((num,), -100, dtype=torch.int32))),
            ],
        )
    log_probs = torch.randn(2000, 33, generator=generator).log_softmax(1)
    tokens = torch.stack([torch.randperm(4096, generator=generator)[:32] for _ in range(2000)]).to(torch.int16)

    def read(body: bytes) -> object:
        tensors = Payload.decode(body).tensors
        kept = ensemble.read(tensors.get("log_probs"), "int8", (2000, 33))
        return kept, ensemble.read_tokens(tensors.get("words"), (2000, 32), 4096)

    codes = ensemble.encode(log_probs, "int8")
    yield (
        "packed logits",
        read,
        Payload({"log_probs": codes, "words": tokens}).encode(),
        [
            ("more positions", Payload({"log_probs": codes.repeat(2, 1), "words": tokens}).encode()),
            ("a code of -128", Payload({"log_probs": codes * 0 - 128, "words": tokens}).encode()),
            ("a token beyond the vocabulary", Payload({"log_probs": codes, "words": tokens + 4096}).encode()),
            ("one token throughout", Payload({"log_probs": codes, "words": tokens * 0}).encode()),
        ],
    )
