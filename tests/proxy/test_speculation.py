"""Speculation says what the plain loop says: token by token when greedy, in distribution when drawn."""

import itertools
from collections import Counter

import pytest
import torch
from scipy.stats import chisquare
from tests.tiny_models import adapted, model
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from kilofed.errors import ModelError
from kilofed.generation.decoding import ModelGenerator, Sampling, probabilities
from kilofed.proxy.combination import Difference, Mix
from kilofed.proxy.model import ProxyModel
from kilofed.proxy.speculation import Drafting, Speculation, accept_or_resample, tokens_per_cost

PROMPT = [1, 5, 9, 30, 7]


def plain(proxy: ProxyModel, sampling: Sampling, prompt: list[int] = PROMPT) -> list[int]:
    return [token.id for token in ModelGenerator(proxy, proxy.end_ids).generate_tokens(prompt, sampling)]


@pytest.mark.parametrize("longest", [1, 2, 5])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_greedy_speculation_is_the_plain_loop(longest: int, alpha: float, seed: int) -> None:
    drafting = Drafting(longest=longest, shortest=longest)
    proxy = ProxyModel(model(seed, width=24), adapted(seed + 10), rule=Difference(alpha), drafting=drafting)
    sampling = Sampling(max_new_tokens=30, num_logprobs=3)
    spoken = list(proxy.generate_tokens(PROMPT, sampling))
    expected = list(ModelGenerator(proxy, proxy.end_ids).generate_tokens(PROMPT, sampling))
    assert [t.id for t in spoken] == [t.id for t in expected]
    for one, other in zip(spoken, expected, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [i for i, _ in one.top] == [i for i, _ in other.top]


def test_greedy_speculation_is_generate() -> None:
    proxy = ProxyModel(model(0, width=24), adapted(3), rule=Difference(0.5))
    out = proxy.generate(input_ids=torch.tensor([PROMPT]), max_new_tokens=30, do_sample=False)[0, len(PROMPT) :]
    assert [token.id for token in proxy.generate_tokens(PROMPT, Sampling(max_new_tokens=30))] == out.tolist()


def test_two_small_modules_and_a_rule_without_a_base_speculate_too() -> None:
    sampling = Sampling(max_new_tokens=20)
    for proxy in (
        ProxyModel(model(0, width=24), adapted(3), model(3), Difference(0.5)),
        ProxyModel(model(0, width=24), model(3), rule=Mix(0.6)),
    ):
        assert [t.id for t in proxy.generate_tokens(PROMPT, sampling)] == plain(proxy, sampling)


def test_drafts_of_the_target_itself_all_stand() -> None:
    proxy = ProxyModel(model(3), adapted(3))  # The large model is the small base, so the target is the draft.
    speculation = Speculation(proxy, Sampling(max_new_tokens=21), Drafting(longest=4, shortest=4))
    assert len(list(speculation.tokens(PROMPT))) == 21
    assert speculation.num_accepted == speculation.num_drafted == 16
    assert speculation.num_cycles == 5


def test_drafts_of_a_stranger_cost_cycles_but_no_tokens() -> None:
    proxy = ProxyModel(model(0, width=24), adapted(3), rule=Difference(0.0))
    speculation = Speculation(proxy, Sampling(max_new_tokens=20), Drafting(longest=4))
    spoken = [token.id for token in speculation.tokens(PROMPT)]
    assert spoken == plain(proxy, Sampling(max_new_tokens=20))
    assert speculation.num_accepted < speculation.num_drafted


def test_the_answer_ends_at_an_end_token_and_at_the_context() -> None:
    proxy = ProxyModel(model(0, width=24, context=20), adapted(3, model(3, context=24)), rule=Difference(0.5))
    free = plain(proxy, Sampling(max_new_tokens=100))
    assert len(free) == 20 - len(PROMPT)
    proxy.end_ids = frozenset({free[6]})
    ended = [token.id for token in proxy.generate_tokens(PROMPT, Sampling(max_new_tokens=100))]
    assert ended == free[: free.index(free[6]) + 1]
    with pytest.raises(ModelError, match="shorten it"):
        next(proxy.generate_tokens([1] * 20, Sampling()))


def test_answers_advanced_in_turns_do_not_meet() -> None:
    proxy = ProxyModel(model(0, width=24), adapted(3), rule=Difference(0.5))
    prompts = [PROMPT, [1, 8], [1, 22, 3, 4]]
    sampling = Sampling(max_new_tokens=12, temperature=0.8, seed=4)
    alone = [[t.id for t in proxy.generate_tokens(p, sampling)] for p in prompts]
    turns = itertools.zip_longest(*(proxy.generate_tokens(p, sampling) for p in prompts))
    together = [[t.id for t in stream if t is not None] for stream in zip(*turns, strict=True)]
    assert together == alone


def test_equal_seeds_draw_equal_tokens() -> None:
    proxy = ProxyModel(model(0, width=24), adapted(3), rule=Difference(0.5))
    drawn = [
        [t.id for t in proxy.generate_tokens(PROMPT, Sampling(15, temperature=1.0, seed=seed))] for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_model_that_cannot_forget_speaks_plainly() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = MistralConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, sliding_window=4, max_position_embeddings=64, initializer_range=0.3,
        )  # fmt: skip
        large = MistralForCausalLM(config).eval()
    proxy = ProxyModel(large, adapted(3), rule=Difference(0.5))
    sampling = Sampling(max_new_tokens=20)
    assert [token.id for token in proxy.generate_tokens(PROMPT, sampling)] == plain(proxy, sampling)


P = torch.tensor([0.5, 0.2, 0.2, 0.1, 0.0])
Q = torch.tensor([0.1, 0.6, 0.1, 0.1, 0.1])


def drawn(rule: str, count: int = 20_000) -> Tensor:
    """How often each token came, under the rule or a wrong one."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(len(P))
    for draft in torch.multinomial(Q, count, replacement=True, generator=generator).tolist():
        if rule == "residual":
            token = accept_or_resample(P, Q, draft, generator)
        else:  # Redrawn from the whole target: the mistake that is easily made.
            stands = float(torch.rand((), generator=generator)) * Q[draft] < P[draft]
            token = draft if stands else int(torch.multinomial(P, 1, generator=generator))
        counts[token] += 1
    return counts


def test_a_draft_that_stands_or_is_redrawn_is_distributed_as_the_target() -> None:
    counts = drawn("residual")
    assert counts[4] == 0
    assert chisquare(counts[:4].numpy(), (P[:4] * counts.sum()).numpy()).pvalue > 0.001


def test_the_same_measure_finds_a_wrong_rule() -> None:
    counts = drawn("whole")
    assert chisquare(counts[:4].numpy(), (P[:4] * counts.sum()).numpy()).pvalue < 1e-9


@pytest.mark.slow
def test_drawn_answers_have_the_plain_loop_s_distribution() -> None:
    top_p = 0.95
    large, small = model(0, vocabulary=4), adapted(3, model(3, vocabulary=4))
    proxy = ProxyModel(large, small, rule=Difference(0.5), drafting=Drafting(longest=2))
    exact = answers(proxy, Sampling(temperature=1.3, top_p=top_p))
    count = 500
    found = Counter(
        tuple(
            token.id for token in proxy.generate_tokens([1, 3], Sampling(3, temperature=1.3, top_p=top_p, seed=seed))
        )
        for seed in range(count)
    )
    assert set(found) <= set(exact)
    common = [answer for answer, p in exact.items() if p * count >= 5]
    rest = count - sum(found[a] for a in common), count * (1 - sum(exact[a] for a in common))
    seen, wanted = [found[a] for a in common] + [rest[0]], [exact[a] * count for a in common] + [rest[1]]
    assert len(common) > 8
    assert chisquare(seen, wanted).pvalue > 0.001


@torch.no_grad()
def answers(proxy: ProxyModel, sampling: Sampling) -> dict[tuple[int, ...], float]:
    """The probability of every answer of three tokens to the prompt 1, 3, in double precision from whole forwards."""
    exact = {}
    texts = torch.tensor([[1, 3, a, b] for a in range(4) for b in range(4)])
    shares = probabilities(proxy(texts).logits, sampling).double()
    shares /= shares.sum(-1, keepdim=True)
    for row, text in zip(shares, texts.tolist(), strict=True):
        for last in range(4):
            p = float(row[1, text[2]] * row[2, text[3]] * row[3, last])
            if p > 0:
                exact[text[2], text[3], last] = p
    return exact


def test_gain_is_tokens_per_cost() -> None:
    assert tokens_per_cost(0.5, 1, 0.0, 0.0) == pytest.approx(1.5)
    assert tokens_per_cost(0.0, 4, 0.1, 0.0) == pytest.approx(1 / 1.5)
    good = [tokens_per_cost(0.9, length, 0.1, 0.1) for length in range(1, 9)]
    poor = [tokens_per_cost(0.1, length, 0.1, 0.1) for length in range(1, 9)]
    assert good.index(max(good)) > 1
    assert poor.index(max(poor)) == 0
