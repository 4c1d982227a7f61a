"""The attacks reconstruct tokens from hidden states, and none from noise."""

from pathlib import Path

import pytest
import torch

from kilofed.config.recipe import AdapterSpec, ModelSpec
from kilofed.data.examples import Example
from kilofed.models import loading
from kilofed.models.halves import find_blocks
from kilofed.split import reconstruction


def rows(seed: int, num: int = 40) -> list[Example]:
    """Rows of 16 random tokens."""
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 259, (num, 16), generator=rng).tolist()
    return [Example(row, row, [], []) for row in tokens]


@pytest.fixture
def model(tiny_model: Path) -> torch.nn.Module:
    return loading.load_model(ModelSpec(str(tiny_model)), AdapterSpec(), 0)


def test_identity_blocks_hide_nothing(model: torch.nn.Module) -> None:
    _, blocks = find_blocks(model)
    with torch.no_grad():
        for name, parameter in blocks.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
    found = reconstruction.recover_tokens(model, 1, rows(0), rows(1))
    assert found.nearest == found.inverter == 1.0
    assert found.num_tokens == 40 * 16


def test_tokens_of_a_random_model_are_reconstructed_also_from_int8(model: torch.nn.Module) -> None:
    for dtype in ("float32", "bfloat16", "int8"):
        found = reconstruction.recover_tokens(model, 1, rows(0), rows(1), dtype=dtype)
        assert found.inverter > 0.9


def test_under_heavy_noise_accuracy_is_that_of_guessing(model: torch.nn.Module) -> None:
    found = reconstruction.recover_tokens(model, 1, rows(0), rows(1), noise=1000.0)
    assert max(found.nearest, found.inverter) < 0.05


def test_every_cut_is_attacked(model: torch.nn.Module) -> None:
    assert [one.cut for one in reconstruction.recover_at_every_cut(model, rows(0), rows(1))] == [1]


def test_the_model_is_as_before(model: torch.nn.Module) -> None:
    ids = torch.arange(3, 13)[None]
    before = model(input_ids=ids).logits
    reconstruction.recover_tokens(model, 1, rows(0, 4), rows(1, 4))
    assert torch.equal(model(input_ids=ids).logits, before)
