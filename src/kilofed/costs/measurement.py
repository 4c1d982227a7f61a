"""Measured costs: floating-point operations by torch's counter, seconds, and the process's peak memory.

Matrix products, convolutions and attention are counted, forward and backward, two operations per multiplication and
addition; element-wise operations and the rebuild of seed-pool weights are not, as is usual.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from kilofed.costs import environment
from kilofed.errors import RunError
from kilofed.federation.address import Address
from kilofed.federation.site import Site
from kilofed.files import replace_file, said
from kilofed.payload import Payload
from kilofed.records import codec
from kilofed.records.results import Costs, PartyCost

FILE = "cost.json"
SERVER = "server-cost.json"
Shape = tuple[int, ...]


def _attention(query: Shape, key: Shape, value: Shape, *_: object, out_shape: object = None, **__: object) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward(
    grad: Shape, query: Shape, key: Shape, value: Shape, *_: object, out_shape: object = None, **__: object
) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))  # type: ignore[no-untyped-call]


# torch counts attention on GPUs only.
_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


@dataclass
class Cost:
    """Costs of one party in the first round."""

    flops: int = 0
    seconds: float = 0.0
    num_messages: int = 0
    peak_memory_bytes: int = 0
    """Peak resident set size of the process: at a client in the second round, else so far."""

    def add(self, other: "Cost") -> None:
        """Add the costs of another message."""
        self.flops += other.flops
        self.seconds += other.seconds
        self.num_messages += other.num_messages
        self.peak_memory_bytes = max(self.peak_memory_bytes, other.peak_memory_bytes)


@contextmanager
def counted() -> Iterator[Cost]:
    """Count the cost of the block, available after it.

    Small operations are slower inside, and last bits may differ: torch decomposes some operations to count them.
    """
    cost, began = Cost(num_messages=1), time.perf_counter()
    with FlopCounterMode(display=False, custom_mapping=_ON_CPU) as counter:
        yield cost
    cost.flops = counter.get_total_flops()
    cost.seconds = time.perf_counter() - began
    cost.peak_memory_bytes = environment.own_peak_memory()


class MeasuredSites:
    """A message handler for engines that passes messages to sites and records the costs of their replies.

    Operations are counted in round 1; counting takes memory, so memory is measured in round 2.

    Args:
        site_of: the site of a client id. Creating one may load a model, which does not count.
        folder: of the run, with one folder per client.
    """

    def __init__(self, site_of: Callable[[int], Site], folder: Path) -> None:
        self._site_of, self._folder = site_of, folder
        self.spent: dict[int, Cost] = {}
        """Costs of the clients of this process in the first round."""
        self._peak_was_reset = False
        self._run = ""

    def handle(self, number: int, body: bytes) -> bytes:
        """The reply of client `number` to `body`. Raises PayloadError: it is not a message for a client."""
        site, address = self._site_of(number), Address.of(Payload.peek(body))
        round, self._run = address.round, address.run
        if round == 1:
            with counted() as cost:
                reply = site.handle(body)
            self.spent.setdefault(number, Cost()).add(cost)
            self._write(number)
            return reply
        self._peak_was_reset = self._peak_was_reset or environment.reset_peak_memory()
        reply = site.handle(body)
        if round == 2 and self._peak_was_reset and number in self.spent:
            self.spent[number].peak_memory_bytes = environment.own_peak_memory()
            self._write(number)
        return reply

    def _write(self, number: int) -> None:
        write(self._folder / str(number) / FILE, self.spent[number], self._run)


@dataclass(frozen=True)
class _Kept:
    """A file with the costs of one party."""

    __pydantic_config__ = codec.STRICT

    flops: int
    seconds: float
    num_messages: int
    peak_memory_bytes: int
    run: str
    sha256: str = ""


def write(path: Path, cost: Cost, run: str) -> None:
    """Write `cost`, of the run of that identity, to the file `path`; creates its folder. Raises RunError."""
    with said(f"cannot make {path.parent}"):
        path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(codec.to_json(_Kept(**asdict(cost), run=run))).encode())


def read(folder: Path, run: str) -> Costs | None:
    """Costs of clients and server in the first round of the run in `folder`; None if not measured.

    Figures of `client` are means over clients; its memory is the maximum over clients.

    Args:
        run: the run's identity.

    Raises:
        RunError: a file is damaged, or is of another run; by its name.
    """
    clients = [_read(path, run) for path in sorted((folder / "clients").glob(f"*/{FILE}"))]
    if not clients or not (folder / SERVER).exists():
        return None
    mean = PartyCost(
        flops=fmean(cost.flops for cost in clients),
        seconds=fmean(cost.seconds for cost in clients),
        num_messages=fmean(cost.num_messages for cost in clients),
        peak_memory_bytes=max(cost.peak_memory_bytes for cost in clients),
    )
    server = _read(folder / SERVER, run)
    return Costs(mean, PartyCost(server.flops, server.seconds, server.num_messages, server.peak_memory_bytes))


def _read(path: Path, run: str) -> _Kept:
    found = codec.from_file(_Kept, path)
    if found.run != run:
        raise RunError(f"{path} is of another run: put a copy of it back, or run the recipe anew")
    return found
