"""Rounds of a run that has not begun: who takes part, what is sent, what is computed, what is held in memory.

Models have shapes and no numbers, so nothing large is loaded; `check`, `plan` and the report all read these forecasts.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from kilofed.config.recipe import EngineSpec, ModelSpec, Recipe
from kilofed.costs.counter import CostCounter
from kilofed.data.examples import Example
from kilofed.federation.method import Sent, forecast, leaving
from kilofed.federation.workload import Pass, RunPreview, Work
from kilofed.models import loading
from kilofed.payload import Payload
from kilofed.records.facts import ActionForecast
from kilofed.runs.sites import Sites, drawn

COPIES = 7
"""Copies of a message that a client has at most: what came, from the pipe and decoded, and the reply, put together."""
MOST = 2000
"""Clients, counted anew in each round, that are looked at one by one; the rounds after them are taken to be like these."""


def bench_of(sites: Sites) -> CostCounter:
    """What counts the passes of the run of `sites`."""
    return CostCounter(sites.recipe.adapter, sites.recipe.train, sites.corpus.classes)


def preview_of(sites: Sites, bench: CostCounter) -> RunPreview:
    """The first round of the run of `sites`. Raises KilofedError."""
    recipe, method = sites.recipe, sites.method
    server = sites.server(model_of=bench.outline)
    server.state.update(loading.read_trained(server.model))

    def rows_of(client: int) -> list[Example]:
        return sites.corpus.train_examples(client, method.client_model(recipe, client))

    preview = RunPreview(recipe, server, rows_of, sites.corpus.public_examples)
    turn_to(preview, sites, 1)
    return preview


def turn_to(preview: RunPreview, sites: Sites, number: int) -> None:
    """Look at round `number`, and at who is drawn for it."""
    preview.round, preview.ids = number, drawn(sites.client_ids(), sites.recipe, number)


def rounds(sites: Sites, preview: RunPreview) -> Iterator[int]:
    """Turn to each of the first rounds and yield its number, until about MOST clients were looked at; at least two."""
    recipe = sites.recipe
    looked_at = max(2, MOST // (recipe.cohort or len(sites.client_ids())))
    for number in range(1, min(recipe.rounds, looked_at) + 1):
        turn_to(preview, sites, number)
        yield number


def num_processes(engine: EngineSpec, num_clients: int) -> int:
    """Processes that hold clients; the one of `inprocess` is the server's too."""
    return {"inprocess": 1, "stream": num_clients}.get(engine.name, min(engine.workers, num_clients))


def traffic(sites: Sites, preview: RunPreview) -> dict[int, list[Sent]]:
    """Bytes of the round in `preview`, by client; empty where nobody can tell."""
    return forecast(sites.method, preview, sites.policy)


def client_works(sites: Sites, preview: RunPreview) -> dict[ModelSpec, dict[int, Work]]:
    """What each client of the round computes, by its model; clients of which nobody can tell are left out."""
    method, recipe = sites.method, sites.recipe
    costs = method.costs()
    works: dict[ModelSpec, dict[int, Work]] = defaultdict(dict)
    for client in preview.ids:
        if (work := costs.client(preview, client)) is not None:
            works[method.client_model(recipe, client) or recipe.model][client] = work
    return works


def client_memory(
    bench: CostCounter,
    works: Mapping[ModelSpec, Mapping[int, Work]],
    sent: Mapping[int, Sequence[Sent]],
    *,
    together: int = 1,
) -> int:
    """Bytes of the largest process of clients, beside what it takes without a model.

    Args:
        works: of the second round, the first in which all is done.
        sent: of the same round.
        together: clients in the process.
    """
    longest = max((max(m.up, m.down) // m.exchanges for mine in sent.values() for m in mine), default=0)
    return max(
        bench.memory(list(mine.values()), spec, messages=COPIES * longest, together=together)
        for spec, mine in works.items()
    )


def run_memory(sites: Sites, preview: RunPreview, bench: CostCounter) -> int | None:
    """Bytes that the whole run takes on this machine, beside the libraries; None where nobody can tell.

    Clients and server of one process share the model's weights; worker processes have their own; local-only and
    centralized training start from a second copy. Scoring takes the activations of one batch of held-out rows.
    """
    recipe = sites.recipe
    turn_to(preview, sites, min(2, recipe.rounds))
    works = client_works(sites, preview)
    if sum(map(len, works.values())) < len(preview.ids):
        return None
    num = num_processes(recipe.engine, len(sites.client_ids()))
    clients = client_memory(bench, works, traffic(sites, preview), together=-(-len(preview.ids) // num))
    weights = bench.weight_bytes(recipe.model)
    server = weights + bench.activations([_scored(recipe, preview)], recipe.model)
    copy = weights if {"local", "centralized"} & set(recipe.evaluate.baselines) else 0
    return (max(clients, server) if recipe.engine.name == "inprocess" else num * clients + server) + copy


def _scored(recipe: Recipe, preview: RunPreview) -> Pass:
    """A batch of the longest rows, scored."""
    longest = max((len(row.input_ids) for client in preview.ids for row in preview.rows_of(client)), default=1)
    rows = recipe.evaluate.batch_size
    return Pass(rows, longest, 0 if recipe.data.task == "classify" or recipe.data.labels else longest)


def spans(sites: Sites, preview: RunPreview) -> tuple[ActionForecast, ...]:
    """Bytes and exchanges per client and round, by action, over the first rounds; empty if unknown."""
    seen: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for _ in rounds(sites, preview):
        for messages in {id(mine): mine for mine in traffic(sites, preview).values()}.values():
            for action in {one.action for one in messages}:
                own = [one for one in messages if one.action == action]
                seen[action].append(
                    (sum(one.down for one in own), sum(one.up for one in own), sum(one.exchanges for one in own))
                )
    return tuple(
        ActionForecast(action, *((min(some), max(some)) for some in zip(*seen[action], strict=True)))
        for action in sorted(seen)
    )


def replies(sites: Sites, preview: RunPreview) -> dict[str, list[Payload]]:
    """What leaves the clients of the round in `preview`, numbers made up, by action."""
    found: dict[str, list[Payload]] = defaultdict(list)
    for messages in {id(mine): mine for mine in sites.method.messages(preview).values()}.values():
        for message in messages:
            found[message.action].append(leaving(sites.method, message, sites.policy))
    return found
