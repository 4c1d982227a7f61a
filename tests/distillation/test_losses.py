"""Distillation losses against closed forms, finite differences and the full sum."""

import math

import pytest
import torch
from torch import Tensor

from kilofed.distillation import losses
from kilofed.errors import ModelError

BOTH = pytest.mark.parametrize("kl", [losses.forward_kl, losses.reverse_kl])


def scores(seed: int, positions: int = 5, tokens: int = 11) -> Tensor:
    return 3 * torch.randn(positions, tokens, generator=torch.Generator().manual_seed(seed))


def test_forward_kl_of_two_tokens_by_hand() -> None:
    teacher, student = torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.5, 0.5]]).log()
    expected = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert losses.forward_kl(teacher, student).item() == pytest.approx(expected, rel=1e-6)


def test_reverse_kl_of_two_tokens_by_hand() -> None:
    teacher, student = torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.5, 0.5]]).log()
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert losses.reverse_kl(teacher, student).item() == pytest.approx(expected, rel=1e-6)


@BOTH
@pytest.mark.parametrize("k", [0, 1, 4, 11])
def test_equal_distributions_are_zero_apart_for_any_k(kl, k: int) -> None:
    logits = scores(0)
    teacher = losses.top_k(logits, k, 2.0) if k else logits
    assert kl(teacher, logits + 7.0, 2.0).abs().max() < 1e-5  # A constant moves no probability.


@BOTH
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_top_k_of_the_whole_vocabulary_is_the_full_kl(kl, temperature: float) -> None:
    teacher, student = scores(1), scores(2)
    torch.testing.assert_close(
        kl(losses.top_k(teacher, 11, temperature), student, temperature), kl(teacher, student, temperature)
    )


@BOTH
def test_smaller_k_never_gives_a_larger_kl(kl) -> None:
    teacher, student = scores(1), scores(2)
    by_k = torch.stack([kl(losses.top_k(teacher, k), student) for k in range(1, 12)])
    assert (by_k.diff(dim=0) >= -1e-6).all()
    assert (by_k >= 0).all()
    assert (by_k[2] < by_k[-1] - 1e-3).all()


@BOTH
def test_the_rest_is_one_bucket(kl) -> None:
    teacher, student = scores(3), scores(4)
    known = losses.top_k(teacher, 3)
    p, q = teacher.softmax(1), student.softmax(1)
    coarse = [
        torch.cat([x.gather(1, known.ids_NK), 1 - x.gather(1, known.ids_NK).sum(1, keepdim=True)], 1) for x in (p, q)
    ]
    torch.testing.assert_close(kl(known, student), kl(coarse[0].log(), coarse[1].log()), rtol=1e-4, atol=1e-5)


def test_the_gradient_of_forward_kl_is_the_difference_of_probabilities() -> None:
    teacher, student = scores(5), scores(6).requires_grad_()
    losses.forward_kl(teacher, student).sum().backward()
    torch.testing.assert_close(student.grad, student.detach().softmax(1) - teacher.softmax(1))


@BOTH
@pytest.mark.parametrize("k", [0, 3])
def test_gradients_are_those_of_finite_differences(kl, k: int) -> None:
    teacher, student = scores(7, 2, 6), scores(8, 2, 6).requires_grad_()
    target = losses.top_k(teacher, k, 2.0) if k else teacher
    kl(target, student, 2.0).sum().backward()
    step = 1e-2
    for row, word in ((0, 0), (1, 3), (1, 5)):
        moved = torch.zeros_like(teacher)
        moved[row, word] = step
        up, down = (kl(target, student.detach() + sign * moved, 2.0).sum().item() for sign in (1, -1))
        assert student.grad[row, word].item() == pytest.approx((up - down) / (2 * step), abs=2e-3)


@BOTH
def test_the_factor_keeps_the_gradient_as_large_at_a_high_temperature(kl) -> None:
    # At a high temperature both tend to (1/V) (student - teacher) of centred logits: Hinton et al., equation 4.
    teacher, student = scores(9), scores(10).requires_grad_()
    kl(teacher, student, 1000.0).sum().backward()
    centred = [x - x.mean(1, keepdim=True) for x in (student.detach(), teacher)]
    torch.testing.assert_close(student.grad, (centred[0] - centred[1]) / 11, rtol=0.02, atol=0.002)


@BOTH
@pytest.mark.parametrize("k", [0, 3])
def test_no_gradient_reaches_the_teacher(kl, k: int) -> None:
    teacher, student = scores(11).requires_grad_(), scores(12).requires_grad_()
    kl(losses.top_k(teacher, k) if k else teacher, student).sum().backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_a_teacher_whose_top_tokens_hold_all_mass_gives_finite_losses() -> None:
    given = losses.TopK(torch.tensor([[3, 1]]), torch.tensor([[0.0, -9.0]]), torch.tensor([-math.inf]), 5)
    student = scores(14, 1, 5).requires_grad_()
    both = losses.forward_kl(given, student) + losses.reverse_kl(given, student)
    both.sum().backward()
    assert both.isfinite().all()
    assert student.grad.isfinite().all()


