"""The head that classifies: its closed form, padding, equal seeds, and what is written to the disk."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel

from kilofed.config.recipe import AdapterSpec, ModelSpec
from kilofed.data.examples import Example
from kilofed.models import loading
from kilofed.models.heads import SCALE, MeanClassifier
from kilofed.models.training import class_logits, collate_classes

CLASSES = ("no", "perhaps", "yes")
LORA = AdapterSpec(rank=2, alpha=4.0)
ROWS = [Example([5, 6, 7, 8], [], [], [], 0), Example([9], [], [], [], 2), Example([3, 4], [], [], [], 1)]


@pytest.fixture(params=["encoder", "decoder"])
def spec(request: pytest.FixtureRequest, tiny_encoder: Path, tiny_model: Path) -> ModelSpec:
    return ModelSpec(str(tiny_encoder if request.param == "encoder" else tiny_model))


def shaken(model: nn.Module) -> nn.Module:
    """`model` with trained tensors that are neither zero nor small."""
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in loading.trained(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=draws))
    return model


def logits(model: nn.Module, rows: list[Example] = ROWS) -> Tensor:
    with torch.inference_mode():
        return class_logits(model, collate_classes(rows)).clone()


def test_the_mean_head_is_its_closed_form(tiny_encoder: Path) -> None:
    model = shaken(loading.load_classifier(ModelSpec(str(tiny_encoder)), "mean", 0, CLASSES))
    assert isinstance(model, MeanClassifier)
    own = AutoModel.from_pretrained(tiny_encoder).eval()
    own.load_state_dict(model.encoder.state_dict(), strict=False)
    with torch.inference_mode():
        mean = own(input_ids=torch.tensor([ROWS[0].input_ids])).last_hidden_state.mean(1)
        expected = SCALE * (mean / mean.norm() @ model.score.weight.T + model.score.bias)
    torch.testing.assert_close(logits(model)[:1], expected)


@pytest.mark.parametrize("head", ["mean", "stock"])
def test_padding_changes_no_row(spec: ModelSpec, head: str) -> None:
    model = shaken(loading.load_model(spec, replace(LORA, head=head), 0, CLASSES))
    alone = torch.cat([logits(model, [row]) for row in ROWS])
    torch.testing.assert_close(logits(model), alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("head", ["mean", "stock"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_equal_seeds_give_equal_adapters_and_heads(spec: ModelSpec, head: str, kind: str) -> None:
    adapter = replace(LORA, head=head, kind=kind)
    one, again = (loading.read_trained(loading.load_model(spec, adapter, 3, CLASSES)) for _ in range(2))
    assert one.keys() == again.keys()
    assert all(torch.equal(one[name], again[name]) for name in one)


def test_the_head_travels_under_a_short_name(spec: ModelSpec) -> None:
    found = loading.trained(loading.load_model(spec, LORA, 0, CLASSES))
    assert found["score.weight"].shape == (3, 16)
    assert found["score.bias"].shape == (3,)
    assert not [name for name in found if "default" in name or "base_model" in name or "pooler" in name]


def test_no_class_is_likelier_than_another_before_training(spec: ModelSpec) -> None:
    assert not logits(loading.load_model(spec, LORA, 0, CLASSES)).any()


def test_the_base_has_an_untouched_head(spec: ModelSpec) -> None:
    model = shaken(loading.load_model(spec, LORA, 0, CLASSES))
    assert logits(model).any()
    with loading.without_adapter(model) as base:
        assert not logits(base).any()


@pytest.mark.parametrize("head", ["mean", "stock"])
def test_a_saved_adapter_brings_its_head(spec: ModelSpec, head: str, tmp_path: Path) -> None:
    model = shaken(loading.load_model(spec, replace(LORA, head=head), 0, CLASSES))
    loading.save_adapter(model, tmp_path / "adapter")
    with loading.quiet():
        again = PeftModel.from_pretrained(loading.load_classifier(spec, head, 1, CLASSES), str(tmp_path / "adapter"))
    assert torch.equal(logits(again.eval()), logits(model))


def test_a_whole_model_is_saved_as_its_encoder_and_its_head(spec: ModelSpec, tmp_path: Path) -> None:
    model = shaken(loading.load_model(spec, replace(LORA, kind="full"), 0, CLASSES))
    loading.save_adapter(model, tmp_path / "whole")
    head = load_file(tmp_path / "whole" / "head.safetensors")
    again = MeanClassifier(AutoModel.from_pretrained(tmp_path / "whole"), len(CLASSES)).eval()
    again.score.load_state_dict(head)
    assert torch.equal(logits(again), logits(model))
    assert again.config.id2label == dict(enumerate(CLASSES))


def test_an_outline_has_the_shapes_of_the_model(spec: ModelSpec) -> None:
    outlined, real = loading.outline(spec, LORA, CLASSES), loading.load_model(spec, LORA, 0, CLASSES)
    assert {n: p.shape for n, p in loading.trained(outlined).items()} == {
        n: p.shape for n, p in loading.trained(real).items()
    }


def test_16_bits_keep_the_head_in_32(spec: ModelSpec) -> None:
    model = loading.load_model(replace(spec, dtype="bfloat16"), replace(LORA, kind="full"), 0, CLASSES)
    assert loading.trained(model)["score.weight"].dtype == torch.float32
    assert logits(shaken(model)).isfinite().all()
