"""Small real parts for every test: a two-layer random Llama with a byte tokeniser, rows of equal and unequal clients."""

import dataclasses
import json
import os
import typing
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kilofed.config.bounds import Settings, bounds_of
from kilofed.config.fields import Value
from kilofed.config.recipe import Recipe
from kilofed.config.tables import changed, from_table

torch.set_num_threads(1)

SAFE_PATH = "PYTHONSAFEPATH"
_BEFORE = os.environ.get(SAFE_PATH)


@pytest.fixture(autouse=True)
def path_of_scripts() -> None:
    """The command, called in this process, keeps scripts' own folders from the path of all that is started after it."""
    os.environ.pop(SAFE_PATH, None)
    if _BEFORE is not None:
        os.environ[SAFE_PATH] = _BEFORE


SIZES = {"few": 3, "some": 10, "many": 41}
"""Rows of each client where nothing speaks for equal ones: means that forget a weight show."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, after pad 0, bos 1, eos 2."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<bos>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random Llama: 2 layers, width 16, 259 tokens, tied embeddings."""
    return random_llama(tmp_path_factory.mktemp("tiny-model"), seed=0, layers=2, width=16)


@pytest.fixture(scope="session")
def tiny_large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a larger random Llama with the tokeniser of the tiny one: 3 layers, width 32."""
    return random_llama(tmp_path_factory.mktemp("tiny-large"), seed=1, layers=3, width=32)


def random_llama(folder: Path, *, seed: int, layers: int, width: int) -> Path:
    """Write a random Llama over bytes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=259,
            hidden_size=width,
            intermediate_size=width * 3 // 2,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=128,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=True,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random BERT: 2 layers, width 16, 259 tokens, with a pooling layer and no head."""
    folder = tmp_path_factory.mktemp("tiny-encoder")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=259,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=128,
            pad_token_id=0,
        )
        BertModel(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty rows of ten for each of four clients; answers differ by client."""
    path = tmp_path_factory.mktemp("tiny-data") / "rows.jsonl"
    rows = [
        {"client": f"site {n % 4}", "instruction": f"add {n} and {n % 4}", "response": f"is {n + n % 4}"}
        for n in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def uneven_rows(row: Callable[[int], Mapping[str, object]]) -> list[dict[str, object]]:
    """Rows of three clients by SIZES; `row` makes one from its number, from 0 over all clients."""
    owners = [name for name, size in SIZES.items() for _ in range(size)]
    return [{**row(number), "client": name} for number, name in enumerate(owners)]


@pytest.fixture(scope="session")
def uneven_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of three clients by SIZES, their answers of unequal length too."""
    path = tmp_path_factory.mktemp("uneven-data") / "rows.jsonl"
    rows = uneven_rows(lambda n: {"instruction": f"add {n}", "response": "is " + n % 5 * "7"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture
def tiny_table(tiny_model: Path, tiny_rows: Path) -> dict[str, Value]:
    """The recipe of `tiny_recipe` as a table, to be changed by a test."""
    return {
        "name": "test",
        "rounds": 2,
        "model": {"path": str(tiny_model)},
        "adapter": {"rank": 2, "alpha": 4.0},
        "data": {"source": str(tiny_rows), "holdout": 0.2, "max_length": 48},
        "train": {"steps": 2, "batch_size": 4, "lr": 0.01},
        "evaluate": {"generate": 1, "max_new_tokens": 4},
    }


@pytest.fixture
def tiny_recipe(tiny_table: dict[str, Value]) -> Recipe:
    """Two rounds of FedAvg with LoRA on forty rows of four clients."""
    return from_table(tiny_table)


@pytest.fixture
def uneven(tiny_recipe: Recipe, uneven_file: Path) -> Recipe:
    """Two rounds of FedAvg with LoRA on the rows of three clients by SIZES."""
    return changed(tiny_recipe, {"data.source": str(uneven_file)})


def stated(settings: type[Settings]) -> dict[str, tuple[object, str]]:
    """Default and bounds in words of each field that is a number."""
    hints = typing.get_type_hints(settings, include_extras=True)
    return {
        item.name: (item.default, bounds_of(hints[item.name]).words)
        for item in dataclasses.fields(settings)
        if isinstance(item.default, int | float)
    }
