"""The clients' side of a run, built from its recipe: rows, model, policy and state of every site in this process.

One base model is resident; a client is what is written into it. Engines hand over bytes and get bytes back.
"""

import json
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from kilofed.config.recipe import ModelSpec, Recipe
from kilofed.config.tables import from_table
from kilofed.costs import environment, measurement
from kilofed.data import public
from kilofed.data.examples import Example, Renderer, class_names
from kilofed.data.partition import Share, divide
from kilofed.data.readers import Row, Rows, layout, read, set_aside
from kilofed.errors import DataError, ModelError, RecipeError
from kilofed.federation.cohort import ROUND
from kilofed.federation.method import handle, load_method
from kilofed.federation.parties import Client, generator
from kilofed.federation.states import States
from kilofed.models import loading
from kilofed.payload import Payload
from kilofed.privacy.mechanisms import load_mechanism


class Sites:
    """All sites of a run that live in this process.

    Args:
        recipe: the run.
        folder: where client states are kept, one folder per client; None keeps them in memory.

    Raises:
        RecipeError, DataError, ModelError: what the recipe asks for cannot be had.
    """

    def __init__(self, recipe: Recipe, folder: Path | None = None) -> None:
        self.recipe = recipe
        self.method = load_method(recipe.method)
        self.policy = load_mechanism(recipe.privacy)
        self._folder = folder
        self._models: dict[ModelSpec, nn.Module] = {}
        self._clients: dict[int, Client] = {}
        self._renderers: dict[tuple[str, str], Renderer] = {}
        self._starts: dict[ModelSpec, dict[str, Tensor]] = {}
        self._train: dict[tuple[int, int], list[Example]] = {}
        self._test: dict[int, list[Example]] = {}
        self.spent: dict[int, measurement.Cost] = {}
        """What clients of this process did in the first round, where the recipe has it counted."""
        self._afresh = False

    @cached_property
    def rows(self) -> Rows:
        """The rows of all clients, as the source gave them."""
        return self._rows[0]

    @cached_property
    def public(self) -> list[Example]:
        """What the server may learn from; empty where the recipe names no public rows."""
        return self.public_examples(self.recipe.model)

    @cached_property
    def _rows(self) -> tuple[Rows, list[Row]]:
        spec, seed = self.recipe.data, self.recipe.seed
        return set_aside(read(spec, seed), spec, seed)

    @cached_property
    def shares(self) -> list[Share]:
        """Each client's rows."""
        shares = divide(self.rows, self.recipe.data, self.recipe.seed)
        if self.recipe.cohort > len(shares):
            raise RecipeError(
                f"cohort is {self.recipe.cohort}, but there are {len(shares)} clients: take fewer per round, or 0 for all"
            )
        if self.recipe.quorum > len(shares):
            raise RecipeError(
                f"quorum is {self.recipe.quorum}, but there are {len(shares)} clients: take a smaller one"
            )
        return shares

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokeniser of the recipe's model."""
        return loading.load_tokenizer(self.recipe.model)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their numbers; empty where nothing is classified."""
        spec = self.recipe.data
        return class_names(spec, self.rows) if spec.task == "classify" or spec.labels else ()

    @cached_property
    def renderer(self) -> Renderer:
        """Rows to examples."""
        spec = self.recipe.data
        return Renderer(self.tokenizer, spec, layout(spec.columns, self.rows.train, spec.task), self.classes)

    def read(self) -> None:
        """Read and tokenise the rows of all clients now, not when they are first asked for."""
        for client in self.client_ids():
            self.train_examples(client)

    def client_ids(self) -> list[int]:
        """Numbers of the clients, from 0."""
        return list(range(len(self.shares)))

    def renderer_of(self, spec: ModelSpec) -> Renderer:
        """Rows to examples for the model of `spec`, which may have a tokeniser of its own where rows are classified.

        Raises:
            ModelError: tokens are learnt, and its vocabulary is not that of the recipe's model.
        """
        where = spec.path, spec.revision
        if where == (self.recipe.model.path, self.recipe.model.revision):
            return self.renderer
        if where not in self._renderers:
            tokenizer, kind = loading.load_tokenizer(spec), self.renderer.kind
            if tokenizer.get_vocab() == self.tokenizer.get_vocab():
                self._renderers[where] = self.renderer
            elif not self.classes:
                raise ModelError(
                    f"{spec.path} has another vocabulary than {self.recipe.model.path} ({len(tokenizer)} and "
                    f"{len(self.tokenizer)} tokens): where tokens are learnt, all models need one tokeniser"
                )
            else:
                self._renderers[where] = Renderer(tokenizer, self.recipe.data, kind, self.classes)
        return self._renderers[where]

    def public_examples(self, spec: ModelSpec | None) -> list[Example]:
        """The public rows for the model of `spec`; empty where the recipe names none."""
        renderer = self.renderer_of(spec) if spec else self.renderer
        return public.examples(self._rows[1], self.recipe.data, renderer, self.classes)

    def start(self, spec: ModelSpec) -> dict[str, Tensor]:
        """The trained tensors of the model of `spec` before any training."""
        if spec not in self._starts:
            fresh = loading.load_model(spec, self.recipe.adapter, self.recipe.seed, self.classes)
            self._starts[spec] = loading.read_trained(fresh)
        return self._starts[spec]

    def train_examples(self, client: int, spec: ModelSpec | None = None) -> list[Example]:
        """What client number `client` learns from, for the model of `spec`, by default the recipe's.

        Raises:
            DataError: nothing in its rows can be learnt.
        """
        renderer = self.renderer_of(spec) if spec else self.renderer
        if (client, id(renderer)) not in self._train:
            examples = renderer(self.shares[client].train)
            if not examples:
                raise DataError(
                    f"client {self.shares[client].name}: no row has an answer within data.max_length="
                    f"{self.recipe.data.max_length} tokens; raise it, or check data.columns"
                )
            self._train[client, id(renderer)] = examples
        return self._train[client, id(renderer)]

    def test_examples(self, client: int) -> list[Example]:
        """What client number `client` is scored on."""
        if client not in self._test:
            self._test[client] = self.renderer(self.shares[client].test)
        return self._test[client]

    def model(self, spec: ModelSpec) -> nn.Module:
        """The resident model of `spec`, with the recipe's adapter."""
        if spec not in self._models:
            self._models[spec] = loading.load_model(spec, self.recipe.adapter, self.recipe.seed, self.classes)
        return self._models[spec]

    def handle(self, client: int, body: bytes) -> bytes:
        """Client number `client` answers `body`; its state is on the disk before the answer leaves."""
        if self.recipe.evaluate.costs and self._folder:
            return self._measured(client, body, self._folder / str(client) / measurement.FILE)
        return handle(self.method, self.policy, self._client(client), body)

    def _measured(self, number: int, body: bytes, path: Path) -> bytes:
        """Operations are counted in round 1; that takes memory itself, so memory is measured anew in round 2."""
        client, round = self._client(number), int(Payload.peek(body).get(ROUND, 0))
        if round == 1:
            with measurement.counted() as cost:
                reply = handle(self.method, self.policy, client, body)
            self.spent.setdefault(number, measurement.Cost()).add(cost)
            measurement.write(path, self.spent[number])
            return reply
        self._afresh = self._afresh or environment.forget_peak()
        reply = handle(self.method, self.policy, client, body)
        if round == 2 and self._afresh and number in self.spent:
            self.spent[number].peak_memory_bytes = environment.own_peak_memory()
            measurement.write(path, self.spent[number])
        return reply

    def _client(self, number: int) -> Client:
        if number not in self._clients:
            spec = self.method.client_model(self.recipe, number)
            self._clients[number] = Client(
                id=number,
                data=_Lazy(self, number, spec),
                train=self.recipe.train,
                num_rounds=self.recipe.rounds,
                seed=self.recipe.seed,
                model=self.model(spec) if spec else nn.Identity(),
                states=States(self._folder and self._folder / str(number)),
                public=_Public(self, spec),
                start=partial(self.start, spec) if spec else dict,
            )
        return self._clients[number]


