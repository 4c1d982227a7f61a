"""The embedded pair: it loads, it is small, it shares a tokeniser, and the large one is the better one."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from kilofed.data.sources import gazetteer

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "src/kilofed/assets"
LIMITS = {"small": 1_000_000, "large": 5_000_000}


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    return {size: AutoModelForCausalLM.from_pretrained(ASSETS / size, dtype=torch.float32).eval() for size in LIMITS}


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "models"))
    return importlib.import_module("pair")


@pytest.mark.parametrize("size", LIMITS)
def test_a_directory_holds_what_transformers_needs_and_a_card(size: str) -> None:
    names = {path.name for path in (ASSETS / size).iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "README.md"),
    }


def test_both_directories_are_under_12_megabytes() -> None:
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) < 12e6


def test_parameters_are_within_the_limits(models: dict[str, PreTrainedModel]) -> None:
    for size, limit in LIMITS.items():
        assert limit / 3 < models[size].num_parameters() < limit
        assert models[size].config.tie_word_embeddings
        assert models[size].config.max_position_embeddings == 512


def test_weights_are_finite_and_in_fp32_on_demand(models: dict[str, PreTrainedModel]) -> None:
    for model in models.values():
        assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in model.parameters())


def test_the_pair_shares_one_tokeniser() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (ASSETS / "small" / name).read_bytes() == (ASSETS / "large" / name).read_bytes()


def test_tokeniser_gives_back_every_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "small")
    for text in ("def f(x):\n    return  x\n", "  é 漢字 \U0001f600\t", "Don't , stop .", ""):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == 4096
    assert tokenizer.chat_template is None


def test_generation_stops_at_eos(models: dict[str, PreTrainedModel]) -> None:
    for model in models.values():
        assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 0)


def test_large_is_better_on_held_out_documentation(models: dict[str, PreTrainedModel], pair: ModuleType) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "small")
    documents = pair.documents(5)
    assert len(documents) > 40
    losses = {size: pair.documentation(model, tokenizer, documents) for size, model in models.items()}
    assert losses["small"]["document_loss"] - losses["large"]["document_loss"] > 0.2
    assert losses["large"]["summary_loss"] < losses["small"]["summary_loss"]
    assert losses["small"]["summary_loss"] < 5.5


def test_large_knows_the_gazetteer_and_small_only_a_part(models: dict[str, PreTrainedModel], pair: ModuleType) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "small")
    probes = gazetteer.probes(unseen=False)[::4]
    known = {size: pair.knowledge(model, tokenizer, probes)["exact"] for size, model in models.items()}
    assert known["large"] >= 0.8
    assert known["small"] <= 0.4


def test_large_answers_in_wordings_and_questions_that_it_never_read(
    models: dict[str, PreTrainedModel], pair: ModuleType
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "small")
    unseen = gazetteer.probes()[::5]
    asked = pair.questions("test")[::3]
    assert pair.knowledge(models["large"], tokenizer, unseen)["exact"] >= 0.4
    assert pair.knowledge(models["large"], tokenizer, asked, end="")["exact"] >= 0.4
    assert pair.knowledge(models["small"], tokenizer, asked, end="")["exact"] <= 0.2


def test_exact_completion_is_what_greedy_generation_writes(
    models: dict[str, PreTrainedModel], pair: ModuleType
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "large")
    for probe in gazetteer.probes(unseen=False)[::64]:
        ids = torch.tensor([[1, *tokenizer(probe.prompt, add_special_tokens=False)["input_ids"]]])
        written = models["large"].generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False
        )
        text = tokenizer.decode(written[0, ids.shape[1] :])
        exact = pair.knowledge(models["large"], tokenizer, [probe])["exact"] == 1.0
        assert text.startswith(f" {probe.answer}.") == exact


@pytest.mark.parametrize("size", LIMITS)
def test_card_names_corpus_licences_seed_and_command(size: str) -> None:
    card = (ASSETS / size / "README.md").read_text()
    for words in ("Python standard library", "PSF-2.0", "Seed 20", f"pretrain_pair.py train {size}", "## Limits"):
        assert words in card
    parameters = json.loads((ASSETS / size / "config.json").read_text())["hidden_size"]
    assert f"width {parameters}" in card
