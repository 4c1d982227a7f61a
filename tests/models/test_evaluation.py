"""Scores against transformers' own loss, closed forms, and one answer at a time."""

import math
import statistics
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from kilofed.config.recipe import EvaluateSpec, ModelSpec
from kilofed.data.examples import IGNORED, Example
from kilofed.models import evaluation, loading
from kilofed.models.evaluation import Scores, macro_f1


def row(prompt: list[int], answer: list[int], *references: str) -> Example:
    return Example(prompt + answer, [IGNORED] * len(prompt) + answer, prompt, list(references))


ROWS = [
    row([1, 40, 41], [50, 51, 2], "ab"),
    row([1, 60], [70, 71, 72, 73, 2], "cd", "ef"),
    row([1, 80, 81, 82, 83, 84], [90], "gh"),
]


class Always(nn.Module):
    """Says token 7 with a fixed margin, whatever it is given."""

    def __init__(self, margin: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(margin))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        logits = torch.zeros(*input_ids.shape, 10)
        logits[..., 7] = self.scale
        return SimpleNamespace(logits=logits)


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> nn.Module:
    return loading.load_base(ModelSpec(str(tiny_model)))


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return loading.load_tokenizer(ModelSpec(str(tiny_model)))


def test_the_loss_is_transformers_own_over_all_tokens(base: nn.Module) -> None:
    total, tokens = 0.0, 0
    for one in ROWS:
        count = sum(label != IGNORED for label in one.labels)
        with torch.inference_mode():
            found = base(input_ids=torch.tensor([one.input_ids]), labels=torch.tensor([one.labels])).loss
        total, tokens = total + float(found) * count, tokens + count
    score = evaluation.score(base, ROWS, 2)
    assert score.num_tokens == tokens == 9
    assert score.loss == pytest.approx(total / tokens, rel=1e-6)


def test_loss_and_accuracy_of_a_known_distribution() -> None:
    rows = [row([1], [7, 7, 7]), row([1], [3])]
    score = evaluation.score(Always(2.0), rows, 8)
    others = math.log(math.exp(2.0) + 9)
    assert score.loss == pytest.approx((3 * (others - 2.0) + others) / 4)
    assert score.accuracy == 0.75
    assert score.perplexity == pytest.approx(math.exp(score.loss))


def test_the_order_of_rows_does_not_change_a_bit(base: nn.Module) -> None:
    assert evaluation.score(base, ROWS, 2) == evaluation.score(base, ROWS[::-1], 2)


def test_the_batch_size_does_not_change_the_score(base: nn.Module) -> None:
    one, three = evaluation.score(base, ROWS, 1), evaluation.score(base, ROWS, 3)
    assert one.loss == pytest.approx(three.loss, rel=1e-6)
    assert one.accuracy == three.accuracy


