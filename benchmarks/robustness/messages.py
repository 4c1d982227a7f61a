"""Honest messages of every kind that a decoder of kilofed reads, and what the decoder promises of what it accepts."""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from random import Random

import numpy as np
import torch
from torch import Tensor

from kilofed.distillation import ensemble, losses
from kilofed.errors import PayloadError
from kilofed.models import training
from kilofed.payload import Payload
from kilofed.split import activation_codec, server_half
from kilofed.split.server_half import BatchLimits
from kilofed.zeroth import codec, seed_log
from kilofed.zeroth.pools import SeedPools
from kilofed.zeroth.seed_log import Report, Request

K, STEPS, COUNT, ROUND = 128, 40, 60, 3
POOLS = SeedPools(K, STEPS, lr=0.5, sampling="pro", bits=5, rounds_per_pool=2, max_gradient=1e6)
HELD = codec.State(np.arange(-64, 64, dtype=np.int64) * 1000, -3, 7)
"""What a client holds to which a delta comes."""
V, POSITIONS, TOP, WIDTH = 300, 6, 4, 8
LIMITS = BatchLimits(num_rows=4, length=12, width=WIDTH, dtype="float32", targets="tokens", num_outputs=V)


class BrokenPromise(Exception):
    """A decoder accepted something that it promises to refuse."""


@dataclass(frozen=True)
class Message:
    """An honest message, and where in it lie codec messages with a checksum of their own."""

    body: bytes
    inner: tuple[tuple[int, int, int | None], ...] = ()
    """(start, end, where a 32-bit length lies that counts these bytes too, or None)."""
    tensors: Mapping[str, Tensor] | None = None
    """Of a payload."""


@dataclass(frozen=True)
class Kind:
    """One kind of message."""

    group: str
    make: Callable[[np.random.Generator], Message]
    read: Callable[[bytes], None]
    """Decode and check. Raises KilofedError: refused. BrokenPromise: it should have been."""


def promise(kept: bool, what: str) -> None:
    """Raise BrokenPromise unless `kept`."""
    if not kept:
        raise BrokenPromise(what)


def vector(rng: np.random.Generator, count: int) -> np.ndarray:
    """Numbers that compress, or do not."""
    values = rng.standard_t(5, size=count) * 10.0 ** rng.integers(-6, 4)
    return values * (rng.random(count) < rng.choice([0.05, 0.5, 1.0]))


def scalars(rng: np.random.Generator) -> Message:
    body = codec.encode_scalars(vector(rng, COUNT), bits=int(rng.integers(2, 17)))
    return Message(body, ((0, len(body), None),))


def floats(rng: np.random.Generator) -> Message:
    body = codec.encode_scalars(vector(rng, COUNT), bits=32)
    return Message(body, ((0, len(body), None),))


def read_scalars(body: bytes) -> None:
    values = codec.decode_scalars(body, count=COUNT)
    promise(values.shape == (COUNT,) and values.dtype == np.float64, "another shape or type")
    promise(bool(np.isfinite(values).all()), "a number that is not finite")
    if body[0] == codec.FLOATS:
        promise(codec.encode_scalars(values, bits=32) == body, "encodes to other bytes")


def delta(rng: np.random.Generator) -> Message:
    body = codec.advance(HELD, HELD.values + vector(rng, K), bits=int(rng.integers(2, 17)))[1]
    return Message(body, ((0, len(body), None),))


def state(rng: np.random.Generator) -> Message:
    body = codec.encode_state(codec.advance(HELD, HELD.values + vector(rng, K), bits=8)[0])
    return Message(body, ((0, len(body), None),))


def read_state(body: bytes, held: codec.State | None) -> None:
    found = codec.receive(held, body, count=K)
    promise(
        found.levels.shape == (K,) and bool((np.abs(found.levels) <= codec.MAX_LEVEL).all()), "levels out of range"
    )
    promise(bool(np.isfinite(found.values).all()), "a number that is not finite")
    again = codec.receive(None, codec.encode_state(found), count=K)
    promise(np.array_equal(again.values, found.values) and again.version == found.version, "encodes to another state")


def order(rng: np.random.Generator) -> Message:
    body = seed_log.encode_levels(rng.random(K) * (rng.random(K) < 0.5))
    return Message(body, ((0, len(body), None),))


def read_order(body: bytes) -> None:
    weights = POOLS.weights(body)
    if weights is None:
        promise(not body, "no weights from bytes")
        return
    promise(
        weights.shape == (K,) and int(weights.min()) >= 1000 and int(weights.max()) <= 2718, "weights out of range"
    )
    seeds = POOLS.pool(0, 0).sample(ROUND, 1, 8, weights=weights)
    promise(bool(((seeds >= 0) & (seeds < K)).all()), "a seed that is not in the pool")


