"""The loop: sample clients, run a round of the method, evaluate, checkpoint; a resumed run ends with the same bytes.

A run folder is written in this order in each round: ledger rows, a line of metrics, then the server's state. The rename
of the state is the commit: whatever lies in the other files beyond its round is cut off on resume.
"""

import json
import statistics
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from kilofed.config.fields import Value
from kilofed.config.recipe import Recipe
from kilofed.config.tables import changed, from_table, load, to_table, to_toml
from kilofed.costs import counter, measurement
from kilofed.engines import open_engine
from kilofed.errors import PayloadError, RunError
from kilofed.federation.cohort import Cohort
from kilofed.federation.ledger import Ledger
from kilofed.federation.parties import Server
from kilofed.files import append_line, cut_after, replace_file, said
from kilofed.models import evaluation, loading
from kilofed.models.evaluation import Scores, summarise
from kilofed.payload import Payload
from kilofed.privacy.mechanisms import Mechanism, load_mechanism, new_key
from kilofed.reports import report
from kilofed.runs import baselines
from kilofed.runs.facts import about
from kilofed.runs.results import Results, of_run, over_seeds
from kilofed.runs.sites import Sites, drawn

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
    def rows(self) -> dict[str, dict[str, object]]:
        """Scores by row: base, local, federated, central."""
        return cast(dict[str, dict[str, object]], self.results["rows"])

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
    folder = _new_folder(recipe, Path(out) if out else None)
    # From here on the folder can be resumed; recipe.toml is a copy for the reader.
    _write_json(
        folder / "run.json", {"recipe": to_table(recipe), "created": datetime.now(UTC).isoformat("T", "seconds")}
    )
    replace_file(folder / "recipe.toml", to_toml(recipe).encode())
    return _run_all(recipe, folder, watch or Silent())


def resume(folder: str | Path, *, watch: Watch | None = None) -> Run:
    """Go on with a run that was stopped at any instant; a finished one is read again.

    Raises:
        RunError: no run folder, or its recipe was edited after it began. KilofedError: as in `run`.
    """
    folder = Path(folder)
    recipe = recipe_of(folder)
    _clear(folder)
    if not (folder / "recipe.toml").exists():
        replace_file(folder / "recipe.toml", to_toml(recipe).encode())
    return _run_all(recipe, folder, watch or Silent())


def recipe_of(folder: Path) -> Recipe:
    """The recipe of the run in `folder`. Raises RunError: no run there, or an edited recipe."""
    written = folder / "recipe.toml"
    try:
        kept = json.loads((folder / "run.json").read_text("utf-8"))["recipe"]
        found = tomllib.loads(written.read_text("utf-8")) if written.exists() else kept
    except (OSError, ValueError, KeyError) as error:
        raise RunError(
            f"{folder} is not a run folder (no readable run.json and recipe.toml): check the path"
        ) from error
    if edited := _differences(kept, found):
        raise RunError(
            f"{folder}/recipe.toml was edited after the run began ({', '.join(edited)}): undo that to resume, "
            "or start a new run with the edited recipe"
        )
    return from_table(kept)


def delivered(folder: Path) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The model of the newest state in a run folder, in eval mode, and its tokeniser. Raises RunError."""
    server, sites = restored(first_seed(folder))
    return sites.method.deliver(server).eval(), sites.tokenizer


def restored(folder: Path) -> tuple[Server, Sites]:
    """The server of a run folder after its newest round, and the run's sites. Raises RunError."""
    sites = Sites(recipe_of(folder))
    server = _server(sites, folder)
    if not _load_state(folder, server):
        raise RunError(f"{folder} has no state yet: resume it first")
    return server, sites


def score(folder: Path, overrides: Mapping[str, Value]) -> dict[str, object]:
    """A row of scores of the run's model on its held-out rows, or on those that `overrides` name. Raises KilofedError."""
    recipe = recipe_of(first_seed(folder))
    model, _ = delivered(folder)
    sites = Sites(changed(recipe, overrides))
    ids = [client for client in sites.client_ids() if sites.shares[client].test]
    return summarise(baselines.score_clients(sites, model, ids), ids)


def first_seed(folder: Path) -> Path:
    """The folder itself, or that of its first repeat."""
    repeats = sorted(folder.glob("seed-*"))
    return folder if (folder / "state.safetensors").exists() or not repeats else repeats[0]


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
            below.mkdir(exist_ok=True)
            replace_file(below / "recipe.toml", to_toml(one).encode())
            if not (below / "run.json").exists():
                _write_json(below / "run.json", {"recipe": to_table(one)})
            every.append(_run_one(one, below, watch))
            report.write(below)
        results = over_seeds(recipe, folder, every)
        top = {**json.loads((folder / f"seed-{recipe.seed}" / "run.json").read_text()), "recipe": to_table(recipe)}
        _write_json(folder / "run.json", top)
        _write_json(folder / "results.json", results)
    report.write(folder)
    return Run(folder, results)


