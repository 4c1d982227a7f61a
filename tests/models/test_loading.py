"""Models and adapters: what is trained, how it is taken out and put back, and what is left when it is folded in."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from kilofed.config.recipe import AdapterSpec, ModelSpec
from kilofed.errors import ModelError
from kilofed.models import loading

LORA = AdapterSpec(rank=2, alpha=4.0)
FULL = AdapterSpec(kind="full")
IDS = torch.arange(3, 23).reshape(2, 10)


def logits(model: object) -> torch.Tensor:
    assert isinstance(model, nn.Module)
    with torch.inference_mode():
        return torch.as_tensor(model(input_ids=IDS).logits)


def shaken(model: nn.Module) -> nn.Module:
    """`model` with every trained tensor moved, so that the adapter says something."""
    stream = torch.Generator().manual_seed(9)
    tensors = loading.read_trained(model)
    moved = {name: t + 0.3 * torch.randn(t.shape, generator=stream) for name, t in sorted(tensors.items())}
    loading.write_trained(model, moved)
    return model


@pytest.fixture
def spec(tiny_model: Path) -> ModelSpec:
    return ModelSpec(str(tiny_model))


def test_lora_trains_two_factors_per_linear_layer_under_short_names(spec: ModelSpec) -> None:
    found = loading.trained(loading.load_model(spec, LORA, 0))
    layers = [f"model.layers.{n}.self_attn.{p}_proj" for n in (0, 1) for p in "qkvo"]
    layers += [f"model.layers.{n}.mlp.{p}_proj" for n in (0, 1) for p in ("gate", "up", "down")]
    assert list(found) == sorted(f"{layer}.lora_{ab}.weight" for layer in layers for ab in "AB")
    assert found["model.layers.0.mlp.down_proj.lora_A.weight"].shape == (2, 24)
    assert found["model.layers.0.mlp.down_proj.lora_B.weight"].shape == (16, 2)


def test_full_trains_every_parameter_and_tied_ones_once(spec: ModelSpec) -> None:
    model = loading.load_model(spec, FULL, 0)
    found = loading.trained(model)
    assert sum(p.numel() for p in found.values()) == sum(p.numel() for p in model.parameters())
    assert [name for name in found if "embed" in name or "head" in name] == ["model.embed_tokens.weight"]


@pytest.mark.parametrize("adapter", [LORA, FULL])
def test_what_is_read_can_be_written_back(spec: ModelSpec, adapter: AdapterSpec) -> None:
    model = shaken(loading.load_model(spec, adapter, 0))
    kept, before = loading.read_trained(model), logits(model)
    loading.write_trained(model, {name: torch.zeros_like(t) for name, t in kept.items()})
    assert not torch.equal(logits(model), before)
    loading.write_trained(model, {**kept, "of another model": torch.ones(1)})
    assert torch.equal(logits(model), before)
    again = loading.read_trained(model)
    assert all(torch.equal(again[name], kept[name]) for name in kept)


def test_what_is_read_is_a_copy(spec: ModelSpec) -> None:
    model = loading.load_model(spec, FULL, 0)
    kept, before = loading.read_trained(model), logits(model)
    for tensor in kept.values():
        tensor.zero_()
    assert torch.equal(logits(model), before)


def test_16_bit_weights_are_read_as_float32(spec: ModelSpec) -> None:
    model = loading.load_model(replace(spec, dtype="bfloat16"), FULL, 0)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {t.dtype for t in loading.read_trained(model).values()} == {torch.float32}


def test_adapters_on_a_16_bit_base_are_float32(spec: ModelSpec) -> None:
    model = loading.load_model(replace(spec, dtype="bfloat16"), LORA, 0)
    assert {p.dtype for p in loading.trained(model).values()} == {torch.float32}


def test_a_missing_or_misshapen_tensor_is_named(spec: ModelSpec) -> None:
    model = loading.load_model(spec, LORA, 0)
    tensors = loading.read_trained(model)
    name = next(iter(tensors))
    with pytest.raises(ModelError, match=rf"{name} has shape \(3,\); this model trains it with shape"):
        loading.write_trained(model, {**tensors, name: torch.ones(3)})
    del tensors[name]
    with pytest.raises(ModelError, match=rf"{name} is missing; this model trains it with shape"):
        loading.write_trained(model, tensors)


def test_equal_seeds_give_equal_adapters(spec: ModelSpec) -> None:
    torch.manual_seed(1)
    one = loading.read_trained(loading.load_model(spec, LORA, 5))
    torch.manual_seed(2)
    again = loading.read_trained(loading.load_model(spec, LORA, 5))
    other = loading.read_trained(loading.load_model(spec, LORA, 6))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_loading_leaves_global_randomness_as_it_was(spec: ModelSpec) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    loading.load_model(spec, LORA, 5)
    assert torch.equal(torch.rand(1), expected)


def test_without_its_adapter_a_model_is_the_base(spec: ModelSpec) -> None:
    base = logits(loading.load_base(spec))
    model = shaken(loading.load_model(spec, LORA, 0))
    tuned = logits(model)
    assert not torch.allclose(tuned, base)
    with loading.without_adapter(model) as bare:
        assert torch.equal(logits(bare), base)
    assert torch.equal(logits(model), tuned)


def test_a_new_adapter_says_nothing(spec: ModelSpec) -> None:
    assert torch.equal(logits(loading.load_model(spec, LORA, 0)), logits(loading.load_base(spec)))


def test_a_merged_model_has_the_logits_of_base_and_adapter(spec: ModelSpec) -> None:
    model = shaken(loading.load_model(spec, LORA, 0))
    expected = logits(model)
    plain = loading.merged(model)
    assert not any("lora" in name for name, _ in plain.named_parameters())
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-5)


def test_a_saved_adapter_is_one_that_peft_loads(spec: ModelSpec, tmp_path: Path) -> None:
    model = shaken(loading.load_model(spec, LORA, 0))
    loading.save_adapter(model, tmp_path / "adapter")
    with loading.quiet():
        again = PeftModel.from_pretrained(loading.load_base(spec), str(tmp_path / "adapter"))
    assert torch.equal(logits(again.eval()), logits(model))


def test_an_adapter_takes_the_place_of_whatever_lay_there(spec: ModelSpec, tmp_path: Path) -> None:
    model = shaken(loading.load_model(spec, LORA, 0))
    loading.save_adapter(model, tmp_path / "fresh")
    old = tmp_path / "old"
    old.mkdir()
    (old / "README.md").write_bytes(b"\xa0 is no text")
    (old / "stale.bin").write_bytes(b"x")
    (tmp_path / ".old.part").mkdir()
    (tmp_path / ".old.part" / "half").write_bytes(b"x")
    loading.save_adapter(model, old)
    one, other = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("fresh", "old"))
    assert one == other
    assert not (tmp_path / ".old.part").exists()


def test_a_saved_full_model_is_one_that_transformers_loads(spec: ModelSpec, tmp_path: Path) -> None:
    model = shaken(loading.load_model(spec, FULL, 0))
    loading.save_adapter(model, tmp_path / "whole")
    with loading.quiet():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert torch.equal(logits(again), logits(model))


def test_named_targets_alone_get_an_adapter(spec: ModelSpec) -> None:
    adapter = replace(LORA, targets=("q_proj", "layers.1.mlp.up_proj"))
    names = {name.rsplit(".", 2)[0] for name in loading.trained(loading.load_model(spec, adapter, 0))}
    assert names == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    }


def test_targets_that_match_nothing_list_what_exists(spec: ModelSpec) -> None:
    with pytest.raises(
        ModelError, match=r"adapter\.targets has c_attn, which match no module; choose from .*q_proj, up_proj"
    ):
        loading.load_model(spec, replace(LORA, targets=("q_proj", "c_attn")), 0)


def test_gpt2s_own_kind_of_linear_layer_gets_adapters() -> None:
    base = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    model = loading.add_adapter(base, replace(LORA, targets=("c_attn",)), 0)
    shapes = {name.rsplit(".", 2)[1]: tuple(p.shape) for name, p in loading.trained(model).items()}
    assert shapes == {"lora_A": (2, 8), "lora_B": (24, 2)}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("builtin:huge", "builtin:huge does not exist; expected builtin:small or builtin:large"),
        ("./no/such/model", r"model directory \./no/such/model does not exist; check model\.path"),
    ],
)
def test_a_missing_model_is_named(path: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        loading.load_base(ModelSpec(path))


def test_a_directory_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot load the model of .*expected a local model directory"):
        loading.load_base(ModelSpec(str(tmp_path)))
    with pytest.raises(ModelError, match=r"cannot load the tokeniser of"):
        loading.load_tokenizer(ModelSpec(str(tmp_path)))


@pytest.mark.parametrize("adapter", [LORA, FULL])
def test_an_outline_has_the_names_and_shapes_of_the_model_and_no_weights(
    spec: ModelSpec, adapter: AdapterSpec
) -> None:
    outlined, real = loading.outline(spec, adapter), loading.load_model(spec, adapter, 0)
    shapes = [{name: p.shape for name, p in loading.trained(m).items()} for m in (outlined, real)]
    assert shapes[0] == shapes[1]
    assert all(p.is_meta for p in outlined.parameters())


def test_a_model_inside_an_installed_package_is_found_without_importing_it() -> None:
    found = loading.locate(ModelSpec("package:kilofed/assets/small"))
    assert (Path(found) / "config.json").is_file()


@pytest.mark.parametrize(
    ("path", "seen"), [("nobody_has_this/model", "not installed"), ("kilofed/no", "no folder no"), ("a b", "not")]
)
def test_a_package_without_the_model_is_refused(path: str, seen: str) -> None:
    with pytest.raises(ModelError, match=seen):
        loading.locate(ModelSpec(f"package:{path}"))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_disk_without_room_for_the_adapter_is_said(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    script = (
        "import resource, sys\nfrom pathlib import Path\n"
        "from kilofed.config.recipe import AdapterSpec, ModelSpec\nfrom kilofed.errors import RunError\n"
        "from kilofed.models import loading\n"
        "model = loading.load_model(ModelSpec(path=sys.argv[1]), AdapterSpec(kind=sys.argv[3]), 0)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))\n"
        "try:\n    loading.save_adapter(model, Path(sys.argv[2]))\n"
        "except RunError as error:\n    print(error)\n"
    )
    words = [sys.executable, "-c", script, str(tiny_model), str(tmp_path / "adapter"), kind]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert said.startswith(f"cannot write {tmp_path}/adapter (")
    assert said.endswith("make room or choose another folder, then resume\n")