class _Lazy(Sequence[Example]):
    """A client's examples, tokenised when first looked at: ten thousand clients cost nothing until asked."""

    def __init__(self, sites: Sites, client: int, spec: ModelSpec | None) -> None:
        self._sites, self._client, self._spec = sites, client, spec

    def __len__(self) -> int:
        return len(self._sites.train_examples(self._client, self._spec))

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        return self._sites.train_examples(self._client, self._spec)[index]


class _Public(Sequence[Example]):
    """The public rows, read and tokenised when first looked at."""

    def __init__(self, sites: Sites, spec: ModelSpec | None) -> None:
        self._sites, self._spec = sites, spec

    @cached_property
    def _examples(self) -> list[Example]:
        return self._sites.public_examples(self._spec)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        return self._examples[index]


def open_handler(recipe_json: str, folder: str) -> Callable[[int, bytes], bytes]:
    """The handler of a process that an engine started.

    Args:
        recipe_json: the recipe as `to_table` gives it, as JSON.
        folder: where client states are kept.

    Raises:
        RecipeError, DataError, ModelError: what the recipe asks for cannot be had.
    """
    return Sites(from_table(json.loads(recipe_json)), Path(folder)).handle


def drawn(ids: list[int], recipe: Recipe, number: int) -> list[int]:
    """Who takes part in round `number`: recipe.cohort of `ids`, drawn anew in each round, or all."""
    if not recipe.cohort or recipe.cohort >= len(ids):
        return ids
    order = torch.randperm(len(ids), generator=generator(recipe.seed, number, -1, "cohort")).tolist()
    return sorted(ids[i] for i in order[: recipe.cohort])