def _run_one(recipe: Recipe, folder: Path, watch: Watch) -> Results:
    if (folder / "results.json").exists():
        return cast(Results, json.loads((folder / "results.json").read_text("utf-8")))
    if recipe.engine.threads:
        torch.set_num_threads(recipe.engine.threads)
    watch.stage("reading data and model")
    sites = Sites(recipe, folder / "clients")
    if recipe.evaluate.costs:
        sites.read()
        counter.measure()  # With rows and before there is a model, so that it sees what a process takes without one.
    policy = load_mechanism(replace(recipe.privacy, noise_key=_noise_key(recipe, folder)))
    with closing(_server(sites, folder)) as server:
        return _measured(sites, server, policy, folder, watch)


def _measured(sites: Sites, server: Server, policy: Mechanism, folder: Path, watch: Watch) -> Results:
    """All rounds, all rows of the table and what they come to."""
    recipe = sites.recipe
    path = folder / "run.json"
    known = json.loads(path.read_text("utf-8"))
    if "clients" not in known:
        _write_json(path, known | about(sites, server))
    scored = [client for client in sites.client_ids() if sites.shares[client].test]
    rows = _Rows(folder / "controls.json")
    if "base" in recipe.evaluate.controls:
        watch.stage("base model")
        rows.once("base", scored, lambda: baselines.base(sites, scored))
    _rounds(sites, server, policy, folder, watch)
    model = sites.method.deliver(server)
    watch.stage("federated model")
    federated = rows.once("federated", scored, lambda: baselines.score_clients(sites, model, scored))
    presentation = sites.method.presentation()
    shown = presentation.charts(server, [e for client in scored for e in sites.test_examples(client)[:CHARTED]])
    for name, other in presentation.extra_models(server).items():
        watch.stage(name)
        rows.once(name, scored, lambda model=other: baselines.score_clients(sites, model, scored))  # type: ignore[misc]
    loading.save_adapter(sites.method.trained(server), folder / "adapter")
    if "local" in recipe.evaluate.controls:
        chosen = _spread(scored, recipe.evaluate.max_local)
        rows.once("local", chosen, lambda: baselines.local(sites, chosen, watch.stage))
    if "central" in recipe.evaluate.controls:
        watch.stage("central")
        rows.once("central", scored, lambda: baselines.central(sites, scored))
    assert federated
    results = of_run(recipe, folder, rows.rows, policy) | {"charts": [chart.as_dict() for chart in shown]}
    _write_json(folder / "results.json", results)
    return results


def _rounds(sites: Sites, server: Server, policy: Mechanism, folder: Path, watch: Watch) -> None:
    recipe, method = sites.recipe, sites.method
    if not _load_state(folder, server):
        method.setup(server)
    for name in ("ledger.jsonl", "metrics.jsonl"):
        cut_after(folder / name, server.round)
    metrics_file = folder / "metrics.jsonl"
    if server.round == 0 and not (metrics_file.exists() and metrics_file.stat().st_size):
        append_line(folder / "metrics.jsonl", {"round": 0, **_measure(sites, method.deliver(server))})
    text = json.dumps(to_table(recipe))
    with (
        closing(Ledger(folder / "ledger.jsonl")) as ledger,
        closing(open_engine(recipe.engine, sites.client_ids(), text, folder / "clients", sites.handle)) as engine,
    ):
        framing = 0
        for number in range(server.round + 1, recipe.rounds + 1):
            if method.done(server):
                break
            began = time.perf_counter()
            server.round = number
            cohort = Cohort(
                drawn(engine.client_ids(), recipe, number),
                engine,
                ledger,
                policy,
                round=number,
                quorum=recipe.quorum,
                skip_failures=recipe.on_failure == "skip",
            )
            with _counted(sites, folder, number):
                metrics: dict[str, object] = {"round": number, **method.round(server, cohort)}
            metrics["failures"] = {str(client): text for client, text in cohort.failures.items()}
            metrics["seconds"] = round(time.perf_counter() - began, 3)
            if extra := engine.overhead() - framing:
                metrics["framing_bytes"], framing = extra, engine.overhead()
            if number % recipe.evaluate.every == 0 or number == recipe.rounds or method.done(server):
                metrics |= _measure(sites, method.deliver(server))
            ledger.sync()
            append_line(folder / "metrics.jsonl", metrics)
            replace_file(folder / "state.safetensors", Payload(server.state, {"round": number}).encode())
            watch.round(number, recipe.rounds, metrics)


