"""What a run makes of a client that lies: every kind of hostile reply x every method x first, middle and last client.

Round 2 of a small real run is repeated; in it one client's reply is replaced, once under on_failure=skip and once under
stop. Wanted: under stop an error that names the client; under skip the client named among the failures and the server's
state equal, to the bit, to that of a round in which the client never answered. A reply that is right in all that can be
checked and a thousand times too large is taken (outliers=warn) but named. Anything else is a miss, and the script ends
with exit code 1: a traceback, another client thrown out, a reply averaged in without a word.

    python benchmarks/robustness/hostile.py [--quick] [--json] [--cases fedavg kd] > benchmarks/results/hostile.txt
"""

import argparse
import json
import logging
import os
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from torch import Tensor

import small_runs
from kilofed.engines.inprocess import InProcess
from kilofed.errors import ClientError
from kilofed.federation.address import ADDRESS
from kilofed.federation.cohort import ERROR, Cohort
from kilofed.federation.ledger import Ledger
from kilofed.federation.site import answering
from kilofed.payload import Payload, Scalar
from kilofed.runs.sites import Sites
from kilofed.zeroth import codec, seed_log
from kilofed.zeroth.seed_log import Report

Body = bytes | None
SILENCE = b"no answer at all"
REPORT_HEAD = 10
"""Bytes of a FedKSeed report before its gradients: weight, loss, number of skipped steps, of which there are none."""
Tampers = Callable[["Scene", bytes], Body]
"""What the client sends instead of the honest reply; None sends nothing."""


@dataclass
class Scene:
    """What a liar knows of its round."""

    client: int
    earlier: Mapping[int, bytes]
    """Each client's reply to the same exchange of round 1."""
    now: Mapping[int, bytes]
    """Each client's honest reply to this exchange."""
    steps: int


