"""The rules by hand and at their ends."""

import math

import pytest
import torch

from kilofed.errors import RecipeError
from kilofed.proxy.combination import EntropyMix, Mix, combine, complete, mix, realign

LARGE, TUNED, BASE = torch.tensor([1.0, 2.0, -1.0]), torch.tensor([0.5, 0.0, 3.0]), torch.tensor([0.25, 1.0, 1.0])


def test_combine_by_hand() -> None:
    assert combine(LARGE, TUNED, BASE, 2.0).tolist() == [1.5, 0.0, 3.0]
    assert torch.equal(combine(LARGE, TUNED, BASE, 0.0), LARGE)


def test_realign_is_the_weighted_sum_of_its_source() -> None:
    for weight in (0.0, 1 / 6, 1.0, 3.0):
        torch.testing.assert_close(realign(LARGE, TUNED, weight), weight * TUNED + (1 - weight) * LARGE)


def test_mix_adds_probabilities() -> None:
    expected = 0.7 * LARGE.softmax(-1) + 0.3 * TUNED.softmax(-1)
    torch.testing.assert_close(mix(LARGE, TUNED, 0.3).exp(), expected)
    torch.testing.assert_close(mix(LARGE, TUNED, 0.0), LARGE.log_softmax(-1))
    torch.testing.assert_close(mix(LARGE, TUNED, 1.0), TUNED.log_softmax(-1))


def test_mix_takes_a_weight_per_position() -> None:
    large, small = torch.stack([LARGE, LARGE]), torch.stack([TUNED, TUNED])
    found = mix(large, small, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(found, torch.stack([LARGE.log_softmax(-1), TUNED.log_softmax(-1)]))


def test_a_share_beyond_one_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"1\.5; it must be from 0 to 1"):
        Mix(1.5)


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


def test_an_entropy_mix_comes_back_from_its_tensors() -> None:
    one, other = EntropyMix(seed=3), EntropyMix(seed=4)
    again = EntropyMix(one.tensors, seed=4)
    assert torch.equal(again(LARGE, TUNED, BASE), one(LARGE, TUNED, BASE))
    assert not torch.equal(other(LARGE, TUNED, BASE), one(LARGE, TUNED, BASE))
    assert not any(parameter.requires_grad for parameter in again.net.parameters())


def test_an_entropy_mix_takes_logits_that_rule_tokens_out() -> None:
    large = torch.tensor([0.0, -math.inf, 0.0])
    assert EntropyMix(seed=0)(large, TUNED, BASE).isfinite().all()