@contextmanager
def _counted(sites: Sites, folder: Path, number: int) -> Iterator[None]:
    """Keep what the server's side of the first round costs, where the recipe asks for it."""
    if not sites.recipe.evaluate.costs or number > 1:
        yield
        return
    with measurement.counted() as cost:
        yield
    here = sites.spent.values()  # Clients of this process were counted in.
    cost.flops -= sum(one.flops for one in here)
    cost.seconds -= sum(one.seconds for one in here)
    measurement.write(folder / measurement.SERVER, cost)


def _server(sites: Sites, folder: Path) -> Server:
    recipe = sites.recipe
    spec = sites.method.server_model(recipe)
    model = sites.model(spec) if spec else nn.Identity()
    return Server(recipe.seed, recipe.rounds, recipe.train, model, public=sites.public, spec=spec, folder=folder)


def _load_state(folder: Path, server: Server) -> bool:
    path = folder / "state.safetensors"
    if not path.exists():
        return False
    with said(f"cannot read {path}"):
        content = path.read_bytes()
    try:
        payload = Payload.decode(content)
        server.state, server.round = dict(payload.tensors), int(payload.scalars["round"])
    except (PayloadError, KeyError, ValueError) as error:
        raise RunError(
            f"{path} is not a whole state of a run ({error}): put a copy back, or delete it and resume from round 1"
        ) from error
    return True


def _measure(sites: Sites, model: nn.Module) -> dict[str, object]:
    """Held-out loss and accuracy, mean and per client."""
    scores = {}
    for client in sites.client_ids():
        if examples := sites.test_examples(client):
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


class _Rows:
    """Rows of the table as they are finished; kept on the disk so that a resumed run does not repeat them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: dict[str, object] = json.loads(path.read_text("utf-8")) if path.exists() else {}

    def once(self, name: str, ids: list[int], measure: Callable[[], list[Scores]]) -> object:
        if name not in self.rows:
            self.rows[name] = summarise(measure(), ids)
            _write_json(self._path, self.rows)
        return self.rows[name]


def _new_folder(recipe: Recipe, out: Path | None) -> Path:
    if out is not None:
        if out.exists() and not (out.is_dir() and _never_began(out)):
            hint = f"`kilofed resume {out}` goes on with it" if (out / "run.json").exists() else "it holds other files"
            raise RunError(f"{out} already exists and {hint}; choose another --out")
        with said(f"cannot make {out}"):
            out.mkdir(parents=True, exist_ok=True)
            _clear(out)
        return out
    number = 1
    while True:
        folder = Path("runs") / f"{recipe.name}-{number}"
        with said(f"cannot make {folder}"):
            try:
                folder.mkdir(parents=True)
                return folder
            except FileExistsError:
                number += 1


def _never_began(folder: Path) -> bool:
    """Whether nothing but a run's question lies there: its data or model could not be had."""
    return {item.name for item in folder.iterdir() if item.suffix != ".part"} <= {"run.json", "recipe.toml"}


def _clear(folder: Path) -> None:
    """Remove what a killed process was in the middle of writing."""
    for part in folder.rglob(".*.part"):
        part.unlink()


def _noise_key(recipe: Recipe, folder: Path) -> str:
    """The secret of the noise: the recipe's, or one drawn once and kept in the run folder for its owner only."""
    if recipe.privacy.kind != "central" or recipe.privacy.noise_key:  # Elsewhere a client draws its own.
        return recipe.privacy.noise_key
    path = folder / "noise.key"
    if not path.exists():
        replace_file(path, new_key().encode())
    path.chmod(0o600)
    return path.read_text("utf-8")


def _differences(kept: Mapping[str, object], found: Mapping[str, object], where: str = "") -> list[str]:
    changed = []
    for key in sorted({*kept, *found}):
        old, new = kept.get(key), found.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changed += _differences(old, new, f"{where}{key}.")
        elif old != new:
            changed.append(where + key)
    return changed


def _spread(ids: list[int], most: int) -> list[int]:
    """At most `most` of `ids`, evenly spaced."""
    if len(ids) <= most:
        return ids
    return [ids[i * len(ids) // most] for i in range(most)]


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    replace_file(path, (json.dumps(value, indent=1) + "\n").encode("utf-8"))
