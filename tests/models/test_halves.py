"""A cut model computes what the whole model computes, and a client's part has no tensor of the server's."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as t

from kilofed.config.recipe import AdapterSpec, ModelSpec
from kilofed.errors import ModelError, RecipeError
from kilofed.models import halves, loading, training
from kilofed.models.halves import Halves, Part

SIZES = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
WIDE = {**SIZES, "intermediate_size": 24}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

DECODERS = {
    "llama": lambda: t.LlamaConfig(**WIDE, tie_word_embeddings=True),
    "gpt2": lambda: t.GPT2Config(
        **SIZES, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=1, eos_token_id=2
    ),
    "gpt_neox": lambda: t.GPTNeoXConfig(**WIDE),
    "opt": lambda: t.OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=8, dropout=0.0),
}
RARER = {
    # The place of a block says which mask it gets.
    "gemma3": lambda: t.Gemma3TextConfig(
        **WIDE,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=3,
        layer_types=[*["sliding_attention"] * 2, "full_attention", "sliding_attention"],
    ),
    "qwen2": lambda: t.Qwen2Config(**WIDE, num_key_value_heads=1),
    "phi": lambda: t.PhiConfig(**WIDE),
    # Their blocks return tuples.
    "bloom": lambda: t.BloomConfig(**SIZES, hidden_dropout=0.0, attention_dropout=0.0),
    "falcon": lambda: t.FalconConfig(**SIZES),
}
ENCODERS = {
    "bert": lambda: t.BertConfig(**WIDE, **STILL),
    "distilbert": lambda: t.DistilBertConfig(
        vocab_size=99,
        dim=16,
        hidden_dim=24,
        n_layers=4,
        n_heads=2,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
    ),
}


def rare(names: dict[str, object]) -> list[object]:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


def saved(config: t.PreTrainedConfig, folder: Path) -> ModelSpec:
    """A random model of `config` on the disk; biases and norms are random, too."""
    kind = t.AutoModelForMaskedLM if config.model_type in ENCODERS else t.AutoModelForCausalLM
    with torch.random.fork_rng(), loading.quiet():
        torch.manual_seed(0)
        model = kind.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder)
    return ModelSpec(str(folder))


def batch(*, classes: bool) -> training.Batch:
    """Two rows, the second shorter."""
    draws = torch.Generator().manual_seed(1)
    ids, mask = torch.randint(3, 99, (2, 7), generator=draws), torch.ones(2, 7, dtype=torch.long)
    ids[1, 5:], mask[1, 5:] = 0, 0
    if classes:
        return training.ClassBatch(ids, mask, torch.tensor([0, 2]))
    return training.TokenBatch(ids, mask, ids.masked_fill(mask == 0, -100))


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", [*DECODERS, "bert", *rare(RARER), *rare({"distilbert": None})])
def test_two_parts_have_the_loss_of_the_whole_to_the_bit(name: str, kind: str, tmp_path: Path) -> None:
    config = (DECODERS | RARER | ENCODERS)[name]()  # type: ignore[operator]
    spec, adapter = saved(config, tmp_path), AdapterSpec(kind=kind, rank=2)  # type: ignore[arg-type]
    classes = ("a", "b", "c") if name in ENCODERS else ()
    whole, rows = loading.load_model(spec, adapter, 0, classes), batch(classes=bool(classes))
    wanted = training.loss(whole, rows)
    unseen = replace(rows, input_ids=torch.zeros_like(rows.input_ids))
    padding = rows.attention_mask[:, :, None] == 0
    for cut, head in ((1, False), (3, True)):
        part = loading.load_model(Part(**vars(spec), num_blocks=cut, head=head), adapter, 0, classes)
        names = {n for n, _ in whole.named_parameters() if halves.held_by_client(whole, n, cut=cut, head=head)}
        assert {n for n, _ in part.named_parameters()} == names
        loading.write_trained(part, loading.read_trained(whole))
        client, server = Halves(part, cut), Halves(whole, cut)
        # What stands at the padding is not sent.
        hidden = client.below(rows.input_ids, rows.attention_mask).masked_fill(padding, 0.0)
        if head:
            top = server.between(hidden, rows.attention_mask).masked_fill(padding, 0.0)
            with client.from_last(top):
                assert torch.equal(training.loss(part, rows), wanted)
        else:
            with server.from_cut(hidden):
                assert torch.equal(training.loss(whole, unseen), wanted)
    assert torch.equal(training.loss(whole, rows), wanted)


def test_a_part_holds_what_its_file_says_and_no_more(tiny_model: Path) -> None:
    whole = loading.load_base(ModelSpec(str(tiny_model))).state_dict()
    for head in (False, True):
        part = loading.load_base(Part(str(tiny_model), num_blocks=1, head=head))
        assert all(torch.equal(tensor, whole[name]) for name, tensor in part.state_dict().items())
        assert not any("layers.1" in name for name in part.state_dict())
        assert ("model.norm.weight" in part.state_dict()) == head
        assert not any(p.is_meta for p in part.parameters())


def test_a_model_without_a_list_of_blocks_says_what_was_looked_for() -> None:
    config = t.T5Config(vocab_size=99, d_model=16, d_ff=24, num_layers=3, num_heads=2, d_kv=8)
    with torch.device("meta"):
        model = t.T5ForConditionalGeneration(config)
    with pytest.raises(
        ModelError, match=r"looked for one list of config.num_hidden_layers=3 .* found 2.*encoder.block of 3"
    ):
        halves.find_blocks(model)
    with pytest.raises(ModelError, match="found 0; its lists are: none"):
        halves.find_blocks(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("cut", [-1, 0, 2, 9])
def test_a_cut_off_the_blocks_is_refused(tiny_model: Path, cut: int) -> None:
    with pytest.raises(RecipeError, match=f"method.cut is {cut}, and the model has 2 blocks"):
        Halves(loading.load_base(ModelSpec(str(tiny_model))), cut)


def test_a_part_that_lacks_something_below_the_cut_says_so(tmp_path: Path) -> None:
    part = loading.load_base(Part(saved(DECODERS["gpt2"](), tmp_path).path, num_blocks=1))
    blocks = halves.find_blocks(part)[1]
    part.set_submodule("transformer.wpe", halves._Removed("transformer.wpe", blocks))  # type: ignore[arg-type]
    rows = batch(classes=False)
    with pytest.raises(ModelError, match=r"transformer\.wpe runs before the cut"):
        Halves(part, 1).below(rows.input_ids, rows.attention_mask)


def test_a_part_that_is_trimmed_again_knows_what_has_run(tiny_model: Path) -> None:
    part = loading.load_base(Part(str(tiny_model), num_blocks=1))
    halves.trim(part, 1, head=False)
    rows = batch(classes=False)
    hidden = Halves(part, 1).below(rows.input_ids, rows.attention_mask)
    assert torch.equal(Halves(part, 1).below(rows.input_ids, rows.attention_mask), hidden)
    with pytest.raises(RecipeError, match="the model has 2 blocks"):
        Halves(part, 2)  # Of the whole model, not of the part.


def test_the_model_is_its_own_again_whatever_a_side_did(tiny_model: Path) -> None:
    model, rows = loading.load_base(ModelSpec(str(tiny_model))), batch(classes=False)
    modules = dict(model.named_modules())
    cut = Halves(model, 1)
    assert dict(model.named_modules()) == modules
    hidden = cut.below(rows.input_ids, rows.attention_mask)
    cut.between(hidden, rows.attention_mask)
    with pytest.raises(RuntimeError), cut.from_cut(hidden[:, :, :3]):
        training.loss(model, rows)
    assert dict(model.named_modules()) == modules
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in modules.values())


def test_a_cut_model_still_writes_and_is_copied(tiny_model: Path, tmp_path: Path) -> None:
    model, rows = loading.load_base(ModelSpec(str(tiny_model))), batch(classes=False)
    before = model.generate(torch.arange(3, 8)[None], max_new_tokens=4, do_sample=False, pad_token_id=0)
    Halves(model, 1).below(rows.input_ids, rows.attention_mask)
    after = model.generate(torch.arange(3, 8)[None], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(after, before)
    model.save_pretrained(tmp_path)
    again = loading.load_base(ModelSpec(str(tmp_path)))
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


MEASURE = """
import json, sys
from kilofed.models import loading
from kilofed.models.halves import Part
from kilofed.config.recipe import ModelSpec
path, what = sys.argv[1:]

