"""A proxy of tiny random models: closed forms, the shared forward, generation, refusals."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tests.conftest import byte_tokenizer
from tests.tiny_models import adapted, model, padded

from kilofed.data.examples import Example
from kilofed.errors import ModelError
from kilofed.generation.decoding import Sampling
from kilofed.models import evaluation
from kilofed.models.loading import without_adapter
from kilofed.models.training import collate_tokens, token_losses
from kilofed.proxy.combination import Difference, Mix, Realign
from kilofed.proxy.model import ProxyModel

IDS, MASK = padded([[1, 5, 9, 30, 7], [1, 8], [1, 22, 3, 4]])


@torch.no_grad()
def test_alpha_0_is_the_large_model() -> None:
    large = model(0, width=24)
    proxy = ProxyModel(large, adapted(1), rule=Difference(0.0))
    assert torch.equal(proxy(IDS, MASK).logits, large(IDS, MASK).logits)
    out = proxy.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=12, do_sample=False)
    assert torch.equal(out, large.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=12, do_sample=False))


@torch.no_grad()
def test_alpha_1_over_the_small_base_is_the_small_tuned_model() -> None:
    small = adapted(1)
    base = model(1)
    proxy = ProxyModel(base, small)
    torch.testing.assert_close(proxy(IDS, MASK).logits, small(IDS, MASK).logits, rtol=0, atol=2e-5)
    out = proxy.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=12, do_sample=False)
    assert torch.equal(out, small.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=12, do_sample=False))


@torch.no_grad()
def test_scores_are_the_sum_of_three_separate_forwards() -> None:
    large, small = model(0, width=24), adapted(1)
    ids, mask = torch.tensor([[1, 5, 9, 30], [1, 8, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    with without_adapter(small):
        base = small(ids, mask).logits
    expected = large(ids, mask).logits + 0.7 * (small(ids, mask).logits - base)
    torch.testing.assert_close(ProxyModel(large, small, rule=Difference(0.7))(ids, mask).logits, expected)


@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_the_shared_forward_equals_two_models(beams: int) -> None:
    large, small = model(0, width=24), adapted(1)
    shared, apart = ProxyModel(large, small), ProxyModel(large, small, model(1))
    assert type(shared.small_source) is not type(apart.small_source)
    torch.testing.assert_close(shared(IDS, MASK).logits, apart(IDS, MASK).logits)
    ways = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams}
    first = shared.generate(input_ids=IDS, attention_mask=MASK, **ways)
    assert torch.equal(first, apart.generate(input_ids=IDS, attention_mask=MASK, **ways))


@torch.no_grad()
def test_a_forward_leaves_the_small_model_as_it_was() -> None:
    small = adapted(1)
    before = small(IDS, MASK).logits
    trains = [name for name, p in small.named_parameters() if p.requires_grad]
    ProxyModel(model(0), small).generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=3)
    assert torch.equal(small(IDS, MASK).logits, before)
    assert [name for name, p in small.named_parameters() if p.requires_grad] == trains


@torch.no_grad()
def test_caches_change_nothing() -> None:
    proxy = ProxyModel(model(0, width=24), adapted(1))
    whole = proxy(IDS, MASK).logits
    first = proxy(IDS[:, :3], MASK[:, :3], use_cache=True)
    rest = proxy(IDS[:, 3:], MASK, past_key_values=first.past_key_values).logits
    kept = MASK[:, 3:].bool()
    torch.testing.assert_close(rest[kept], whole[:, 3:][kept])


@torch.no_grad()
def test_a_cropped_cache_is_the_shorter_one() -> None:
    proxy = ProxyModel(model(0, width=24), adapted(1))
    cache = proxy(IDS[:, :4], MASK[:, :4], use_cache=True).past_key_values
    cache.crop(-2)
    assert cache.get_seq_length() == 2
    again = proxy(IDS[:, 2:], MASK, past_key_values=cache).logits
    kept = MASK[:, 2:].bool()
    torch.testing.assert_close(again[kept], proxy(IDS, MASK).logits[:, 2:][kept])


@torch.no_grad()
def test_left_padding_changes_no_answer() -> None:
    proxy = ProxyModel(model(0, width=24), adapted(1))
    together = proxy.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=10, do_sample=False)
    for row, mask, out in zip(IDS, MASK, together, strict=True):
        alone = proxy.generate(input_ids=row[mask.bool()][None], max_new_tokens=10, do_sample=False)[0]
        got = out[len(row) :].tolist()
        want = alone[int(mask.sum()) :].tolist()
        assert got[: len(want)] == want
        assert set(got[len(want) :]) <= {0}


@torch.no_grad()
def test_beams_take_every_part_along() -> None:
    large, small = model(0, width=24), adapted(1)
    ways = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    cached = ProxyModel(large, small).generate(input_ids=IDS, attention_mask=MASK, **ways)
    plain = ProxyModel(large, small).generate(input_ids=IDS, attention_mask=MASK, use_cache=False, **ways)
    assert torch.equal(cached, plain)


@torch.no_grad()
def test_stop_strings_end_the_answer() -> None:
    tokenizer = byte_tokenizer()
    large, small = model(0, vocabulary=259), adapted(1, model(1, vocabulary=259))
    proxy = ProxyModel(large, small)
    ids = torch.tensor([tokenizer("ab")["input_ids"]])
    free = proxy.generate(input_ids=ids, max_new_tokens=20, do_sample=False)[0, 2:]
    stop = tokenizer.decode(free[4:5])
    found = proxy.generate(
        input_ids=ids, max_new_tokens=20, do_sample=False, stop_strings=[stop], tokenizer=tokenizer
    )[0, 2:]
    assert stop in tokenizer.decode(found)
    assert len(found) <= 5


@torch.no_grad()
def test_training_and_evaluation_take_it_for_a_causal_model() -> None:
    large, small = model(0, vocabulary=259, width=24), adapted(1, model(1, vocabulary=259))
    proxy = ProxyModel(large, small).eval()
    examples = [Example([1, 40, 50, 60], [-100, -100, 50, 60], [], []), Example([1, 70], [-100, 70], [], [])]
    losses, _ = token_losses(proxy, collate_tokens(examples))
    logits = proxy(torch.tensor([[1, 40, 50]])).logits[0, 1:].log_softmax(-1)
    expected = -logits.gather(-1, torch.tensor([[50], [60]]))[:, 0]
    torch.testing.assert_close(losses[:2], expected)
    scores = evaluation.score(proxy, examples, 2)
    assert scores.num_tokens == 3
    answers = evaluation.answer(proxy, byte_tokenizer(), [[1, 40], [1, 40, 41]], 4)
    assert len(answers) == 2


@torch.no_grad()
def test_rules_without_a_base_need_none() -> None:
    large, small = model(0), model(1)
    mixed = ProxyModel(large, small, rule=Mix(0.25))(IDS[:1]).logits.exp()
    expected = 0.75 * large(IDS[:1]).logits.softmax(-1) + 0.25 * small(IDS[:1]).logits.softmax(-1)
    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(ProxyModel(large, small, rule=Realign(1.0))(IDS).logits, small(IDS).logits)


@pytest.mark.parametrize("rule", [Difference, Mix, Realign])
@torch.no_grad()
def test_every_rule_at_strength_0_is_the_large_model(rule: type[Difference | Mix | Realign]) -> None:
    large, small = model(0, width=24), adapted(1)
    found = ProxyModel(large, small, rule=rule(0.0))(IDS, MASK).logits.log_softmax(-1)
    torch.testing.assert_close(found, large(IDS, MASK).logits.log_softmax(-1))


@pytest.mark.parametrize("rule", [Mix, Realign])
@torch.no_grad()
def test_mixing_and_realigning_at_strength_1_are_the_tuned_model(rule: type[Mix | Realign]) -> None:
    large, small = model(0, width=24), adapted(1)
    found = ProxyModel(large, small, rule=rule(1.0))(IDS, MASK).logits.log_softmax(-1)
    torch.testing.assert_close(found, small(IDS, MASK).logits.log_softmax(-1))


@torch.no_grad()
def test_padding_rows_get_no_probability() -> None:
    large, small = model(0, vocabulary=64), adapted(1, model(1, vocabulary=48))
    proxy = ProxyModel(large, small, vocabulary=45)
    logits = proxy(IDS, MASK).logits
    assert logits.shape == (3, 5, 45)
    assert int(proxy.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=8, do_sample=True).max()) < 45


def test_other_widths_are_refused_unless_the_tokens_are_counted() -> None:
    with pytest.raises(ModelError, match=r"different widths \(large 64, small 40\)"):
        ProxyModel(model(0, vocabulary=64), adapted(1))
    with pytest.raises(ModelError, match="the tokeniser has 50 tokens, but the small model knows 40"):
        ProxyModel(model(0, vocabulary=64), adapted(1), vocabulary=50)


def test_a_missing_base_is_refused() -> None:
    with pytest.raises(ModelError, match="give the base too"):
        ProxyModel(model(0), model(1))


@pytest.mark.parametrize(("large", "small", "named"), [(8, 64, "large"), (64, 8, "small")])
def test_a_prompt_longer_than_either_context_is_refused(large: int, small: int, named: str) -> None:
    proxy = ProxyModel(model(0, context=large), adapted(1, model(1, context=small)))
    with pytest.raises(ModelError, match=f"9 tokens are more than the 8 that the {named} model"):
        proxy(torch.ones(1, 9, dtype=torch.long))
    with pytest.raises(ModelError, match="9 tokens"):
        proxy.generate(input_ids=torch.full((1, 5), 7), max_new_tokens=20, min_new_tokens=20)


def test_a_proxy_is_not_saved() -> None:
    with pytest.raises(ModelError, match="save the small tuned model"):
        ProxyModel(model(0), adapted(1)).save_pretrained("x")


@torch.no_grad()
def test_it_scores_as_its_forward_does() -> None:
    proxy = ProxyModel(model(0, width=24), adapted(1))
    ids = [1, 5, 9, 30, 7]
    tokens = proxy.score(ids, 3)
    assert tokens[0] is None
    log_p = proxy(torch.tensor([ids])).logits[0].log_softmax(-1)
    for place, token in enumerate(tokens[1:], 1):
        assert token is not None
        assert token.id == ids[place]
        assert token.logprob == pytest.approx(float(log_p[place - 1, token.id]), abs=1e-5)
        assert [t for t, _ in token.top] == log_p[place - 1].topk(3).indices.tolist()
    with pytest.raises(ModelError, match="the prompt has 66 tokens"):
        proxy.score([1] * 66)


@torch.no_grad()
def test_threads_do_not_meet_in_the_small_model() -> None:
    proxy = ProxyModel(model(0, width=24), adapted(1), rule=Difference(0.5))
    asks = [Sampling(max_new_tokens=15, temperature=0.9, seed=seed) for seed in range(6)]

    def spoken(sampling: Sampling) -> list[int]:
        return [token.id for token in proxy.generate_tokens([1, 5, 9], sampling)]

    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(spoken, asks))
    assert together == [spoken(sampling) for sampling in asks]
