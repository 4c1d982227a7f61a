"""Mixing weights are the best of the grid, follow who is sure, and are seen on rows as the models score them."""

from pathlib import Path

import pytest
import torch
from tests.distillation.test_teacher_cache import rows
from torch import Tensor

from kilofed.config.recipe import ModelSpec
from kilofed.models import evaluation, loading
from kilofed.proxy.combination import Mix, mix
from kilofed.proxy.fitting import Observed, fit_constant, fit_entropy_mix, observe, observed
from kilofed.proxy.model import ProxyModel


def documents(seed: int, num: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """At every other position the large model knows the token and is sure; at the others the small one is."""
    generator = torch.Generator().manual_seed(seed)
    large, small, targets = [], [], []
    for _ in range(num):
        target = torch.randint(0, 10, (40,), generator=generator)
        right = torch.nn.functional.one_hot(target, 10) * 6.0
        knows = (torch.arange(40) % 2 == 0)[:, None]
        noise = torch.randn(2, 40, 10, generator=generator)
        large.append(torch.where(knows, right, noise[0]))
        small.append(torch.where(knows, noise[1], right))
        targets.append(target)
    return large, small, targets


def texts(seed: int, num: int) -> list[Observed]:
    return [observed(*text) for text in zip(*documents(seed, num), strict=True)]


def loss(scores: Tensor, targets: Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(scores, targets))


def test_the_fitted_constant_is_the_best_of_the_grid() -> None:
    large, small, targets = (torch.cat(part) for part in documents(0, 5))
    best = fit_constant(texts(0, 5))
    assert 0.3 < best.weight < 0.7
    for weight in (0.0, 0.2, 0.8, 1.0):
        assert loss(best(large, small, small), targets) < loss(mix(large, small, weight), targets)


def test_a_model_that_is_always_right_gets_all_the_weight() -> None:
    large, small, targets = (torch.cat(part) for part in documents(0, 3))
    right = torch.nn.functional.one_hot(targets, 10) * 9.0
    assert fit_constant([observed(large, right, targets)]).weight == 1
    assert fit_constant([observed(right, small, targets)]).weight == 0


def test_the_learnt_weight_follows_who_is_sure() -> None:
    rule = fit_entropy_mix(texts(0, 100), epochs=3, seed=0)
    large, small, targets = (torch.cat(part) for part in documents(1, 5))
    constant = fit_constant(texts(1, 5))
    assert loss(rule(large, small, small), targets) < loss(constant(large, small, small), targets) - 0.1
    weight = rule.weight(torch.cat([text.features for text in texts(1, 5)]))
    assert weight[1::2].mean() > weight[::2].mean() + 0.3
    assert not any(parameter.requires_grad for parameter in rule.net.parameters())


def test_a_fit_is_its_seed_s_and_moves_no_other_random_number() -> None:
    before = torch.random.get_rng_state()
    one, same, other = (fit_entropy_mix(texts(0, 3), epochs=2, seed=seed).tensors for seed in (5, 5, 6))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("num_rows", [3, 41])
def test_what_is_seen_on_rows_is_what_the_mixture_scores(tiny_model: Path, tiny_large: Path, num_rows: int) -> None:
    large, small = (loading.load_base(ModelSpec(str(path))) for path in (tiny_large, tiny_model))
    some = rows(num_rows)
    found = observe(large, small, some, None)
    assert len(found) == num_rows
    log_p = torch.cat([text.log_p for text in found])
    expected = -torch.logaddexp(log_p[:, 0] + torch.tensor(0.7).log(), log_p[:, 1] + torch.tensor(0.3).log()).mean()
    proxy = ProxyModel(large, small, rule=Mix(0.3))
    assert float(expected) == pytest.approx(evaluation.score(proxy, some, 8).loss, rel=1e-4)
