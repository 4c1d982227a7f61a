"""A run from its recipe to the report: rounds, baselines, results; resumed at any instant it ends in the same bytes."""

import logging
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from kilofed.config.fields import Value
from kilofed.config.recipe import Recipe
from kilofed.config.tables import from_table, load, to_table
from kilofed.costs import counter
from kilofed.errors import RunError
from kilofed.federation.method import with_present_names
from kilofed.federation.parties import Server
from kilofed.files import said
from kilofed.models import loading
from kilofed.models.evaluation import Scores, summarise
from kilofed.privacy.mechanisms import Mechanism, load_mechanism
from kilofed.records import codec
from kilofed.records import facts as facts_file
from kilofed.records import results as results_file
from kilofed.records.codec import to_json
from kilofed.records.results import Results, ScoreRow, ScoreRows
from kilofed.reports import report
from kilofed.runs import baselines
from kilofed.runs.facts import facts
from kilofed.runs.folder import (
    begin,
    begin_repeat,
    begun,
    clear,
    new_folder,
    noise_key,
    recipe_of,
    run_identity,
    write_json,
)
from kilofed.runs.lock import held
from kilofed.runs.restore import delivered
from kilofed.runs.results import finished, of_run, over_seeds
from kilofed.runs.rounds import run_rounds
from kilofed.runs.sites import Sites

log = logging.getLogger("kilofed")

CHARTED = 8
"""Held-out rows of each client that a method may look at for its charts."""


class Watch(Protocol):
    """Is told how a run goes."""

    def begin(self, folder: Path) -> None:
        """The run folder is there."""

    def stage(self, text: str) -> None:
        """Something other than a round has begun."""

    def round(self, number: int, total: int, metrics: Mapping[str, object]) -> None:
        """A round is over and on the disk."""


class Silent:
    """Watches nothing."""

    def begin(self, folder: Path) -> None: ...

    def stage(self, text: str) -> None: ...

    def round(self, number: int, total: int, metrics: Mapping[str, object]) -> None: ...


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    results: Results

    @property
    def rows(self) -> Mapping[str, ScoreRow]:
        """Scores by row: base, local, federated, centralized, as far as the recipe asked for them."""
        return self.results.rows

    def model(self) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        """The model that the run brought, and its tokeniser."""
        return delivered(self.folder)


def run(
    recipe: Recipe | str | Path,
    overrides: Mapping[str, Value] | None = None,
    *,
    out: str | Path | None = None,
    watch: Watch | None = None,
) -> Run:
    """Run a recipe from the first round to the report.

    Args:
        recipe: a Recipe, the name of a shipped one, or the path of a TOML file.
        overrides: dotted keys and values laid over the recipe, such as {"train.lr": 1e-3}.
        out: the run folder, which must not exist or be empty; by default runs/NAME-N.
        watch: is told how it goes.

    Raises:
        KilofedError: one sentence that says what was seen, what was expected and what to do.
    """
    if not isinstance(recipe, Recipe):
        recipe = load(recipe, overrides)
    elif overrides:
        raise RunError("overrides lie over a recipe's file; change a Recipe with dataclasses.replace")
    Sites(recipe)  # Method, fields and privacy are checked before a folder is made.
    recipe = from_table(with_present_names(to_table(recipe), recipe.method.name))
    folder = new_folder(recipe, Path(out) if out else None)
    with held(folder):
        begin(folder, recipe)
        return _run_all(recipe, folder, watch or Silent())


def resume(folder: str | Path, *, watch: Watch | None = None) -> Run:
    """Go on with a run that was stopped at any instant; a finished one is read again.

    Raises:
        RunError: no run folder, its recipe was edited after it began, another process holds it, or a file in it is
            damaged, by its name. KilofedError: as in `run`.
    """
    folder = Path(folder)
    recipe_of(folder)  # Nothing is written into a folder that is no run's.
    with held(folder):
        clear(folder)
        return _run_all(begun(folder), folder, watch or Silent())


