"""The large model of a run, local or behind an API: one tokeniser, steered or not, and nothing of it is trained."""

from pathlib import Path

import pytest
import torch
from tests.loopback import served
from tests.tiny_models import adapted, model
from transformers import PreTrainedTokenizerFast

from kilofed.config.recipe import ModelSpec
from kilofed.errors import ModelError
from kilofed.models.loading import load_base
from kilofed.proxy.api_model import RemoteModel
from kilofed.proxy.combination import Difference
from kilofed.proxy.large_model import open_large_model
from kilofed.proxy.spec import LargeSpec

IDS = torch.tensor([[1, 70, 71, 72], [1, 80, 81, 82]])


@pytest.fixture
def small() -> torch.nn.Module:
    return adapted(1, model(1, vocabulary=259))


@torch.no_grad()
def test_without_strength_a_local_large_model_is_itself(
    small: torch.nn.Module, tiny_large: Path, tiny_model: Path
) -> None:
    large = open_large_model(LargeSpec(path=str(tiny_large)), ModelSpec(str(tiny_model)), None)
    plain = load_base(ModelSpec(str(tiny_large)))
    assert large.unsteered(small, None) is large.model
    torch.testing.assert_close(large.steer(small, None, Difference(0.0))(IDS).logits, plain(IDS).logits)
    assert not torch.allclose(large.steer(small, None, Difference(1.0))(IDS).logits, plain(IDS).logits)
    assert large.vocabulary == 259
    assert not any(p.requires_grad for p in large.model.parameters())  # type: ignore[union-attr]


def test_another_tokeniser_is_refused_and_on_trust_is_not_looked_at(
    tiny_large: Path, tiny_model: Path, tmp_path
) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_model)
    tokenizer.add_tokens(["<another>"])
    tokenizer.save_pretrained(tmp_path)
    other = ModelSpec(str(tmp_path))
    with pytest.raises(ModelError, match="token"):
        open_large_model(LargeSpec(path=str(tiny_large)), other, None)
    assert open_large_model(LargeSpec(path=str(tiny_large)), None, None).vocabulary is None


def test_an_api_needs_the_small_model_s_tokeniser_and_a_name(tiny_model: Path) -> None:
    with pytest.raises(ModelError, match="name the small model"):
        open_large_model(LargeSpec(path="http://127.0.0.1:9/v1", name="large"), None, None)
    with pytest.raises(ModelError, match=r"method\.large\.name is empty"):
        open_large_model(LargeSpec(path="http://127.0.0.1:9/v1"), ModelSpec(str(tiny_model)), None)


@torch.no_grad()
def test_behind_an_api_that_tells_all_it_is_the_same_model(
    small: torch.nn.Module, tiny_large: Path, tiny_model: Path, tmp_path: Path
) -> None:
    near = open_large_model(LargeSpec(path=str(tiny_large)), ModelSpec(str(tiny_model)), None)
    with served(load_base(ModelSpec(str(tiny_large))), name_of=lambda token: f"token_id:{token}") as api:
        far = open_large_model(LargeSpec(path=api.url, name="large", top_k=259), ModelSpec(str(tiny_model)), tmp_path)
        assert isinstance(far.model, RemoteModel)
        for alpha in (0.0, 0.7):
            told, known = (
                one.steer(small, None, Difference(alpha))(IDS).logits.log_softmax(-1) for one in (far, near)
            )
            torch.testing.assert_close(told, known, rtol=0, atol=1e-3)
        torch.testing.assert_close(
            far.unsteered(small, None)(IDS).logits.log_softmax(-1),
            near.model(IDS).logits.log_softmax(-1),  # type: ignore[operator]
            rtol=0,
            atol=1e-3,
        )
        far.close()
    near.close()  # There is nothing to close.
