"""Tiny runs of every method, and what of a run folder must be equal in equal runs; for damage.py and kills.py."""

import hashlib
import json
import os
import sys
import tomllib
import traceback
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kilofed.config import tables
from kilofed.config.recipe import Recipe
from kilofed.files import replace_file
from kilofed.reports import report

SIZES = (3, 10, 41)
"""Rows of each client."""
PUBLIC = {"fedpt", "kd"}
METHODS: dict[str, dict[str, object]] = {
    "fedavg": {},
    "fedprox": {"method.mu": 0.5},
    "fedavgm": {},
    "fedadam": {},
    "fedyogi": {},
    "fedkseed": {"method.num_seeds": 64, "method.steps": 3, "method.lr": 1e-3, "adapter.kind": "full"},
    "fedmezo": {"method.steps": 3, "method.lr": 1e-3, "adapter.kind": "full"},
    "fedpt": {"method.steps": 2, "method.batch_size": 4, "method.top_k": 8, "method.tolerance": 9.0},
    "kd": {
        "method.steps": 2,
        "method.client_distill_steps": 1,
        "method.batch_size": 4,
        "method.top_k": 8,
        "method.public_rows": 3,
    },
    "split": {},
}
RUNS: dict[str, dict[str, object]] = {
    **{name: {"method": name, **words} for name, words in METHODS.items()},
    "fedavg with noise": {"method": "fedavg", "privacy.kind": "central"},
    "two seeds with noise": {"method": "fedavg", "privacy.kind": "central", "seeds": 2},
    "pro, two pools": {
        "method": "fedkseed",
        **METHODS["fedkseed"],
        "method.sampling": "pro",
        "method.rounds_per_pool": 2,
    },
}
"""Words of each run."""
KEY = "ab" * 16
VARIES = {"run", "seconds", "peak_memory_bytes", "files", "sha256", "created", "framing_bytes"}


def prepare(folder: Path) -> Path:
    """Write a random model over bytes, a larger one, and rows; gives `folder`."""
    for name, layers, width in (("model", 2, 16), ("large", 3, 32)):
        torch.manual_seed(layers)
        config = LlamaConfig(
            vocab_size=259, hidden_size=width, intermediate_size=width * 3 // 2, num_hidden_layers=layers,
            num_attention_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            tie_word_embeddings=True,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    rows = [
        {"client": f"site {client}", "instruction": f"add {n} and {client}", "response": f"is {n + client}"}
        for client, size in enumerate(SIZES)
        for n in range(size)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, after pad 0, bos 1, eos 2."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<bos>", "<eos>", *alphabet])}
    found = Tokenizer(models.BPE(vocabulary, []))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=found, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def recipe(work: Path, name: str, **words: object) -> Recipe:
    """The recipe of a run of RUNS: three rounds on the rows in `work`."""
    own = RUNS[name]
    table = {
        "name": "tiny",
        "rounds": 3,
        "model": {"path": str(work / "model")},
        "adapter": {"rank": 2},
        "data": {
            "source": str(work / "rows.jsonl"),
            "holdout": 0.2,
            "max_length": 48,
            "public_share": 0.2 * (own["method"] in PUBLIC),
        },
        "train": {"steps": 1, "batch_size": 2, "lr": 0.01},
        "evaluate": {"generate": 0, "baselines": ["base"], "batch_size": 8},
        "engine": {"threads": 1},
    }
    if own["method"] == "fedpt":
        words = {"method.large": str(work / "large"), **words}
    found = tables.from_table(table)  # type: ignore[arg-type]
    return tables.changed(found, {**own, **words})  # type: ignore[dict-item]


def quiet() -> None:
    """One thread, and pages without plots, which take longer than the rounds; what counts is that a page is written."""
    torch.set_num_threads(1)
    report.write = lambda folder: replace_file(folder / "report.html", b"report")  # type: ignore[assignment]


def lasting(folder: Path, but: Collection[str] = ()) -> dict[str, str]:
    """Digests of everything in a finished run that must be equal in equal runs, by path; none of files named as in `but`."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or path.suffix == ".html" or path.name in {"noise.key", "README.md", *but}:
            continue
        content = path.read_bytes()
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in content.splitlines()]
            content = json.dumps([{k: v for k, v in row.items() if k not in VARIES} for row in rows]).encode()
        elif path.suffix == ".toml":
            content = json.dumps(tomllib.loads(content.decode()), sort_keys=True).encode()
        elif path.suffix == ".json":
            table = {k: v for k, v in json.loads(content).items() if k not in VARIES}
            content = json.dumps(table, sort_keys=True).encode()
        found[name] = hashlib.sha256(content).hexdigest()[:16]
    return found


def child(
    work: Callable[[], dict[str, object]], *, group: bool = False
) -> tuple[int, Callable[[], dict[str, object]]]:
    """Do `work` in a forked child, in a process group of its own if asked; its id, and what gives the answer.

    The answer is what `work` gave, {"crash": traceback} for an error that it raised, or {} if it was killed.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        if group:
            os.setpgid(0, 0)
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        try:
            answer = work()
        except BaseException:
            answer = {"crash": traceback.format_exc()}
        with open(writing, "w") as pipe:
            json.dump(answer, pipe)
        sys.stdout.flush()
        os._exit(0)
    os.close(writing)

    def wait() -> dict[str, object]:
        with open(reading) as pipe:
            text = pipe.read()
        os.waitpid(pid, 0)
        return dict(json.loads(text)) if text else {}

    return pid, wait
