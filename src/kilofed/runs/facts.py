"""What a run is before its first round: clients, bytes to come, what leaves them, where it runs; part of run.json."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from kilofed.costs import environment
from kilofed.errors import ModelError
from kilofed.federation.parties import Server
from kilofed.models import loading
from kilofed.payload import Payload
from kilofed.runs import plan
from kilofed.runs.preview import MOST, bench_of, num_looked_at, preview_of, replies, spans
from kilofed.runs.sites import Sites

log = logging.getLogger("kilofed")


def about(sites: Sites, server: Server) -> dict[str, object]:
    """Facts that are known once data and model are there; `server` is only read."""
    spec = sites.recipe.data
    column = spec.columns.label if sites.corpus.classes else spec.partition.column
    where = environment.describe(sites.recipe.model.device)
    return {
        "kilofed": where["kilofed"],
        "environment": where,
        "data_note": sites.corpus.rows.note,
        "layout": sites.corpus.layout,
        "clients": [
            {
                "id": number,
                "name": share.name,
                "train_rows": len(share.train),
                "test_rows": len(share.test),
                "labels": _counts([str(row.get(column, "")) for row in share.train]),
            }
            for number, share in enumerate(sites.corpus.shares)
        ],
        **_messages(sites),
        **_plan(sites),
        "classes": list(sites.corpus.classes),
        "num_trained": sum(p.numel() for p in loading.trained(server.model).values()),
        "num_parameters": sum(p.numel() for p in server.model.parameters()),
    }


def _messages(sites: Sites) -> dict[str, object]:
    """Bytes to come and what is in the replies, by action."""
    preview = preview_of(sites, bench_of(sites))
    contents = [{"action": action, **_shapes(some)} for action, some in replies(sites, preview).items()]
    looked = num_looked_at(sites.recipe, len(sites.client_ids()), MOST)
    found = spans(sites, preview, looked)
    return {
        "forecast": [
            {"action": action, **{what: [span.low, span.high] for what, span in by.items()}}
            for action, by in found.items()
        ],
        "leaves": contents,
    }


def _plan(sites: Sites) -> dict[str, object]:
    """What the run should take, where costs are counted; nothing where that cannot be told."""
    if not sites.recipe.evaluate.costs:
        return {}
    try:
        return {"plan": vars(plan.forecast(sites, _here(sites)))}
    except ModelError as error:
        log.warning("the run goes on without a forecast of its costs: %s", error)
        return {}


def _here(sites: Sites) -> plan.Device:
    """This machine, with as many clients in a process as the run puts there."""
    engine, num = sites.recipe.engine, len(sites.client_ids())
    together = {"inprocess": num, "pool": -(-num // engine.workers)}.get(engine.name, 1)
    return replace(plan.device(sites), together=together)


def _shapes(payloads: Sequence[Payload]) -> dict[str, object]:
    """What is in messages of one kind, without its values; a size that differs between them is -1."""
    tensors: dict[str, list[str | int]] = {}
    for payload in payloads:
        for name, tensor in sorted(payload.tensors.items()):
            own: list[str | int] = [str(tensor.dtype).removeprefix("torch."), *tensor.shape]
            before = tensors.setdefault(name, own)
            tensors[name] = [here if here == there else -1 for here, there in zip(own, before, strict=True)]
    return {"tensors": tensors, "scalars": sorted({name for payload in payloads for name in payload.scalars})}


def _counts(labels: list[str]) -> dict[str, int]:
    """How often each label occurs; empty when there is but one or too many to plot."""
    kinds = sorted(set(labels))
    return {kind: labels.count(kind) for kind in kinds} if 1 < len(kinds) <= 100 else {}
