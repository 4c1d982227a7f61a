"""The rules by hand, at their ends, and fitted."""

import math

import pytest
import torch
from torch import Tensor

from kilofed.errors import RecipeError
from kilofed.proxy.combination import Difference, Mix, combine, complete, fit_constant, fit_mix, mix, nucleus, realign

LARGE, TUNED, BASE = torch.tensor([1.0, 2.0, -1.0]), torch.tensor([0.5, 0.0, 3.0]), torch.tensor([0.25, 1.0, 1.0])


def test_combine_by_hand() -> None:
    assert combine(LARGE, TUNED, BASE, 2.0).tolist() == [1.5, 0.0, 3.0]
    assert torch.equal(combine(LARGE, TUNED, BASE, 0.0), LARGE)


def test_realign_is_the_weighted_sum_of_its_source() -> None:
    for weight in (0.0, 1 / 6, 1.0, 3.0):
        torch.testing.assert_close(realign(LARGE, TUNED, weight), weight * TUNED + (1 - weight) * LARGE)


def test_mix_adds_probabilities() -> None:
    expected = 0.3 * LARGE.softmax(-1) + 0.7 * TUNED.softmax(-1)
    torch.testing.assert_close(mix(LARGE, TUNED, 0.3).exp(), expected)
    torch.testing.assert_close(mix(LARGE, TUNED, 1.0), LARGE.log_softmax(-1))
    torch.testing.assert_close(mix(LARGE, TUNED, 0.0), TUNED.log_softmax(-1))


def test_mix_takes_a_weight_per_position() -> None:
    large, small = torch.stack([LARGE, LARGE]), torch.stack([TUNED, TUNED])
    found = mix(large, small, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(found, torch.stack([LARGE.log_softmax(-1), TUNED.log_softmax(-1)]))


def test_a_share_beyond_one_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"1\.5; it must be from 0 to 1"):
        Mix(1.5)


def test_the_nucleus_is_the_smallest_set_that_holds_the_share() -> None:
    scores = torch.tensor([0.1, 0.5, 0.1, 0.3]).log()
    assert nucleus(scores, 0.5).isfinite().tolist() == [False, True, False, False]
    assert nucleus(scores, 0.6).isfinite().tolist() == [False, True, False, True]
    assert torch.equal(nucleus(scores, 1.0), scores)
    ruled = Difference(1.0, nucleus=0.5)(scores, torch.tensor([9.0, 0, 0, 0]), torch.zeros(4))
    assert ruled.argmax() == 1  # The offset cannot bring back what the large model's nucleus left out.


def test_scores_of_all_tokens_complete_to_themselves() -> None:
    seen = LARGE.log_softmax(-1)
    assert torch.equal(complete(seen, BASE), seen)


def test_the_rest_is_shared_as_the_base_shares_it() -> None:
    seen = torch.tensor([math.log(0.6), -math.inf, -math.inf])
    whole = complete(seen, BASE).exp()
    torch.testing.assert_close(whole[0], torch.tensor(0.6))
    torch.testing.assert_close(whole[1:], 0.4 * BASE[1:].softmax(-1))
    torch.testing.assert_close(whole.sum(), torch.tensor(1.0))


def test_no_unseen_token_gets_more_than_the_least_seen_one() -> None:
    seen = torch.tensor([0.5, 0.2, 0, 0, 0]).log()
    base = torch.tensor([0.1, 0.1, 0.64, 0.12, 0.04]).log()
    # 0.3 in proportions 16:3:1 is 0.24, 0.045, 0.015; the first may have 0.2, the others get 0.1 as 3:1.
    torch.testing.assert_close(complete(seen, base).exp(), torch.tensor([0.5, 0.2, 0.2, 0.075, 0.025]))


def test_a_base_that_is_the_large_model_completes_it_exactly() -> None:
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    log_p = logits.log_softmax(-1)
    top = log_p.topk(4)
    seen = torch.full_like(log_p, -math.inf).scatter(-1, top.indices, top.values)
    torch.testing.assert_close(complete(seen, logits), log_p)


def test_seen_tokens_that_hold_everything_leave_the_rest_next_to_nothing() -> None:
    whole = complete(torch.tensor([1e-7, -math.inf]), torch.zeros(2))  # Rounded above 1.
    assert whole.isfinite().all()
    assert whole[1] < -15


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


def loss(scores: Tensor, targets: Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(scores, targets))


def test_the_fitted_constant_is_the_best_of_the_grid() -> None:
    large, small, targets = (torch.cat(part) for part in documents(0, 5))
    best = fit_constant(large, small, targets)
    assert 0.3 < best.weight < 0.7
    for weight in (0.0, 0.2, 0.8, 1.0):
        assert loss(best(large, small, small), targets) < loss(mix(large, small, weight), targets)


def test_the_learnt_weight_follows_who_is_sure() -> None:
    rule = fit_mix(*documents(0, 100), epochs=3)
    large, small, targets = (torch.cat(part) for part in documents(1, 5))
    constant = fit_constant(large, small, targets)
    assert loss(rule(large, small, small), targets) < loss(constant(large, small, small), targets) - 0.1
    share = rule.share(large, small)
    assert share[::2].mean() > share[1::2].mean() + 0.3
    assert not any(parameter.requires_grad for parameter in rule.parameters())