def _run_all(recipe: Recipe, folder: Path, watch: Watch) -> Run:
    watch.begin(folder)
    if recipe.seeds == 1:
        results = _run_one(recipe, folder, watch)
    else:
        every = []
        for seed in range(recipe.seed, recipe.seed + recipe.seeds):
            watch.stage(f"seed {seed}")
            counts = recipe.evaluate.costs and seed == recipe.seed  # They hardly differ, and counting takes time.
            one = replace(recipe, seed=seed, seeds=1, evaluate=replace(recipe.evaluate, costs=counts))
            below = folder / f"seed-{seed}"
            with said(f"cannot make {below}"):
                below.mkdir(exist_ok=True)
            with held(below):
                begin_repeat(below, one)
                every.append(_run_one(one, below, watch))
                report.write(below)
        results = over_seeds(recipe, folder, every)
        top = replace(facts_file.read(folder / f"seed-{recipe.seed}"), recipe=to_table(recipe))
        write_json(folder / facts_file.FILE, to_json(top))
        write_json(folder / results_file.FILE, results.to_json())
    report.write(folder)
    return Run(folder, results)


def _run_one(recipe: Recipe, folder: Path, watch: Watch) -> Results:
    if (known := finished(folder, recipe)) is not None:
        return known
    if recipe.engine.threads:
        torch.set_num_threads(recipe.engine.threads)
    watch.stage("reading data and model")
    sites = Sites(recipe, folder / "clients")
    if recipe.evaluate.costs:
        sites.corpus.tokenize()
        counter.measure()  # With rows and before there is a model, so that it sees what a process takes without one.
    policy = load_mechanism(replace(recipe.privacy, noise_key=noise_key(recipe, folder)))
    with closing(sites.server(folder=folder)) as server:
        return _measured(sites, server, policy, folder, watch)


def _measured(sites: Sites, server: Server, policy: Mechanism, folder: Path, watch: Watch) -> Results:
    """All rounds, all rows of the table and what they come to."""
    recipe = sites.recipe
    began = facts_file.read(folder)
    if not began.clients:
        write_json(folder / facts_file.FILE, to_json(facts(sites, server, began)))
    scored = [client for client in sites.client_ids() if sites.corpus.shares[client].test]
    rows = _Rows(folder, run_identity(recipe, noise_key(recipe, folder)))
    if "base" in recipe.evaluate.baselines:
        watch.stage("base model")
        rows.once("base", scored, lambda: baselines.base(sites, scored))
    with closing(run_rounds(sites, server, policy, folder)) as rounds:
        for number, metrics in rounds:
            watch.round(number, recipe.rounds, metrics)
    model = sites.method.deliver(server)
    watch.stage("federated model")
    rows.once("federated", scored, lambda: baselines.score_clients(sites, model, scored))
    presentation = sites.method.presentation()
    shown = presentation.charts(server, [e for client in scored for e in sites.corpus.test_examples(client)[:CHARTED]])
    for name, other in presentation.extra_models(server).items():
        watch.stage(name)
        rows.once(name, scored, lambda model=other: baselines.score_clients(sites, model, scored))  # type: ignore[misc]
    loading.save_adapter(sites.method.trained(server), folder / "adapter")
    if "local" in recipe.evaluate.baselines:
        chosen = _spread(scored, recipe.evaluate.max_local)
        rows.once("local", chosen, lambda: baselines.local(sites, chosen, watch.stage))
    if "centralized" in recipe.evaluate.baselines:
        watch.stage("centralized")
        rows.once("centralized", scored, lambda: baselines.centralized(sites, scored))
    results = of_run(recipe, folder, rows.rows, policy, shown)
    write_json(folder / results_file.FILE, results.to_json())
    return results


class _Rows:
    """Rows of the table as they are finished; kept on the disk so that a resumed run does not repeat them."""

    def __init__(self, folder: Path, run: str) -> None:
        if (folder / "controls.json").exists():
            raise RunError(
                f"{folder} was begun by an older kilofed (it holds controls.json, not baselines.json): "
                "run its recipe.toml anew"
            )
        self._path, self._run = folder / "baselines.json", run
        self.rows = self._known()

    def once(self, name: str, ids: list[int], measure: Callable[[], list[Scores]]) -> None:
        if name not in self.rows:
            self.rows[name] = summarise(measure(), ids)
            write_json(self._path, codec.to_json(ScoreRows(self.rows, self._run)))

    def _known(self) -> dict[str, ScoreRow]:
        if not self._path.exists():
            return {}
        try:
            found = codec.from_file(ScoreRows, self._path)
        except RunError as error:
            log.warning("%s; its rows are scored anew", str(error).partition(": ")[0])
            return {}
        if found.run != self._run:
            log.warning("%s is of another run; its rows are scored anew", self._path)
            return {}
        return dict(found.rows)


def _spread(ids: list[int], most: int) -> list[int]:
    """At most `most` of `ids`, evenly spaced."""
    if len(ids) <= most:
        return ids
    return [ids[i * len(ids) // most] for i in range(most)]
