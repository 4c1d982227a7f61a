"""How a next token is chosen, and a single model that generates."""

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GenerationConfig

from kilofed.config.recipe import AdapterSpec, ModelSpec
from kilofed.errors import ModelError
from kilofed.generation.decoding import (
    ModelGenerator,
    Sampling,
    TokenGenerator,
    as_token,
    choose,
    context_of,
    end_ids_of,
    probabilities,
)
from kilofed.models import loading


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> nn.Module:
    return loading.load_base(ModelSpec(str(tiny_model)))


def generated(generator: ModelGenerator, prompt: list[int], sampling: Sampling) -> list[int]:
    return [token.id for token in generator.generate_tokens(prompt, sampling)]


def test_choose_at_temperature_0_takes_the_likeliest_and_draws_nothing() -> None:
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    token = choose(torch.tensor([0.0, 2.0, 1.0]), Sampling(num_logprobs=2), generator)
    assert token.id == 1
    assert torch.equal(generator.get_state(), before)
    total = math.log(1 + math.e**2 + math.e)
    assert token.logprob == pytest.approx(2 - total, abs=1e-6)
    assert [i for i, _ in token.top] == [1, 2]


def test_choose_draws_from_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -torch.inf])
    generator = torch.Generator().manual_seed(0)
    seen = Counter(choose(logits, Sampling(temperature=2.0), generator).id for _ in range(4000))
    wanted = torch.softmax(logits / 2, -1)
    assert seen[3] == 0
    # Five standard deviations of a share of 4000 draws.
    assert all(abs(seen[i] / 4000 - float(wanted[i])) < 5 * 0.5 / math.sqrt(4000) for i in range(4))


def test_logprobs_do_not_depend_on_the_sampling() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1))
    sampled = choose(logits, Sampling(temperature=0.7, top_p=0.5, num_logprobs=3), torch.Generator().manual_seed(0))
    assert sampled == as_token(logits, sampled.id, 3)


def test_top_p_keeps_the_smallest_set_that_holds_the_share() -> None:
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.25, 0.25, 0.25, 0.25]]).log()
    kept = probabilities(logits, Sampling(temperature=1.0, top_p=0.7))
    assert torch.allclose(kept[0], torch.tensor([0.0, 2 / 3, 0.0, 1 / 3]), atol=1e-6)
    assert int((kept[1] > 0).sum()) == 3
    assert torch.equal(probabilities(logits, Sampling(temperature=1.0, top_p=1.0)), torch.softmax(logits, -1))
    assert torch.equal(probabilities(logits, Sampling(temperature=1.0, top_p=0.0)) > 0, torch.eye(4)[[1, 0]] > 0)


def test_a_tiny_temperature_is_greedy_not_an_overflow() -> None:
    shares = probabilities(torch.tensor([-3e4, 3e4, 2.9e4]), Sampling(temperature=1e-30))
    assert shares.tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_choose_refuses_logits_that_are_not_numbers(temperature: float) -> None:
    with pytest.raises(ModelError, match="not numbers"):
        choose(torch.tensor([0.0, torch.nan]), Sampling(temperature=temperature), torch.Generator())


def test_solo_speaks_what_generate_generates(model: nn.Module) -> None:
    prompt = [1, 40, 50, 60]
    config = GenerationConfig(max_new_tokens=30, do_sample=False, pad_token_id=0, eos_token_id=2)  # type: ignore[no-untyped-call]
    with torch.inference_mode():
        out = model.generate(input_ids=torch.tensor([prompt]), generation_config=config)  # type: ignore[operator]
    assert generated(ModelGenerator(model, {2}), prompt, Sampling(30)) == out[0, len(prompt) :].tolist()


def test_solo_ends_after_an_end_token(model: nn.Module) -> None:
    free = generated(ModelGenerator(model, ()), [1, 40], Sampling(20, temperature=1.0, seed=5))
    ended = generated(ModelGenerator(model, {free[7]}), [1, 40], Sampling(20, temperature=1.0, seed=5))
    assert ended == free[: free.index(free[7]) + 1]


