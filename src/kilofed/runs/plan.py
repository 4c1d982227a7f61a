"""What a run would take, told before it is run: bytes, memory, operations and seconds, for a stated device and link.

Nothing is trained and no large model is loaded: bytes come from the messages that a method would send, operations and
activations from its batches on a model that has shapes and no numbers (`kilofed.costs.counter`).
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kilofed.config.fields import Value
from kilofed.config.recipe import Recipe
from kilofed.costs import counter, environment
from kilofed.costs.counter import CostCounter
from kilofed.errors import KilofedError
from kilofed.federation.method import Sent, find_method
from kilofed.federation.workload import RunPreview
from kilofed.records.facts import Forecast
from kilofed.runs import compare
from kilofed.runs.preview import (
    bench_of,
    client_memory,
    client_works,
    preview_of,
    rounds,
    traffic,
)
from kilofed.runs.sites import Sites
from kilofed.units import count, duration, operations, size

FAMILIES = "fedavg,full=fedavg,kd,split,fedpt,fedkseed"
"""One method of each family."""
OWN: dict[str, Value] = {"full:adapter.kind": "full"}
TITLES = ("up", "down", "exchanges", "client compute", "client memory", "server compute", "computing", "link", "fits")


@dataclass(frozen=True)
class Device:
    """One client's machine and link, and the server's speed."""

    flops: float
    """Operations per second that it reaches in training, not its peak."""
    memory: float
    """Bytes that a client's process may take."""
    up: float = 20e6
    """Bits per second from the client."""
    down: float = 100e6
    """Bits per second to the client."""
    latency: float = 0.03
    """Seconds from asking to being answered, beside the bytes."""
    server_flops: float = 0.0
    """Operations per second that the server reaches; 0 takes the client's."""
    runtime: float = 0.0
    """Bytes of a client's process before it holds a model."""
    together: int = 1
    """Clients in one process, as in a simulation."""

    @property
    def serving(self) -> float:
        """Operations per second of the server."""
        return self.server_flops or self.flops


def plan(recipes: Mapping[str, Recipe], device: Device) -> list[Forecast]:
    """A forecast per recipe, by label; one that could not run, or not on this device, says why."""
    found = []
    benches: dict[object, CostCounter] = {}
    for label, recipe in recipes.items():
        try:
            sites = Sites(recipe)
            bench = benches.setdefault((recipe.adapter, recipe.train, sites.corpus.classes), bench_of(sites))
            one = forecast(sites, device, bench=bench, label=label)
        except KilofedError as error:
            sentence = " ".join(str(error).split())
            one = Forecast(label, recipe.method.name, find_method(recipe.method.name).sends, refused=sentence)
        if one.client_memory and one.client_memory > device.memory:
            why = f"a client needs {size(one.client_memory)} of memory, the device has {size(device.memory)}"
            one = replace(one, refused=why)
        found.append(one)
    return found


def forecast(sites: Sites, device: Device, *, bench: CostCounter | None = None, label: str = "") -> Forecast:
    """What the run of `sites` would take.

    Args:
        sites: their rows are read and tokenised, their models are not loaded.
        bench: one for the same adapter, training and classes, which may know some passes already.

    Raises:
        KilofedError: it could not run.
    """
    recipe, bench = sites.recipe, bench or bench_of(sites)
    preview = preview_of(sites, bench)
    sites.method.check(preview.server)
    ids = sites.client_ids()
    costs = [_Round.of(sites, preview, bench, number, device.together) for number in rounds(sites, preview)]
    first, times = costs[0], recipe.rounds / len(costs)
    memory = next((one.memory for one in costs if one.memory), None)
    told = all(one.sent is not None for one in costs)
    known = all(one.flops is not None and one.server_flops is not None for one in costs)
    messages = [message for one in costs for mine in (one.sent or {}).values() for message in mine]
    return Forecast(
        label or recipe.name,
        recipe.method.name,
        type(sites.method).sends,
        exact=type(sites.method).exact_bytes and len(costs) == recipe.rounds,
        up=times * sum(one.up for one in messages) / len(ids) if told else None,
        down=times * sum(one.down for one in messages) / len(ids) if told else None,
        exchanges=round(times * sum(one.exchanges for one in costs)) if told else None,
        client_flops=statistics.fmean(first.flops.values()) if first.flops else None,
        server_flops=first.server_flops,
        client_memory=device.runtime + memory if memory else None,
        compute_seconds=times * sum(one.compute_seconds(device) for one in costs) if known else None,
        link_seconds=times * sum(one.link_seconds(device) for one in costs) if told else None,
    )