def peak():  # ru_maxrss would begin at that of the process that started this one.
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024

loading.load_base(Part(path + "/little", num_blocks=1))  # The runtime's base.
base = peak()
model = loading.load_base(Part(path, num_blocks=1) if what == "part" else ModelSpec(path))
touched = [float(p.detach().sum()) for p in model.parameters()]  # Files are mapped and read when they are looked at.
size = sum(p.numel() * p.element_size() for p in model.parameters())
print(json.dumps({"size": size, "peak": peak() - base}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_a_client_needs_the_memory_of_its_part_and_not_of_the_whole(tmp_path: Path) -> None:
    big = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "vocab_size": 2000}
    with loading.quiet():
        t.LlamaForCausalLM(t.LlamaConfig(**big, num_hidden_layers=24)).save_pretrained(tmp_path)
        t.LlamaForCausalLM(t.LlamaConfig(**big, num_hidden_layers=2)).save_pretrained(tmp_path / "little")
    found = {}
    for what in ("part", "whole"):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(tmp_path), what], capture_output=True, text=True, check=True
        )
        found[what] = json.loads(done.stdout.splitlines()[-1])
    assert found["whole"]["size"] > 20e7
    assert found["part"]["size"] < found["whole"]["size"] / 10
    assert found["whole"]["peak"] > 0.8 * found["whole"]["size"]  # So the measure sees what is loaded.
    assert found["part"]["peak"] < found["part"]["size"] + 0.1 * found["whole"]["size"]
