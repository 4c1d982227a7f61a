"""What a run is before its first round: clients, bytes to come, what leaves them, where it runs; part of run.json."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from kilofed.costs import environment
from kilofed.data.partition import Share
from kilofed.errors import ModelError
from kilofed.federation.parties import Server
from kilofed.models import loading
from kilofed.payload import Payload
from kilofed.records.facts import VARIES, ClientFacts, Forecast, ReplyFacts, RunFacts, TensorFacts
from kilofed.runs import plan
from kilofed.runs.preview import bench_of, num_processes, preview_of, replies, spans
from kilofed.runs.sites import Sites

log = logging.getLogger("kilofed")


def facts(sites: Sites, server: Server, began: RunFacts) -> RunFacts:
    """What `began` lacks until data and model are there; `server` is only read."""
    spec = sites.recipe.data
    column = spec.columns.label if sites.corpus.classes else spec.partition.column
    where = environment.describe(sites.recipe.model.device)
    preview = preview_of(sites, bench_of(sites))
    contents = tuple(_content(action, some) for action, some in replies(sites, preview).items())
    return replace(
        began,
        kilofed=where["kilofed"],
        environment=where,
        data_note=sites.corpus.rows.note,
        layout=sites.corpus.layout,
        clients=tuple(_client(number, share, column) for number, share in enumerate(sites.corpus.shares)),
        classes=tuple(sites.corpus.classes),
        forecast=spans(sites, preview),
        leaves=contents,
        plan=_plan(sites),
        num_trained=sum(p.numel() for p in loading.trained(server.model).values()),
        num_parameters=sum(p.numel() for p in server.model.parameters()),
    )


def _client(number: int, share: Share, column: str) -> ClientFacts:
    labels = _counts([str(row.get(column, "")) for row in share.train])
    return ClientFacts(number, share.name, len(share.train), len(share.test), labels)


def _plan(sites: Sites) -> Forecast | None:
    """What the run should take, where costs are counted; None where that cannot be told."""
    if not sites.recipe.evaluate.costs:
        return None
    try:
        return plan.forecast(sites, _here(sites))
    except ModelError as error:
        log.warning("the run goes on without a forecast of its costs: %s", error)
        return None


def _here(sites: Sites) -> plan.Device:
    """This machine, with as many clients in a process as the run puts there."""
    num = len(sites.client_ids())
    return replace(plan.device(sites), together=-(-num // num_processes(sites.recipe.engine, num)))


def _content(action: str, payloads: Sequence[Payload]) -> ReplyFacts:
    """What is in the replies to one action, without its values."""
    tensors: dict[str, TensorFacts] = {}
    for payload in payloads:
        for name, tensor in sorted(payload.tensors.items()):
            own = tuple(tensor.shape)
            before = tensors[name].shape if name in tensors else own
            shape = tuple(here if here == there else VARIES for here, there in zip(own, before, strict=True))
            tensors[name] = TensorFacts(str(tensor.dtype).removeprefix("torch."), shape)
    return ReplyFacts(action, tensors, tuple(sorted({name for payload in payloads for name in payload.scalars})))


def _counts(labels: list[str]) -> dict[str, int]:
    """How often each label occurs; empty when there is but one or too many to plot."""
    kinds = sorted(set(labels))
    return {kind: labels.count(kind) for kind in kinds} if 1 < len(kinds) <= 100 else {}
