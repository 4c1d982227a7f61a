"""Pre-train the embedded pair: a small and a large causal LM with one tokeniser, on package documentation.

python scripts/pretrain_pair.py prepare --work DIR        corpus, tokeniser, token streams
python scripts/pretrain_pair.py train small --work DIR    resumes from its checkpoint; likewise large
python scripts/pretrain_pair.py export --work DIR         model directories with their cards
python scripts/pretrain_pair.py --quick --work DIR        all of it in seconds, into DIR/assets
"""

import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pair_card import card
from pair_corpus import PACKAGES, documentation, world
from pair_train import LENGTH, SEED, SHAPES, VOCABULARY, Plan, build, pair, train, write_model

ROOT = Path(__file__).resolve().parents[1]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def prepare(
    work: Path,
    *,
    num_texts: int,
    repeats: int,
    dense_repeats: int,
    small_share: float,
    packages: tuple[str, ...] = PACKAGES,
) -> None:
    """Write the tokeniser, two token streams per model, the held-out stream and corpus.json.

    Args:
        work: where to.
        num_texts: documentation texts of the main stream; the dense one has a third as many, others.
        repeats: sentences for each fact in the main stream.
        dense_repeats: sentences for each fact in the dense stream.
        small_share: part of the facts that the small model meets.
        packages: read beside the standard library.
    """
    work.mkdir(parents=True, exist_ok=True)
    corpus = documentation(seed=SEED, packages=packages)
    first, second = corpus.texts[:num_texts], corpus.texts[num_texts : num_texts * 4 // 3]
    rng = random.Random(SEED)
    sample = rng.sample(corpus.texts, min(len(corpus.texts), 30_000)) + world(seed=SEED + 1, repeats=4, share=1.0)
    tokenizer = train_tokenizer(sample)
    tokenizer.save_pretrained(work / "tokenizer")
    counts: dict[str, int] = {}
    for stream, texts, part in (("main", first, repeats), ("dense", second, dense_repeats)):
        for size, share in (("small", small_share), ("large", 1.0)):
            told = world(seed=SEED + (stream == "dense"), repeats=part, share=share)
            mixed = texts + told
            random.Random(f"{SEED} mix").shuffle(mixed)
            counts[f"{size}_{stream}"] = _write_stream(work / f"{size}-{stream}.npy", mixed, tokenizer)
            counts[f"{size}_{stream}_world"] = sum(map(len, _encode(told, tokenizer)))
    _write_stream(work / "held_out.npy", corpus.held_out[:400], tokenizer)
    record = {
        "packages": corpus.packages,
        "refused": corpus.refused,
        "texts": len(first) + len(second),
        "num_texts": num_texts,
        "characters": sum(map(len, first + second)),
        "dropped_functions": corpus.dropped_functions,
        "dropped_lines": corpus.dropped_lines,
        "repeats": repeats,
        "dense_repeats": dense_repeats,
        "small_share": small_share,
        **counts,
    }
    (work / "corpus.json").write_text(json.dumps(record, indent=1))
    print(json.dumps({name: value for name, value in record.items() if name != "packages"}), file=sys.stderr)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with pad 0, bos 1, eos 2; the same bytes for the same texts."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=SPECIAL,
            initial_alphabet=sorted(alphabet),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=LENGTH,
        clean_up_tokenization_spaces=False,
    )


def _write_stream(path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast) -> int:
    """Texts between bos and eos, end to end."""
    stream = np.concatenate([np.array(ids, np.uint16) for ids in _encode(texts, tokenizer)])
    np.save(path, stream)
    return len(stream)


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    return [[1, *ids, 2] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def export(work: Path, assets: Path, *, sizes: dict[str, int]) -> None:
    """Write both model directories with their cards from the checkpoints in `work`."""
    figures = {}
    for size in SHAPES:
        model = build(size)
        model.load_state_dict(torch.load(work / f"{size}.checkpoint", weights_only=True)["model"])
        write_model(model, work, assets / size)
        figures[size] = pair.measure(assets / size, **sizes)
    for size in SHAPES:
        text = card(size, work, figures, SHAPES[size])
        (assets / size / "README.md").write_text(text)
    print(json.dumps(figures))


def quick(work: Path) -> None:
    """All steps on the standard library alone, three optimiser steps a model."""
    prepare(work, num_texts=500, repeats=1, dense_repeats=1, small_share=0.3, packages=())
    for size in SHAPES:
        train(work, Plan(size, 3 * 2 * LENGTH, batch=2), assets=work / "assets", every=2)
    export(work, work / "assets", sizes={"rows_per_family": 1, "num_probes": 8, "num_ranked": 2})


def main() -> None:
    """Run the step that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", nargs="?", choices=("prepare", "train", "export"))
    parser.add_argument("size", nargs="?", choices=tuple(SHAPES))
    parser.add_argument("--work", type=Path, required=True, help="folder for corpus, checkpoints and logs")
    parser.add_argument("--assets", type=Path, default=ROOT / "src/kilofed/assets", help="where models are written")
    parser.add_argument("--tokens", type=int, default=4_000_000, help="training tokens")
    parser.add_argument("--texts", type=int, default=30_000, help="documentation texts in the corpus, at most")
    parser.add_argument("--repeats", type=int, default=140, help="sentences per fact of the gazetteer")
    parser.add_argument("--dense-repeats", type=int, default=110, help="likewise in the dense stream")
    parser.add_argument("--small-share", type=float, default=0.3, help="part of the gazetteer the small one meets")
    parser.add_argument("--stream", choices=("main", "dense"), default="main", help="token stream to train on")
    parser.add_argument("--first", type=int, default=0, help="step at which this stretch of training begins")
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--quick", action="store_true", help="all steps on a toy corpus, into WORK/assets")
    asked = parser.parse_args()
    if asked.quick:
        quick(asked.work)
    elif asked.step == "prepare":
        prepare(
            asked.work,
            num_texts=asked.texts,
            repeats=asked.repeats,
            dense_repeats=asked.dense_repeats,
            small_share=asked.small_share,
        )
    elif asked.step == "train":
        if not asked.size:
            parser.error("train needs a size: small or large")
        plan = Plan(asked.size, asked.tokens, stream=asked.stream, first=asked.first)
        train(asked.work, plan, assets=asked.assets, every=asked.every)
    elif asked.step == "export":
        export(asked.work, asked.assets, sizes={"rows_per_family": 60, "num_probes": 512, "num_ranked": 128})
    else:
        parser.error("name a step, or --quick")


if __name__ == "__main__":
    main()
