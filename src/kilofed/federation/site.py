"""A site: one client with its own privacy policy, made from what that client has and nothing of another.

In a simulation many of them share a process; a deployed site is one of them, with rows, disk and policy of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from kilofed.config.recipe import Recipe
from kilofed.data.examples import Example
from kilofed.federation.method import Method, failed, handle, load_method
from kilofed.federation.parties import Client
from kilofed.federation.states import States
from kilofed.models.store import ModelStore
from kilofed.privacy.mechanisms import Mechanism, load_mechanism

Handler = Callable[[int, bytes], bytes]
"""(client id, message) to reply."""


@dataclass(frozen=True)
class SiteData:
    """What a site learns from, tokenised for its own model."""

    train: Sequence[Example]
    """Of its own rows; they do not leave."""
    public: Sequence[Example] = ()
    """Rows that anyone may see, the same at the server."""


@dataclass(frozen=True)
class Site:
    """One site of a federation."""

    method: Method
    policy: Mechanism
    """What may leave it; its own, whatever the server says."""
    client: Client
    """What it owns."""

    def handle(self, body: bytes) -> bytes:
        """Answer `body`; the site's state is on its disk before the answer leaves.

        Raises:
            PayloadError: `body` is not a message for a client.
        """
        return handle(self.method, self.policy, self.client, body)


def open_site(recipe: Recipe, number: int, data: SiteData, *, store: ModelStore, folder: Path | None = None) -> Site:
    """The site of client `number` of a run.

    What all sites must agree on and no site can read off its own rows is in the recipe: data.labels where rows are
    classified, data.public where the method learns from public rows.

    Args:
        store: where its model is; sites of one process share it.
        folder: where its state is kept; None keeps it in memory.

    Raises:
        RecipeError, ModelError: what the recipe asks for is not available.
    """
    method = load_method(recipe.method)
    spec = method.client_model(recipe, number)
    client = Client(
        id=number,
        data=data.train,
        train=recipe.train,
        num_rounds=recipe.rounds,
        seed=recipe.seed,
        model=store.model(spec) if spec else nn.Identity(),
        states=States(folder, number),
        public=data.public,
        start=partial(store.start, spec) if spec else dict,
    )
    return Site(method, load_mechanism(recipe.privacy), client)


def answering(handler: Handler, policy: Mechanism) -> Handler:
    """`handler`, whose errors become replies that say so: a site that cannot be opened is that client's failure."""

    def handle(client: int, body: bytes) -> bytes:
        try:
            return handler(client, body)
        except Exception as error:
            return failed(policy, client, body, error)

    return handle