def request(rng: np.random.Generator) -> Message:
    bodies = [
        state(rng).body,
        state(rng).body if rng.random() < 0.5 else codec.advance(codec.State.zeros(K), vector(rng, K))[1],
    ]
    levels = order(rng).body
    updates = tuple(enumerate(bodies))[: int(rng.integers(0, 3))]
    packed = seed_log.to_bytes(Request(1, rng.bytes(8), updates, levels).pack())
    inner, at = [], 11
    for _, body in updates:
        inner.append((at + 6, at + 6 + len(body), at + 2))
        at += 6 + len(body)
    return Message(packed, (*inner, (at, len(packed), None)))


def read_request(body: bytes) -> None:
    found = POOLS.request(seed_log.to_tensor(body), ROUND)
    promise(seed_log.to_bytes(found.pack()) == body, "encodes to other bytes")
    held: dict[str, Tensor] = {}
    POOLS.receive(held, found.updates)
    for index in range(found.pool + 1):
        values = POOLS.coefficients(held, index)
        promise(values.shape == (K,) and bool(np.isfinite(values).all()), "coefficients that are not finite")
    read_order(found.levels)


def made_report(rng: np.random.Generator) -> Report:
    gradients = np.clip(vector(rng, STEPS), -1e6, 1e6)
    skipped = tuple(sorted({int(step) for step in rng.integers(0, STEPS, int(rng.integers(0, 4)))}))
    gradients[list(skipped)] = 0
    return Report(int(rng.integers(1, 100)), float(rng.random()), skipped, gradients)


def report(rng: np.random.Generator) -> Message:
    one = made_report(rng)
    body = one.pack(int(rng.choice([4, 6, 16, 32])))
    return Message(body, ((10 + 2 * len(one.skipped), len(body), None),))


def read_report(body: bytes) -> None:
    found = POOLS.report(body)
    promise(found.gradients.shape == (STEPS,) and bool((np.abs(found.gradients) <= 1.000001e6).all()), "out of range")
    promise(found.weight > 0 and math.isfinite(found.loss), "no weight, or a loss that is not finite")
    promise(
        list(found.skipped) == sorted(set(found.skipped)) and not found.gradients[list(found.skipped)].any(), "skipped"
    )
    if body[10 + 2 * len(found.skipped)] == codec.FLOATS:
        promise(found.pack(32) == body, "encodes to other bytes")


def record(rng: np.random.Generator) -> Message:
    clients = sorted({int(client) for client in rng.integers(0, 50, 3)})
    reports = {client: report(rng) for client in clients}
    inner, at = [], 0
    for one in reports.values():
        at += 8
        ((start, end, _),) = one.inner
        inner.append((at + start, at + end, at - 4))
        at += len(one.body)
    return Message(seed_log.to_bytes(seed_log.pack_reports({c: one.body for c, one in reports.items()})), tuple(inner))


def read_record(body: bytes) -> None:
    replies = seed_log.unpack_reports(seed_log.to_tensor(body))
    promise(seed_log.to_bytes(seed_log.pack_reports(replies)) == body, "encodes to other bytes")
    limited = POOLS.limits(seed_log.to_tensor(body))
    promise(limited.keys() <= replies.keys(), "limits a client that sent nothing")


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip
SCALARS = {"weight": 41, "train_loss": 2.25, "@round": 3, "done": False, "why": 'näme "x"\n'}


def payload(rng: np.random.Generator) -> Message:
    tensors = {}
    for number in range(int(rng.integers(0, 5))):
        shape = rng.integers(0, 4, int(rng.integers(0, 4))).tolist()
        raw = torch.tensor(rng.standard_normal(shape) * 10)
        tensors[f"block.{number}.ü" if number == 3 else f"block.{number}.lora"] = raw.to(DTYPES[int(rng.integers(10))])
    chosen = dict(list(SCALARS.items())[: int(rng.integers(0, 6))])
    return Message(Payload(tensors, chosen).encode(), tensors=tensors)


def read_payload(body: bytes) -> None:
    try:
        found = Payload.decode(body)
    except PayloadError:
        # It looks at less, so it may accept a bool of 7; but it raises nothing else.
        with suppress(PayloadError):
            Payload.peek(body)
        raise
    promise(found.encode() == body, "encodes to other bytes")
    promise(Payload.peek(body) == found.scalars, "peek differs from decode")
    promise(all(not isinstance(v, float) or math.isfinite(v) for v in found.scalars.values()), "scalars not finite")
    for name, tensor in found.tensors.items():
        promise(tensor.numel() * tensor.element_size() <= len(body), f"{name} is longer than the message")


def logits(rng: np.random.Generator, wire: ensemble.Wire) -> Message:
    log_probs = torch.from_numpy(rng.standard_normal((POSITIONS, TOP + 1)) * 5).log_softmax(1)
    tokens = torch.from_numpy(rng.permuted(np.tile(np.arange(V), (POSITIONS, 1)), axis=1)[:, :TOP])
    tensors = {"log_probs": ensemble.encode(log_probs, wire), "words": tokens.to(torch.int16)}
    return Message(Payload(tensors, {"weight": 3, "train_loss": 1.5}).encode(), tensors=tensors)