def test_spread_sums_to_one_and_keeps_the_best() -> None:
    teacher = losses.top_k(scores(15), 4)
    dense = losses.spread(teacher)
    torch.testing.assert_close(dense.exp().sum(1), torch.ones(5))
    assert torch.equal(dense.gather(1, teacher.ids_NK), teacher.log_probs_NK)
    torch.testing.assert_close(losses.spread(losses.top_k(scores(15), 11)), scores(15).log_softmax(1))


def test_entropy_of_equal_chances_is_the_log_of_their_number() -> None:
    assert losses.entropy(torch.zeros(1, 8)).item() == pytest.approx(math.log(8))
    assert losses.entropy(losses.top_k(torch.zeros(1, 8), 8)).item() == pytest.approx(math.log(8))
    assert losses.entropy(losses.top_k(torch.zeros(1, 8), 4)).item() == pytest.approx(
        -4 / 8 * math.log(1 / 8) - 0.5 * math.log(0.5)
    )


@pytest.mark.parametrize(("packing", "most"), [("float16", 0.01), ("int8", 0.06)])
@pytest.mark.parametrize("k", [1, 4, 11])
def test_packed_scores_come_back_within_a_step(packing: losses.Packing, most: float, k: int) -> None:
    teacher = losses.top_k(scores(16), k, 2.0)
    packed = losses.pack(teacher, packing)
    back = losses.unpack(packed, 11, 2.0)
    assert torch.equal(back.ids_NK, teacher.ids_NK)
    assert (back.log_probs_NK - teacher.log_probs_NK).abs().max() < most
    assert torch.equal(back.rest_N.isfinite(), teacher.rest_N.isfinite())
    torch.testing.assert_close(back.log_probs_NK.exp().sum(1) + back.rest_N.exp(), torch.ones(5))
    id_dtype = sum(t.numel() * t.element_size() for t in packed.values()) - 5 * 2 * k
    assert id_dtype == {"float16": 5 * 2 * (k + 1), "int8": 5 * (k + 1 + 8)}[packing]


def test_a_large_vocabulary_keeps_its_word_numbers() -> None:
    logits = torch.zeros(1, 70_000)
    logits[0, 69_999] = 5.0
    packed = losses.pack(losses.top_k(logits, 1), "int8")
    assert losses.unpack(packed, 70_000).ids_NK.item() == 69_999


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ModelError, match="one tokeniser"):
        losses.forward_kl(scores(0), scores(0, tokens=12))
    with pytest.raises(ModelError, match="one tokeniser"):
        losses.reverse_kl(losses.top_k(scores(0), 3), scores(0, positions=4))
    with pytest.raises(ModelError, match="temperature 1, the loss is at 2"):
        losses.forward_kl(losses.top_k(scores(0), 3), scores(0), 2.0)
    packed = losses.pack(losses.top_k(scores(0), 3), "float16")
    for broken in ({}, {**packed, "values": packed["values"][:, 1:]}):
        with pytest.raises(ModelError, match="packed teacher scores are"):
            losses.unpack(broken, 11)
    with pytest.raises(ModelError, match="and below 4"):
        losses.unpack(packed, 4)


@pytest.mark.parametrize("packing", ["float16", "int8"])
def test_packed_scores_that_pack_does_not_write_are_refused(packing: losses.Packing) -> None:
    packed = losses.pack(losses.top_k(scores(0), 3), packing)
    losses.unpack(packed, 11)
    ids, values = packed["ids"], packed["values"]
    twice, negative = ids.clone(), ids.clone()
    twice[2, 1], negative[4, 0] = twice[2, 0], -1
    changes: list[dict[str, Tensor]] = [
        {"ids": twice}, {"ids": negative}, {"ids": ids.int()}, {"ids": ids.half()}, {"ids": ids[1:]}, {"ids": ids[0]},
        {"ids": ids[..., None]}, {"values": values[1:]}, {"values": values.float()}, {"values": values[:, 0]},
        {"more": values},
    ]  # fmt: skip
    if packing == "float16":
        odd = [torch.full((), value).half() for value in (math.nan, math.inf)]
        changes += [{"values": values.index_put((torch.tensor(1), torch.tensor(2)), one)} for one in odd]
        changes += [{"values": torch.full_like(values, -math.inf)}, {"scales": torch.ones(5, 2)}]
    else:
        scales = packed["scales"]
        changes += [
            {"scales": scales.half()}, {"scales": scales[1:]}, {"scales": scales.flip(1)}, {"scales": scales[:, :1]},
            {"scales": torch.full_like(scales, math.nan)}, {"scales": torch.tensor([[-3e38, 3e38]]).expand(5, 2)},
            {"values": torch.full_like(values, losses.NO_MASS)},
        ]  # fmt: skip
        with pytest.raises(ModelError, match="packed teacher scores are"):
            losses.unpack({"ids": ids, "values": values}, 11)
    for change in changes:
        with pytest.raises(ModelError, match="packed teacher scores are"):
            losses.unpack(packed | change, 11)
