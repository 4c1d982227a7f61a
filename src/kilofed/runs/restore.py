"""A run read back from its folder: its server, the model that it delivers, and that model's scores."""

from collections.abc import Mapping
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from kilofed.config.fields import Value
from kilofed.config.tables import changed
from kilofed.errors import RunError
from kilofed.federation.parties import Server
from kilofed.models.evaluation import summarise
from kilofed.records.results import ScoreRow
from kilofed.runs import baselines, commit
from kilofed.runs.folder import first_seed, recipe_of
from kilofed.runs.resuming import hold_to_recipe
from kilofed.runs.sites import Sites


def restored(folder: Path) -> tuple[Server, Sites]:
    """The server of a run folder after its newest round, and the run's sites. Raises RunError."""
    recipe, kept = recipe_of(folder), commit.read(folder)
    sites = Sites(recipe)
    if kept is None:
        raise RunError(f"{folder} has no state yet: resume it first")
    hold_to_recipe(folder / commit.FILE, kept, recipe)
    server = sites.server(folder=folder)
    server.state, server.round = dict(kept.state), kept.round
    return server, sites


def delivered(folder: Path) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The model of the newest state in a run folder, in eval mode, and its tokeniser. Raises RunError."""
    server, sites = restored(first_seed(folder))
    return sites.method.deliver(server).eval(), sites.corpus.tokenizer


def score(folder: Path, overrides: Mapping[str, Value]) -> ScoreRow:
    """A row of scores of the run's model on its held-out rows, or on those that `overrides` name. Raises KilofedError."""
    recipe = recipe_of(first_seed(folder))
    model, _ = delivered(folder)
    sites = Sites(changed(recipe, overrides))
    ids = [client for client in sites.client_ids() if sites.corpus.shares[client].test]
    return summarise(baselines.score_clients(sites, model, ids), ids)