def read_logits(body: bytes, wire: ensemble.Wire) -> None:
    sent = Payload.decode(body).tensors
    found = ensemble.read(sent.get("log_probs"), wire, (POSITIONS, TOP + 1))
    tokens = ensemble.read_tokens(sent.get("words"), (POSITIONS, TOP), V)
    promise(bool(found.isfinite().all()) and found.shape == (POSITIONS, TOP + 1), "scores that are not finite")
    promise(torch.equal(ensemble.encode(found, wire), sent["log_probs"]), "encodes to other bytes")
    promise(bool(((tokens >= 0) & (tokens < V)).all()), "a token that is not in the vocabulary")


def scores(rng: np.random.Generator, packing: losses.Packing) -> Message:
    teacher = losses.top_k(torch.from_numpy(rng.standard_normal((POSITIONS, V)) * 3).float(), TOP)
    tensors = losses.pack(teacher, packing)
    return Message(Payload(tensors).encode(), tensors=tensors)


def read_scores(body: bytes) -> None:
    found = losses.unpack(Payload.decode(body).tensors, V)
    mass = found.log_probs_NK.exp().sum(1) + found.rest_N.exp()
    promise(bool(((mass - 1).abs() < 1e-3).all()), "probabilities that do not sum to 1")
    promise(bool(((found.ids_NK >= 0) & (found.ids_NK < V)).all()), "a token that is not in the vocabulary")


def activations(rng: np.random.Generator, limits: BatchLimits) -> Message:
    lengths = torch.from_numpy(rng.integers(2, limits.length + 1, int(rng.integers(1, limits.num_rows + 1)))).int()
    rows = torch.from_numpy(rng.standard_normal((int(lengths.sum()), WIDTH))).float()
    tensors = {**activation_codec.encode(rows, limits.dtype)[0], "lengths": lengths}
    if limits.targets == "tokens":
        tensors["labels"] = torch.from_numpy(rng.integers(0, V, len(rows))).int()
    if limits.targets == "classes":
        tensors["classes"] = torch.from_numpy(rng.integers(0, V, len(lengths))).int()
    return Message(Payload(tensors, {"steps": 2}).encode(), tensors=tensors)


def read_activations(body: bytes, limits: BatchLimits) -> None:
    sent = Payload.decode(body).tensors
    found = server_half.decode_batch(sent, limits)
    rows, length = found.mask_BT.shape
    promise(rows <= limits.num_rows and length <= limits.length, "a batch beyond its limits")
    promise(found.hidden_BTD.shape == (rows, length, WIDTH), "hidden states of another shape")
    promise(bool(found.hidden_BTD.isfinite().all()), "hidden states that are not finite")
    if limits.dtype != "int8":
        back = activation_codec.unpad(found.hidden_BTD, found.mask_BT)
        promise(
            torch.equal(activation_codec.encode(back, limits.dtype)[0]["rows"], sent["rows"]), "encodes to other rows"
        )
    if found.batch is not None:
        targets = found.batch.labels if isinstance(found.batch, training.TokenBatch) else found.batch.classes
        promise(bool(((targets == -100) | ((targets >= 0) & (targets < V))).all()), "a target that does not exist")
        promise(found.batch.num_targets > 0, "no targets")


BATCHES = [
    LIMITS,
    replace(LIMITS, dtype="bfloat16", targets="none"),
    replace(LIMITS, dtype="int8"),
    replace(LIMITS, targets="classes"),
]
WIRES: list[ensemble.Wire] = ["float32", "float16", "int8"]
PACKINGS: list[losses.Packing] = ["float16", "int8"]
KINDS = [
    Kind("payload", payload, read_payload),
    Kind("scalars", scalars, read_scalars),
    Kind("floats", floats, read_scalars),
    Kind("delta", delta, partial(read_state, held=HELD)),
    Kind("state", state, partial(read_state, held=None)),
    Kind("request", request, read_request),
    Kind("report", report, read_report),
    Kind("record of a round", record, read_record),
    Kind("sampling levels", order, read_order),
    *(Kind("packed logits", partial(logits, wire=wire), partial(read_logits, wire=wire)) for wire in WIRES),
    *(Kind("teacher's scores", partial(scores, packing=one), read_scores) for one in PACKINGS),
    *(Kind("activations", partial(activations, limits=one), partial(read_activations, limits=one)) for one in BATCHES),
]


def corpus(kind: Kind, num: int = 48) -> list[Message]:
    """Honest messages of a kind, always the same."""
    rng = np.random.default_rng(0)
    return [kind.make(rng) for _ in range(num)]


def pick(rng: Random, messages: list[Message]) -> Message:
    """One of them."""
    return messages[int(rng.random() * len(messages))]
