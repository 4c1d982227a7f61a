"""Where logits come from: a pair in one forward equals two models, caches grow together, and layers are left alone."""

import threading

import pytest
import torch
from tests.tiny_models import adapted, model, padded
from torch import nn
from transformers import DynamicCache

from kilofed.errors import ModelError
from kilofed.models.loading import without_adapter
from kilofed.proxy.logit_sources import (
    BaseSource,
    ForwardInputs,
    JointCache,
    ModelSource,
    SharedForwardPair,
    TwoForwardPair,
    can_crop,
    kept,
    plain_lora,
    small_source,
)

IDS, MASK = padded([[1, 5, 9, 30, 7], [1, 8], [1, 3, 3, 3]])


@pytest.fixture
def small() -> nn.Module:
    return adapted(1)


def shared(small: nn.Module) -> SharedForwardPair:
    return SharedForwardPair(small)


def apart(small: nn.Module) -> TwoForwardPair:
    return TwoForwardPair(ModelSource(small), BaseSource(small))


@torch.no_grad()
@pytest.mark.parametrize("pair", [shared, apart])
def test_a_pair_is_the_model_with_its_adapter_and_without(pair, small: nn.Module) -> None:
    tuned, base = pair(small).logits(ForwardInputs(IDS, MASK), None)
    with without_adapter(small):
        expected = small(IDS, MASK).logits
    torch.testing.assert_close(base, expected)
    torch.testing.assert_close(tuned, small(IDS, MASK).logits)
    assert not torch.allclose(tuned, base)


@torch.no_grad()
@pytest.mark.parametrize("pair", [shared, apart])
def test_cached_steps_give_what_a_whole_forward_gives(pair, small: nn.Module) -> None:
    source = pair(small)
    whole = source.logits(ForwardInputs(IDS, MASK), None)
    cache = source.new_cache()
    first = source.logits(ForwardInputs(IDS[:, :3], MASK[:, :3]), cache)
    rest = source.logits(ForwardInputs(IDS[:, 3:], MASK), cache)
    for one, two, together in zip(first, rest, whole, strict=True):
        real = MASK.bool()  # What stands at padding is no answer.
        torch.testing.assert_close(torch.cat([one, two], 1)[real], together[real], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_each_part_of_a_shared_pair_can_be_asked_alone(small: nn.Module) -> None:
    pair = shared(small)
    tuned, base = pair.logits(ForwardInputs(IDS, MASK), None)
    torch.testing.assert_close(pair.tuned.logits(ForwardInputs(IDS, MASK), None)[0], tuned)
    torch.testing.assert_close(pair.base.logits(ForwardInputs(IDS, MASK), None)[0], base)


@torch.no_grad()
def test_threads_do_not_meet_in_the_layers(small: nn.Module) -> None:
    pair, wrong = shared(small), []
    tuned, base = pair.logits(ForwardInputs(IDS, MASK), None)

    def ask(source: ModelSource, expected: torch.Tensor) -> None:
        with torch.no_grad():
            for _ in range(20):
                if not torch.allclose(source.logits(ForwardInputs(IDS, MASK), None)[0], expected, atol=1e-5):
                    wrong.append(source)

    threads = [threading.Thread(target=ask, args=job) for job in [(pair.tuned, tuned), (pair.base, base)] * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.no_grad()
def test_layers_are_as_they_were_after_a_forward_and_after_one_that_failed(small: nn.Module) -> None:
    pair, before = shared(small), small(IDS, MASK).logits
    pair.logits(ForwardInputs(IDS, MASK), None)
    with pytest.raises(IndexError):
        pair.logits(ForwardInputs(IDS + 1000, MASK), None)
    assert not any("forward" in vars(layer) for layer in small.modules())
    assert torch.equal(small(IDS, MASK).logits, before)


@torch.no_grad()
def test_a_joint_cache_reorders_repeats_and_selects_rows_of_both(small: nn.Module) -> None:
    source = TwoForwardPair(ModelSource(model(0, width=24)), BaseSource(small))
    cache = source.new_cache()
    source.logits(ForwardInputs(IDS[:, :4]), cache)
    assert isinstance(cache, JointCache)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2, 5]))  # Rows 2, 0 and 1 of the start.
    order = torch.tensor([2, 0, 1])
    found = source.logits(ForwardInputs(IDS[order, 4:]), cache)
    for told, known in zip(found, source.logits(ForwardInputs(IDS[order]), None), strict=True):
        torch.testing.assert_close(told, known[:, 4:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_kept_positions_are_the_last_or_those_named(small: nn.Module) -> None:
    whole = ModelSource(small).logits(ForwardInputs(IDS), None)[0]
    for keep in (2, torch.tensor([0, 3])):
        (part,) = ModelSource(small).logits(ForwardInputs(IDS, keep=keep), None)
        torch.testing.assert_close(part, kept(whole, keep))
        assert part.shape[1] == 2
    assert kept(whole, 0) is whole


def test_the_source_of_the_small_model_takes_as_few_forwards_as_can_be(small: nn.Module) -> None:
    assert type(small_source(small, None, needs_base=False)) is ModelSource
    assert isinstance(small_source(small, None, needs_base=True), SharedForwardPair)
    assert isinstance(small_source(small, small, needs_base=True), SharedForwardPair)
    assert isinstance(small_source(small, model(1), needs_base=True), TwoForwardPair)
    with pytest.raises(ModelError, match="give the base too"):
        small_source(model(1), None, needs_base=True)


def test_only_plain_lora_shares_a_forward(small: nn.Module) -> None:
    assert plain_lora(model(1)) is None
    assert plain_lora(small)
    small.merge_adapter()  # type: ignore[operator]
    assert plain_lora(small) is None
    with pytest.raises(ModelError, match="use two forwards"):
        SharedForwardPair(small)


def test_full_attention_can_give_back_its_last_positions_and_windows_cannot() -> None:
    source = ModelSource(model(1))
    assert can_crop(source.new_cache())
    config = source.config
    config.sliding_window, config.layer_types = 2, ["sliding_attention"] * 2
    assert not can_crop(DynamicCache(config=config))
