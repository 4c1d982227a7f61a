"""All sites of a run in one process, built from its recipe: many clients on one corpus and one store of models.

Engines hand over bytes and get bytes back.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import overload

import torch
from torch import nn

from kilofed.config import trust
from kilofed.config.recipe import ModelSpec, Recipe
from kilofed.config.tables import from_table
from kilofed.costs.measurement import MeasuredSites
from kilofed.data.corpus import Corpus
from kilofed.data.examples import Example
from kilofed.data.notices import Warn, log_warning
from kilofed.errors import RecipeError
from kilofed.federation.address import NO_RUN
from kilofed.federation.cohort import Cohort, Engine, Rules
from kilofed.federation.ledger import Ledger
from kilofed.federation.method import load_method, reads_data
from kilofed.federation.parties import Server, generator
from kilofed.federation.site import Site, SiteData, answering, open_site
from kilofed.models import loading
from kilofed.models.store import ModelStore
from kilofed.privacy.mechanisms import Mechanism, load_mechanism


class Sites:
    """All sites of a run that live in this process.

    Args:
        recipe: the run.
        folder: where client states are kept, one folder per client; None keeps them in memory.
        warn: is told of rows, columns and files that are skipped.

    Raises:
        RecipeError, PrivacyError: no such method or mechanism, or one of its fields is wrong.
    """

    def __init__(self, recipe: Recipe, folder: Path | None = None, *, warn: Warn = log_warning) -> None:
        self.recipe = recipe
        self.method = load_method(recipe.method)
        self.policy = load_mechanism(recipe.privacy)
        self.corpus = Corpus(recipe, loading.load_tokenizer, warn=warn)
        self._folder = folder
        self._sites: dict[int, Site] = {}

    @cached_property
    def store(self) -> ModelStore:
        """The models of this process. Raises DataError: rows are classified, and their labels cannot be read."""
        return ModelStore(self.recipe.adapter, self.recipe.seed, self.corpus.classes)

    def client_ids(self) -> list[int]:
        """Numbers of the clients, from 0.

        Raises:
            RecipeError: there are fewer than the recipe's cohort or quorum. DataError: the rows cannot be divided.
        """
        recipe, number = self.recipe, len(self.corpus.shares)
        if recipe.cohort > number:
            raise RecipeError(
                f"cohort is {recipe.cohort}, but there are {number} clients: take fewer per round, or 0 for all"
            )
        if recipe.quorum > number:
            raise RecipeError(f"quorum is {recipe.quorum}, but there are {number} clients: take a smaller one")
        return list(range(number))

    def site(self, number: int) -> Site:
        """The site of client `number`; its rows are tokenised when it first looks at them. Raises KilofedError."""
        if number not in self._sites:
            spec = self.method.client_model(self.recipe, number)
            data = SiteData(
                _Lazy(partial(self.corpus.train_examples, number, spec)),
                _Lazy(partial(self.corpus.public_examples, spec)),
            )
            folder = self._folder and self._folder / str(number)
            self._sites[number] = open_site(self.recipe, number, data, store=self.store, folder=folder)
        return self._sites[number]

    def handle(self, number: int, body: bytes) -> bytes:
        """Client `number` answers `body`; its state is on the disk before the answer leaves. Raises KilofedError."""
        return self.site(number).handle(body)

    def server(
        self, *, folder: Path | None = None, model_of: Callable[[ModelSpec], nn.Module] | None = None
    ) -> Server:
        """The server of the run, before `Method.setup`.

        Args:
            folder: the run folder; None where there is none.
            model_of: loads its model; by default it is the resident one.

        Raises:
            DataError, ModelError: its public rows or its model are not available.
        """
        recipe, spec = self.recipe, self.method.server_model(self.recipe)
        model = (model_of or self.store.model)(spec) if spec else nn.Identity()
        public = self.corpus.public_examples()
        return Server(
            recipe.seed,
            recipe.rounds,
            recipe.train,
            model,
            public=public,
            spec=spec,
            folder=folder,
            num_rows=self._num_rows,
            max_length=recipe.data.max_length,
        )

    def cohort(
        self,
        ids: list[int],
        engine: Engine,
        ledger: Ledger,
        *,
        round: int,
        policy: Mechanism | None = None,
        run: str = NO_RUN,
    ) -> Cohort:
        """The clients `ids` in one round, held to what the recipe, the method and their rows allow.

        Args:
            policy: the server's, with its own key; by default the sites'.
            run: the run's identity.
        """
        recipe, method = self.recipe, self.method
        return Cohort(
            ids,
            engine,
            ledger,
            policy or self.policy,
            round=round,
            rules=Rules.of(recipe),
            run=run,
            max_weight_of=lambda client: method.max_weight(recipe.train, self._num_rows(client)),
            reads_data=partial(reads_data, method),
        )

    def _num_rows(self, client: int) -> int:
        """Training rows of a client, as its site would tell when it joins."""
        return len(self.corpus.shares[client].train)


class _Lazy(Sequence[Example]):
    """Examples, tokenised when first looked at: ten thousand clients cost nothing until asked."""

    def __init__(self, examples: Callable[[], list[Example]]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples())

    def __iter__(self) -> Iterator[Example]:
        return iter(self._examples())

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        return self._examples()[index]


def open_handler(recipe_json: str, folder: str) -> Callable[[int, bytes], bytes]:
    """The handler of a process that an engine started.

    Args:
        recipe_json: the recipe as `to_table` gives it, as JSON.
        folder: where client states are kept.

    Raises:
        RecipeError, PrivacyError: the recipe cannot be run.
    """
    recipe = from_table(json.loads(recipe_json))
    if "." in recipe.method.name:
        trust.trust(recipe.method.name)  # The process that started this one has loaded it.
    sites = Sites(recipe, Path(folder))
    handle = MeasuredSites(sites.site, Path(folder)).handle if recipe.evaluate.costs else sites.handle
    return answering(handle, sites.policy)


def drawn(ids: list[int], recipe: Recipe, number: int) -> list[int]:
    """Who takes part in round `number`: recipe.cohort of `ids`, drawn anew in each round, or all."""
    if not recipe.cohort or recipe.cohort >= len(ids):
        return ids
    order = torch.randperm(len(ids), generator=generator(recipe.seed, number, -1, "cohort")).tolist()
    return sorted(ids[i] for i in order[: recipe.cohort])