@dataclass(frozen=True)
class _Round:
    """One round's costs; None where nobody can tell."""

    sent: Mapping[int, Sequence[Sent]] | None
    """By client."""
    flops: Mapping[int, float] | None
    """Operations, by client."""
    server_flops: float | None
    memory: float | None
    """Bytes in addition to the runtime, the largest client; of the second round, the first with all kinds of messages."""

    @classmethod
    def of(cls, sites: Sites, preview: RunPreview, bench: CostCounter, number: int, together: int) -> "_Round":
        sent, works = traffic(sites, preview), client_works(sites, preview)
        flops = {
            client: bench.operations(work.passes, spec)
            for spec, mine in works.items()
            for client, work in mine.items()
        }
        known = len(flops) == len(preview.ids)
        memory = None
        if known and number == min(2, sites.recipe.rounds):
            memory = client_memory(bench, works, sent, together=together)
        served = sites.method.costs().server(preview)
        return cls(
            sent or None,
            flops if known else None,
            None if served is None else bench.operations(served.passes, sites.recipe.model),
            memory,
        )

    @property
    def exchanges(self) -> int:
        """Times that the server waits for clients."""
        return max(sum(one.exchanges for one in mine) for mine in (self.sent or {}).values())

    def compute_seconds(self, device: Device) -> float:
        """Clients side by side, then the server."""
        slowest = max((self.flops or {}).values(), default=0.0) / device.flops
        return slowest + (self.server_flops or 0.0) / device.serving

    def link_seconds(self, device: Device) -> float:
        """Of the client with most to send and receive."""
        return max(
            sum(8 * one.up / device.up + 8 * one.down / device.down + one.exchanges * device.latency for one in mine)
            for mine in (self.sent or {}).values()
        )


def device(sites: Sites, **stated: float | None) -> Device:
    """A device as stated, by the fields of `Device`; of what is not stated or None, this machine's, as measured here.

    Args:
        sites: whose rows a client's process has in memory; before their models are loaded.
    """
    sites.corpus.tokenize()
    found = counter.measure()
    here = Device(found.flops, environment.free_memory(torch.device("cpu")), runtime=found.runtime)
    given = {name: value for name, value in stated.items() if value is not None}
    return replace(here, **given)  # type: ignore[arg-type]


def recipes(source: str | Path, names: str, words: Mapping[str, Value]) -> dict[str, Recipe]:
    """The recipes of the methods `names`, by label, as `kilofed compare` would run them. Raises RecipeError.

    Args:
        names: such as fedavg,full=fedavg; empty takes one of each family.
    """
    chosen, common = compare.entries(names or FAMILIES, {**({} if names else OWN), **words})
    return compare.recipes(source, chosen, common, 1)


def text(found: Sequence[Forecast], device: Device) -> str:
    """The forecasts as a plain table, and a sentence on each method that does not fit."""
    lines = [["", *TITLES], *([one.label, *cells(one)] for one in found)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    told = ["  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    link = f"{device.up / 1e6:g} Mbit/s up, {device.down / 1e6:g} Mbit/s down, {1000 * device.latency:g} ms"
    client = f"a client: {operations(device.flops)}/s, {size(device.memory)} of memory, {link}"
    told += [
        "",
        "Bytes per client, exchanges and seconds are of the whole run, compute is of its first round.",
        f"For {client}; the server: {operations(device.serving)}/s.",
    ]
    if any(not one.exact and one.up for one in found):
        told.append("~: close, not exact; it depends on what training finds, or later rounds were not looked at.")
    told += [f"{one.label} does not fit: {one.refused}" for one in found if one.refused]
    return "\n".join(told)


def cells(one: Forecast) -> list[str]:
    """A line of the table."""
    about = "" if one.exact or one.up is None else "~"
    return [
        about + size(one.up),
        about + size(one.down),
        count(one.exchanges),
        operations(one.client_flops),
        size(one.client_memory),
        operations(one.server_flops),
        duration(one.compute_seconds),
        duration(one.link_seconds),
        "no" if one.refused else "yes",
    ]