def test_answers_of_a_padded_batch_are_the_single_answers(base: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = [[1, 40], [1, 60, 61, 62, 63, 64, 65, 66], [1], [1, 80, 81]]
    together = evaluation.answer(base, tokenizer, prompts, 12)
    assert together == [evaluation.answer(base, tokenizer, [prompt], 12)[0] for prompt in prompts]
    assert len(set(together)) > 1


def test_an_answer_is_greedy_decoding(base: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = [1, 90, 91]
    with torch.inference_mode():
        for _ in range(6):
            ids.append(int(base(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    expected = tokenizer.decode(ids[3:], skip_special_tokens=True)
    assert evaluation.answer(base, tokenizer, [[1, 90, 91]], 6) == [expected]


def test_score_all_answers_the_first_rows_only(base: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    spec = EvaluateSpec(generate=2, max_new_tokens=5)
    answers = evaluation.answer(base, tokenizer, [one.prompt_ids for one in ROWS[:2]], 5)
    right = [Example(*ROWS[0][:3], [answers[0]]), Example(*ROWS[1][:3], ["nothing like it"]), ROWS[2]]
    score = evaluation.score_all(base, tokenizer, right, spec)
    assert score.exact_match == 0.5
    assert score.rouge_l == pytest.approx(
        statistics.fmean(evaluation.rouge_l(a, r.references) for a, r in zip(answers, right, strict=False))
    )
    assert score.loss == evaluation.score(base, right, spec.batch_size).loss


def test_without_references_nothing_is_generated(base: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    for rows, spec in (([row([1, 5], [6])], EvaluateSpec()), (ROWS, EvaluateSpec(generate=0))):
        score = evaluation.score_all(base, tokenizer, rows, spec)
        assert (score.rouge_l, score.exact_match) == (None, None)


def test_rouge_l_of_known_pairs() -> None:
    assert evaluation.rouge_l("the cat sat", ["the cat sat"]) == 1.0
    assert evaluation.rouge_l("dog", ["the cat sat"]) == 0.0
    # Longest common subsequence 2: precision 2/2, recall 2/4.
    assert evaluation.rouge_l("the mat", ["the cat sat mat"]) == pytest.approx(2 / 3)
    assert evaluation.rouge_l("returning values", ["returns the value"]) == pytest.approx(0.8)  # By their stems.


def test_the_best_reference_counts() -> None:
    assert evaluation.rouge_l("the cat", ["a dog", "the cat"]) == 1.0
    assert evaluation.exact_match("the cat", ["a dog", "The Cat "])


def test_exact_match_ignores_case_and_outer_white_space_only() -> None:
    assert evaluation.exact_match(" Return X.\n", ["return x."])
    assert not evaluation.exact_match("return x", ["return x."])
    assert not evaluation.exact_match("return  x.", ["return x."])


def test_the_interval_is_students() -> None:
    # t(0.975, 3) = 3.18245; the deviation of 1, 2, 3, 4 is sqrt(5/3).
    low, high = evaluation.interval([1.0, 2.0, 3.0, 4.0]) or (0, 0)
    half = 3.18245 * math.sqrt(5 / 3) / 2
    assert (low, high) == (pytest.approx(2.5 - half, rel=1e-5), pytest.approx(2.5 + half, rel=1e-5))


def test_fewer_than_two_values_have_no_interval() -> None:
    assert evaluation.interval([]) is None
    assert evaluation.interval([1.0]) is None
    assert evaluation.interval([1.0, 1.0]) == (1.0, 1.0)


def test_a_row_of_the_table_is_the_mean_over_clients() -> None:
    found = evaluation.summarise([Scores(1.0, 0.5, 10, 0.25, 1.0), Scores(3.0, 0.7, 90, 0.75, 0.0)], [2, 5])
    assert (found.loss, found.accuracy, found.rouge_l, found.exact_match) == (2.0, 0.6, 0.5, 0.5)
    assert found.perplexity == pytest.approx(math.exp(2.0))
    assert found.interval == evaluation.interval([1.0, 3.0])
    assert [(client.id, client.loss, client.num_tokens) for client in found.clients] == [(2, 1.0, 10), (5, 3.0, 90)]


def test_scores_that_were_not_taken_are_none() -> None:
    found = evaluation.summarise([Scores(1.0, 0.5, 10)], [0])
    assert (found.rouge_l, found.exact_match, found.interval) == (None, None, None)


def test_macro_f1_is_the_mean_over_classes_that_occur() -> None:
    # Class 0: 3 of 4 right, given to 4 rows; class 1: 1 of 2 right, given to 2; class 2 never held, given to none.
    pairs = Counter({(0, 0): 3, (0, 1): 1, (1, 1): 1, (1, 0): 1})
    assert macro_f1(pairs) == pytest.approx((2 * 3 / (4 + 4) + 2 * 1 / (2 + 2)) / 2)
    assert macro_f1(pairs + Counter({(3, 0): 1})) == pytest.approx((6 / 9 + 2 / 4 + 0) / 3)
    assert macro_f1(Counter({(5, 5): 7})) == 1.0
    assert macro_f1(Counter()) == 0.0


def test_classes_are_scored_by_row_and_have_no_perplexity(tiny_encoder: Path) -> None:
    found = loading.load_classifier(ModelSpec(str(tiny_encoder)), "mean", 0, ("a", "b", "c"))
    with torch.no_grad():
        found.score.bias[1] = 0.1  # Every row is taken for a b.
    rows = [Example([5, 6], [], [], [], 1), Example([7], [], [], [], 0), Example([8, 9], [], [], [], 1)]
    scores = evaluation.score(found, rows, 2)
    chance = torch.tensor([0.0, 1.0, 0.0]).log_softmax(0)
    assert scores.loss == pytest.approx(-float(chance[1] * 2 + chance[0]) / 3, rel=1e-6)
    assert (scores.accuracy, scores.num_tokens) == (pytest.approx(2 / 3), 3)
    assert scores.macro_f1 == pytest.approx((2 * 2 / (2 + 3) + 0) / 2)
    assert scores.perplexity is None
    assert evaluation.summarise([scores], [0]).perplexity is None


def test_a_class_that_is_only_guessed_lowers_macro_f1() -> None:
    # Class 0: 3 of 4 right, given to 3 rows; class 9: held by no row and given to one, so its F1 is 0.
    assert macro_f1(Counter({(0, 0): 3, (0, 9): 1})) == pytest.approx((2 * 3 / (4 + 3) + 0) / 2)
