"""The rows that every result stands beside: the untouched base model, each client alone, all data in one place."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from kilofed.data.examples import Example
from kilofed.federation.parties import generator
from kilofed.models import evaluation, loading, training
from kilofed.models.evaluation import Scores
from kilofed.runs.sites import Sites


def base(sites: Sites, ids: list[int]) -> list[Scores]:
    """Scores of the untouched base model on each client's held-out rows; run before anything is written into it."""
    with loading.without_adapter(sites.store.model(sites.recipe.model)) as model:
        return score_clients(sites, model, ids)


def local(sites: Sites, ids: list[int], tell: Callable[[str], None]) -> list[Scores]:
    """Scores of each client's own model, trained on its rows alone for as many steps as it takes in the whole run."""
    recipe = sites.recipe
    model = sites.store.model(recipe.model)
    start = sites.store.start(recipe.model)
    scores = []
    for number, client in enumerate(ids, 1):
        tell(f"local-only {number}/{len(ids)}")
        loading.write_trained(model, start)
        examples = sites.corpus.train_examples(client)
        steps = recipe.rounds * training.num_steps(recipe.train, len(examples))
        _fit(sites, model, examples, steps, client)
        scores += score_clients(sites, model, [client])
    loading.write_trained(model, start)
    return scores


def centralized(sites: Sites, ids: list[int]) -> list[Scores]:
    """Scores of one model trained on all clients' rows together.

    It takes as many steps as a client does, with a batch as many times larger as there are clients in a round, so it
    sees as many examples as the federation does. With one client it is what `local` gives, bit for bit.
    """
    recipe = sites.recipe
    model = sites.store.model(recipe.model)
    start = sites.store.start(recipe.model)
    shares = [sites.corpus.train_examples(client) for client in sites.client_ids()]
    steps = recipe.rounds * max(training.num_steps(recipe.train, len(share)) for share in shares)
    loading.write_trained(model, start)
    _fit(sites, model, [e for share in shares for e in share], steps, 0, times=recipe.cohort or len(shares))
    scores = score_clients(sites, model, ids)
    loading.write_trained(model, start)
    return scores


def score_clients(sites: Sites, model: nn.Module, ids: list[int]) -> list[Scores]:
    """Full scores of `model` on the held-out rows of each client."""
    spec = sites.recipe.evaluate
    return [
        evaluation.score_all(model, sites.corpus.tokenizer, sites.corpus.test_examples(client), spec) for client in ids
    ]


def _fit(sites: Sites, model: nn.Module, examples: list[Example], steps: int, client: int, times: int = 1) -> None:
    spec = sites.recipe.train
    spec = replace(
        spec, epochs=0, steps=steps, batch_size=spec.batch_size * times, accumulation=spec.accumulation * times
    )

    def order(purpose: str) -> torch.Generator:
        return generator(sites.recipe.seed, 0, client, purpose)

    training.fit_round(
        model,
        examples,
        spec,
        round=1,
        num_rounds=1,
        order=order,
        dropout=generator(sites.recipe.seed, 0, client, "alone"),
    )
