"""Small real runs for attacks: a random two-layer model over bytes, three clients of 3, 10 and 41 rows, every method."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kilofed.config.fields import Value
from kilofed.config.recipe import Recipe
from kilofed.config.tables import from_table

SIZES = (3, 10, 41)

CASES: dict[str, tuple[str, dict[str, Value]]] = {
    "fedavg": ("fedavg", {}),
    "fedprox": ("fedprox", {"mu": 0.5}),
    "fedavgm": ("fedavgm", {}),
    "fedadam": ("fedadam", {}),
    "fedyogi": ("fedyogi", {}),
    "fedmezo": ("fedmezo", {"steps": 3, "lr": 1e-2}),
    "fedmezo round-wise": ("fedmezo", {"steps": 3, "lr": 1e-2, "rates": "round-wise"}),
    "fedkseed": ("fedkseed", {"num_seeds": 64, "steps": 4, "lr": 1e-3}),
    "fedkseed sums": ("fedkseed", {"num_seeds": 64, "steps": 4, "lr": 1e-3, "disclose": "sums"}),
    "kd": ("kd", {"steps": 2, "client_distill_steps": 1, "batch_size": 4, "top_k": 8, "public_rows": 3}),
    "kd counts": (
        "kd",
        {"steps": 2, "client_distill_steps": 1, "batch_size": 4, "top_k": 8, "public_rows": 3, "score_share": 0.5},
    ),
    "split": ("split", {}),
    "split U-shape": ("split", {"labels": "client"}),
    "fedpt": ("fedpt", {"steps": 2, "batch_size": 4, "top_k": 8, "tolerance": 9.0}),
}
"""Method and fields by name."""


def make(folder: Path) -> None:
    """Write the models and the rows of all runs."""
    for name, layers, width in (("small", 2, 16), ("large", 3, 32)):
        with torch.random.fork_rng():
            torch.manual_seed(layers)
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
            LlamaForCausalLM(config).save_pretrained(folder / name)
        _tokenizer().save_pretrained(folder / name)
    rows = [
        {"client": f"site {client}", "instruction": f"add {n} and {client}", "response": f"is {n + client}"}
        for client, size in enumerate(SIZES)
        for n in range(size)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def recipe(folder: Path, case: str, **changes: Value) -> Recipe:
    """The recipe of one of CASES, two rounds, with `changes` to its top-level keys."""
    name, fields = CASES[case]
    if name == "fedpt":
        fields = {**fields, "large": str(folder / "large")}
    table: dict[str, Value] = {
        "name": "attacked",
        "rounds": 2,
        "model": {"path": str(folder / "small")},
        "adapter": {"rank": 2, "alpha": 4.0},
        "data": {
            "source": str(folder / "rows.jsonl"),
            "holdout": 0.2,
            "max_length": 48,
            "public_share": 0.2 * (name in ("kd", "fedpt")),
        },
        "train": {"steps": 2, "batch_size": 4, "lr": 0.01},
        "evaluate": {"generate": 0, "baselines": []},
        "method": {"name": name, **fields},
    }
    return from_table({**table, **changes})


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, after pad 0, bos 1, eos 2."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<bos>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
