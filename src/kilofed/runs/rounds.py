"""The rounds of a run: sample clients, run a round of the method, evaluate, commit.

A run folder is written in this order in each round: ledger rows, a line of metrics, then the server's state. The rename
of the state is the commit: whatever lies in the other files beyond its round is cut off when the run goes on, and what
lies before it must be what it was.
"""

import json
import statistics
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path

from torch import nn

from kilofed.config.tables import to_table
from kilofed.costs import measurement
from kilofed.engines import open_engine
from kilofed.federation.cohort import Cohort
from kilofed.federation.parties import Server
from kilofed.federation.site import answering
from kilofed.models import evaluation
from kilofed.privacy.mechanisms import Mechanism
from kilofed.runs.folder import recipe_digest
from kilofed.runs.journal import Journal
from kilofed.runs.resuming import checked
from kilofed.runs.sites import Sites, drawn


def run_rounds(
    sites: Sites, server: Server, policy: Mechanism, folder: Path
) -> Generator[tuple[int, Mapping[str, object]]]:
    """Run the rounds that are left, and yield the number and the metrics of each once it is on the disk.

    Close the generator if you leave it early: it holds the engine.

    Raises:
        KilofedError: a round failed; the state of the round before it is kept.
    """
    recipe, method = sites.recipe, sites.method
    clients = measurement.MeasuredSites(sites.site, folder / "clients")
    handle = answering(clients.handle if recipe.evaluate.costs else sites.handle, sites.policy)
    text = json.dumps(to_table(recipe))
    with (
        closing(_begin(sites, server, folder)) as journal,
        closing(open_engine(recipe.engine, sites.client_ids(), text, folder / "clients", handle)) as engine,
    ):
        framing = 0
        for number in range(server.round + 1, recipe.rounds + 1):
            if method.done(server):
                break
            server.round = number
            ids = drawn(engine.client_ids(), recipe, number)
            cohort = sites.cohort(ids, engine, journal.ledger, round=number, policy=policy, run=journal.run)
            counts = recipe.evaluate.costs and number == 1
            metrics = _round(
                sites, server, cohort, _counted(clients, folder, journal.run) if counts else nullcontext()
            )
            if extra := engine.overhead() - framing:
                metrics["framing_bytes"], framing = extra, engine.overhead()
            if number % recipe.evaluate.every == 0 or number == recipe.rounds or method.done(server):
                metrics |= _scores(sites, method.deliver(server))
            journal.commit(server, cohort.ids, metrics)
            yield number, metrics


def _begin(sites: Sites, server: Server, folder: Path) -> Journal:
    """Bring the server to the newest round on the disk, and the files back to it."""
    recipe, begun = sites.recipe, checked(folder, sites.recipe)
    if begun.commit:
        server.state, server.round = dict(begun.commit.state), begun.commit.round
    else:
        sites.method.setup(server)
    journal = Journal(folder, begun.commit, begun.metrics, run=begun.run, recipe=recipe_digest(recipe))
    if not begun.commit:
        journal.add_line({"round": 0, **_scores(sites, sites.method.deliver(server))})
    return journal


def _round(sites: Sites, server: Server, cohort: Cohort, counted: AbstractContextManager[None]) -> dict[str, object]:
    """One round of the method; its metrics, failures and seconds."""
    began = time.perf_counter()
    with counted:
        metrics: dict[str, object] = {"round": server.round, **sites.method.round(server, cohort)}
    metrics["failures"] = {str(client): text for client, text in cohort.failures.items()}
    if cohort.outliers:
        metrics["outliers"] = {str(client): text for client, text in cohort.outliers.items()}
    metrics["seconds"] = round(time.perf_counter() - began, 3)
    return metrics


@contextmanager
def _counted(clients: measurement.MeasuredSites, folder: Path, run: str) -> Iterator[None]:
    """Keep what the server's side of the first round costs."""
    with measurement.counted() as cost:
        yield
    here = clients.spent.values()  # Clients of this process were counted in.
    cost.flops -= sum(one.flops for one in here)
    cost.seconds -= sum(one.seconds for one in here)
    measurement.write(folder / measurement.SERVER, cost, run)


def _scores(sites: Sites, model: nn.Module) -> dict[str, object]:
    """Held-out loss and accuracy, mean and per client."""
    scores = {}
    for client in sites.client_ids():
        if examples := sites.corpus.test_examples(client):
            scores[client] = evaluation.score(model, examples, sites.recipe.evaluate.batch_size)
    macro_f1 = [s.macro_f1 for s in scores.values() if s.macro_f1 is not None]
    return {
        "loss": statistics.fmean(s.loss for s in scores.values()) if scores else None,
        "accuracy": statistics.fmean(s.accuracy for s in scores.values()) if scores else None,
        **({"macro_f1": statistics.fmean(macro_f1)} if macro_f1 else {}),
        "clients": [
            {"id": client, "loss": s.loss, "accuracy": s.accuracy, "num_tokens": s.num_tokens}
            for client, s in scores.items()
        ],
    }