def test_equal_seeds_speak_equally_and_others_do_not(model: nn.Module) -> None:
    said = {
        seed: generated(ModelGenerator(model, ()), [1, 40], Sampling(20, temperature=1.0, seed=seed))
        for seed in (1, 2)
    }
    assert said[1] == generated(ModelGenerator(model, ()), [1, 40], Sampling(20, temperature=1.0, seed=1))
    assert said[1] != said[2]


def test_iterators_advanced_in_turns_do_not_see_each_other(model: nn.Module) -> None:
    generator = ModelGenerator(model, ())
    samplings = [Sampling(15, temperature=float(n % 2), seed=n, num_logprobs=4) for n in range(6)]
    alone = [list(generator.generate_tokens([1, 40 + n], s)) for n, s in enumerate(samplings)]
    streams = [generator.generate_tokens([1, 40 + n], s) for n, s in enumerate(samplings)]
    assert [list(tokens) for tokens in zip(*streams, strict=True)] == [list(t) for t in zip(*alone, strict=True)]


def test_nothing_is_computed_before_it_is_asked_for(model: nn.Module) -> None:
    stream = ModelGenerator(model, ()).generate_tokens([1, 40], Sampling(5))
    passes: list[int] = []
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    try:
        assert not passes
        next(stream)
        assert len(passes) == 1
    finally:
        handle.remove()
    assert not torch.is_inference_mode_enabled()


def test_score_is_the_log_softmax_of_one_forward(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [1, *range(40, 60)]
    with torch.inference_mode():
        logprobs = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0], -1)
    for rows in (256, 6, 1):
        monkeypatch.setattr("kilofed.generation.decoding.ROWS_AT_ONCE", rows)
        first, *rest = ModelGenerator(model, ()).score(ids, num_logprobs=2)
        assert first is None
        for position, token in enumerate(rest):
            assert token is not None
            assert token.id == ids[position + 1]
            assert token.logprob == pytest.approx(float(logprobs[position, token.id]), abs=1e-5)
            assert [i for i, _ in token.top] == logprobs[position].topk(2).indices.tolist()


def test_score_agrees_with_what_speak_said(model: nn.Module) -> None:
    generator = ModelGenerator(model, ())
    said = list(generator.generate_tokens([1, 40], Sampling(20, temperature=1.0, seed=3, num_logprobs=2)))
    again = generator.score([1, 40, *[token.id for token in said]], 2)[2:]
    for one, other in zip(said, again, strict=True):
        assert other is not None
        assert other.logprob == pytest.approx(one.logprob, abs=1e-5)


def test_an_answer_ends_where_the_context_is_full(model: nn.Module) -> None:
    generator = ModelGenerator(model, ())
    assert generator.context == context_of(model) == 128
    assert len(generated(generator, [1] * 125, Sampling(50))) == 3
    assert len(generator.score([1] * 128)) == 128


@pytest.mark.parametrize(("length", "words"), [(0, "no tokens"), (128, "128 tokens")])
def test_a_prompt_without_room_is_refused(model: nn.Module, length: int, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        next(ModelGenerator(model, ()).generate_tokens([1] * length, Sampling(5)))


def test_score_refuses_more_than_the_context(model: nn.Module) -> None:
    with pytest.raises(ModelError, match="129 tokens"):
        ModelGenerator(model, ()).score([1] * 129)


def test_solo_is_a_speaker_with_and_without_an_adapter(tiny_model: Path) -> None:
    plain = loading.load_base(ModelSpec(str(tiny_model)))
    said = generated(ModelGenerator(plain, ()), [1, 40], Sampling(10))
    adapted = loading.add_adapter(plain, AdapterSpec(rank=2), seed=0)
    generator = ModelGenerator(adapted, ())
    assert isinstance(generator, TokenGenerator)
    # A fresh LoRA product is zero.
    assert generated(generator, [1, 40], Sampling(10)) == said
    assert generator.context == 128


def test_end_ids_are_the_tokenisers_and_the_generation_configs(model: nn.Module) -> None:
    assert end_ids_of(model, 2) == {2}
    assert end_ids_of(model, None) == {2}
    model.generation_config.eos_token_id = [2, 7]
    try:
        assert end_ids_of(model, 3) == {2, 3, 7}
    finally:
        model.generation_config.eos_token_id = 2
    assert end_ids_of(nn.Identity(), None) == frozenset()