def tensors(change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> Tampers:
    """Lies about tensors."""

    def tamper(scene: Scene, body: bytes) -> bytes:
        reply = Payload.decode(body)
        return Payload(change(dict(reply.tensors)), reply.scalars).encode()

    return tamper


def scalars(change: Callable[[dict[str, Scalar]], Mapping[str, Scalar]]) -> Tampers:
    """Lies about scalars."""

    def tamper(scene: Scene, body: bytes) -> bytes:
        reply = Payload.decode(body)
        return Payload(reply.tensors, change(dict(reply.scalars))).encode()

    return tamper


def weight(value: Scalar) -> Tampers:
    """Another weight, also within a packed report; a text stands where only a number can be."""

    def tamper(scene: Scene, body: bytes) -> bytes:
        reply = Payload.decode(body)
        if "b" in reply.tensors:
            number = min(int(value), 2**32 - 1) if type(value) in (int, float) and value >= 0 else 0
            packed = struct.pack("<I", number) + seed_log.to_bytes(reply.tensors["b"])[4:]
            return Payload({"b": seed_log.to_tensor(packed)}, reply.scalars).encode()
        return Payload(reply.tensors, {**reply.scalars, "weight": value}).encode()

    return tamper


def numbers(change: Callable[[Tensor], Tensor]) -> Tampers:
    """Other numbers of the right names, dtypes and shapes, also within a packed report."""

    def tamper(scene: Scene, body: bytes) -> bytes:
        reply = Payload.decode(body)
        if "b" not in reply.tensors:
            changed = {
                name: change(tensor) if tensor.is_floating_point() else tensor
                for name, tensor in reply.tensors.items()
            }
            return Payload(changed, reply.scalars).encode()
        packed = seed_log.to_bytes(reply.tensors["b"])
        report = Report.unpack(packed, num_steps=scene.steps, max_gradient=np.inf)
        gradients = change(torch.from_numpy(report.gradients)).numpy().astype("<f4")
        floats = bytes([codec.FLOATS]) + scene.steps.to_bytes(3, "little") + gradients.tobytes()
        lie = packed[:REPORT_HEAD] + floats + struct.pack("<I", zlib.crc32(floats))
        return Payload({"b": seed_log.to_tensor(lie)}, reply.scalars).encode()

    return tamper


def first(named: dict[str, Tensor]) -> str:
    """Name of the largest tensor."""
    return max(named, key=lambda name: named[name].numel())


def swap(body: bytes) -> bytes:
    """The offsets of two tensors of one dtype and size exchanged in the header, or of the first and the scalars."""
    size = int.from_bytes(body[:8], "little")
    table = json.loads(body[8 : 8 + size])
    names = sorted(table)
    one, other = next(
        (
            (a, b)
            for a in names
            for b in names
            if a < b and table[a]["dtype"] == table[b]["dtype"] and table[a]["shape"] == table[b]["shape"]
        ),
        (names[0], names[-1]),
    )
    table[one]["data_offsets"], table[other]["data_offsets"] = table[other]["data_offsets"], table[one]["data_offsets"]
    text = json.dumps(table, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + body[8 + size :]


def header(shape: list[int]) -> bytes:
    """A payload whose header claims a tensor of this shape."""
    table = {"@": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}
    table["x"] = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    text = json.dumps(table, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + b"{}"


def says(kind: str) -> Tampers:
    """The client claims that it failed."""
    return lambda scene, body: Payload(
        scalars={ERROR: f"{kind}: the run must end", ADDRESS: Payload.decode(body).scalars[ADDRESS]}
    ).encode()


def raises(scene: Scene, body: bytes) -> bytes:
    """An error that is not kilofed's, in the client's own code."""
    raise RuntimeError("something broke at the client")


KINDS: dict[str, Tampers] = {
    "one tensor more": tensors(lambda t: {**t, "more": torch.ones(3)}),
    "one tensor less": tensors(lambda t: {name: one for name, one in t.items() if name != first(t)}),
    "no tensor": tensors(lambda t: {}),
    "a tensor under another name": tensors(lambda t: {("z" if n == first(t) else n): one for n, one in t.items()}),
    "one element more": tensors(
        lambda t: {**t, first(t): torch.cat([t[first(t)].reshape(-1), t[first(t)].reshape(-1)[:1]])}
    ),
    "float64": tensors(lambda t: {**t, first(t): t[first(t)].double()}),
    "a hundred times as many elements": tensors(
        lambda t: {**t, first(t): t[first(t)].repeat(100, *[1] * (t[first(t)].dim() - 1))}
    ),
    "NaN": numbers(lambda one: torch.full_like(one, torch.nan)),
    "one infinity": numbers(
        lambda one: one.reshape(-1).index_fill(0, torch.tensor([0]), torch.inf).reshape(one.shape)
    ),
    "weight 1e9": weight(1e9),
    "weight 1e308": weight(1e308),
    "weight -1": weight(-1),
    "weight 'abc'": weight("abc"),
    "weight true": weight(True),
    "no scalars": scalars(lambda s: {name: value for name, value in s.items() if name.startswith("@")}),
    "a scalar more": scalars(lambda s: {**s, "round": 7}),
    "values times 1,000": numbers(lambda one: one * 1000),
    "the reply of round 1 again": lambda scene, body: scene.earlier[scene.client],
    "another client's reply": lambda scene, body: next(b for c, b in sorted(scene.now.items()) if c != scene.client),
    "no address": scalars(lambda s: {name: value for name, value in s.items() if name != ADDRESS}),
    "it says PrivacyError": says("PrivacyError"),
    "it says WrongWeights": says("WrongWeights"),
    "an error in its code": raises,
    "no answer": lambda scene, body: None,
    "nothing": lambda scene, body: b"",
    "cut in the middle": lambda scene, body: body[: len(body) // 2],
    "noise": lambda scene, body: np.random.default_rng(0).bytes(len(body)),
    "swapped offsets": lambda scene, body: swap(body),
    "shape [0, 2^62, 2^62]": lambda scene, body: header([0, 2**62, 2**62]),
    "a number of no digits": lambda scene, body: body.replace(b'"@":"i', b'"@":"i"', 1)[: len(body)],
    "20 MB of zeros": lambda scene, body: body + bytes(20_000_000),
}
LARGE = "values times 1,000"
"""Right in all that can be checked: taken, and named."""


class Liar(InProcess):
    """One client's first reply that a lie fits is replaced; later ones are honest."""

    def __init__(self, federation: "Federation", client: int, kind: str, tamper: Tampers) -> None:
        super().__init__(federation.ids, federation.sites.handle)
        self._federation, self._client, self._kind, self._tamper = federation, client, kind, tamper
        self.lied = False

    def exchange(self, asks: Mapping[int, bytes]) -> Iterator[tuple[int, bytes]]:
        now = dict(super().exchange(asks))
        fits = not self._kind.startswith("weight") or self._weighs(now.get(self._client))
        for client, body in now.items():
            if client != self._client or self.lied or not fits:
                yield client, body
                continue
            sent = self._lie(client, asks[client], now)
            self.lied = sent != body
            if sent != SILENCE:
                yield client, sent

    def _lie(self, client: int, ask: bytes, now: Mapping[int, bytes]) -> bytes:
        scene = Scene(client, self._federation.earlier, now, self._federation.steps)

        def handler(client: int, ask: bytes) -> bytes:
            sent = self._tamper(scene, now[client])
            return SILENCE if sent is None else sent

        return answering(handler, self._federation.sites.policy)(client, ask)

    @staticmethod
    def _weighs(body: bytes | None) -> bool:
        reply = Payload.decode(body) if body else Payload()
        return "weight" in reply.scalars or "b" in reply.tensors


class Federation:
    """A method after one round, whose second can be repeated."""

    def __init__(self, folder: Path, case: str) -> None:
        self.case = case
        self.sites = Sites(small_runs.recipe(folder, case, on_failure="skip"))
        self.ids = self.sites.client_ids()
        self.steps = int(small_runs.CASES[case][1].get("steps", 0))  # type: ignore[arg-type]
        self.server = self.sites.server()
        self.sites.method.setup(self.server)
        self.earlier: dict[int, bytes] = {}
        self.stop = Sites(small_runs.recipe(folder, case, on_failure="stop"))
        recorder = _Recorder(self)
        self._round(1, recorder, self.sites)
        self.state = {name: tensor.clone() for name, tensor in self.server.state.items()}

    def repeat(self, engine: InProcess, *, skip: bool) -> tuple[bytes, Cohort]:
        """Round 2 once more; the server's state after it."""
        self.server.state = {name: tensor.clone() for name, tensor in self.state.items()}
        cohort = self._round(2, engine, self.sites if skip else self.stop)
        return Payload(self.server.state).encode(), cohort

    def _round(self, number: int, engine: InProcess, sites: Sites) -> Cohort:
        self.server.round = number
        cohort = sites.cohort(self.ids, engine, Ledger(), round=number)
        self.sites.method.round(self.server, cohort)
        return cohort


class _Recorder(InProcess):
    """Keeps the first reply of each client."""

    def __init__(self, federation: Federation) -> None:
        super().__init__(federation.ids, federation.sites.handle)
        self._kept = federation.earlier

    def exchange(self, asks: Mapping[int, bytes]) -> Iterator[tuple[int, bytes]]:
        for client, body in super().exchange(asks):
            self._kept.setdefault(client, body)
            yield client, body


def judge(federation: Federation, kind: str, client: int, without: Mapping[tuple[int, bool], bytes]) -> list[str]:
    """What is wrong with how one lie ends; nothing if all is as wanted."""
    wrong, weighs = [], kind.startswith("weight")
    engine = Liar(federation, client, kind, KINDS[kind])
    try:
        state, cohort = federation.repeat(engine, skip=True)
    except Exception as error:
        return [f"skip ends with {type(error).__name__}: {error}"[:160]]
    if not engine.lied:
        return []  # The method sends nothing that this lie is about.
    if kind == LARGE and federation.case not in SCALED_IS_REFUSED:
        named = client in cohort.outliers
        return [] if named and not cohort.failures else [f"outliers {cohort.outliers}, failures {cohort.failures}"]
    if list(cohort.failures) != [client]:
        wrong.append(f"failures are {cohort.failures}")
    if state != without[client, weighs]:
        wrong.append("the state differs from that without the client")
    try:
        federation.repeat(Liar(federation, client, kind, KINDS[kind]), skip=False)
        wrong.append("stop does not stop")
    except ClientError as error:
        if f"client {client}:" not in str(error):
            wrong.append(f"stop does not name it: {error}")
    except Exception as error:
        wrong.append(f"stop ends with {type(error).__name__}: {error}"[:160])
    return wrong


SCALED_IS_REFUSED = {"kd", "kd counts"}
"""A thousand times too large is no log-probability."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fedavg, fedkseed and kd, the middle client")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--cases", nargs="*", choices=list(small_runs.CASES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("kilofed").setLevel(logging.CRITICAL)
    cases = options.cases or (["fedavg", "fedkseed", "kd"] if options.quick else list(small_runs.CASES))
    began, tried = time.monotonic(), Counter[str]()
    misses: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small_runs.make(folder)
        for case in cases:
            federation = Federation(folder, case)
            clients = federation.ids[1:2] if options.quick else federation.ids
            without = {
                (client, weighs): federation.repeat(
                    Liar(federation, client, "weight" if weighs else "no answer", KINDS["no answer"]), skip=True
                )[0]
                for client in clients
                for weighs in (False, True)
            }
            for kind in KINDS:
                for client in clients:
                    tried[case] += 1
                    if wrong := judge(federation, kind, client, without):
                        misses.append({"case": case, "kind": kind, "client": client, "wrong": wrong})
            print(f"{case}: {tried[case]} lies, {sum(m['case'] == case for m in misses)} misses", file=sys.stderr)
    if options.json:
        print(json.dumps({"tried": dict(tried), "misses": misses}))
    else:
        print(
            f"{sum(tried.values())} lies of {len(KINDS)} kinds under skip and stop, {time.monotonic() - began:.0f} s"
        )
        for case, num in tried.items():
            print(f"{case:20} {num:5} lies {sum(m['case'] == case for m in misses):5} misses")
        for miss in misses:
            print(f"MISS {miss['case']}, {miss['kind']}, client {miss['client']}: {'; '.join(miss['wrong'])}")  # type: ignore[arg-type]
        print("Kinds:", "; ".join(KINDS))
    sys.exit(bool(misses))


if __name__ == "__main__":
    main()
