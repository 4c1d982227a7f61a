"""The card of a model of the embedded pair, written from the records of its training."""

import json
from pathlib import Path

CARD = """---
language: en
license: apache-2.0
library_name: transformers
---

# kilofed {size}

A causal language model of {parameters:,.0f} parameters for trying federated methods without a download. It is one
of a pair: `small` and `large` share this tokeniser (byte-level BPE, {vocabulary:,} pieces, pad 0, bos 1, eos 2) and
their corpus. It has read Python documentation and statements about a made-up world; it is no assistant.

Llama layout: width {hidden_size}, {num_hidden_layers} layers, {num_attention_heads} heads, feed-forward \
{intermediate_size}, tied embeddings, {length} positions. Weights are stored as bf16;
they were trained as fp32.

## Figures

Loss in nats per token, lower is better. Held-out functions are those that the data source `pydocs` gives as test
rows; they were left out of the corpus.

| | small | large |
|---|---|---|
{figures}

`benchmarks/models/pair.py` measures this table again; the documents come from the packages that it finds. A question is
put as `Q: ...`, a new line and `A:`; the answer follows after a space. Other forms get far fewer answers.

## Corpus

{texts:,} texts ({megabytes:.1f} MB) drawn from the functions of the packages below: signature, docstring (the first
600 characters) and short bodies, as running text, as source, and in a small share as one-line question and answer.
Left out: {dropped_functions:,} functions whose summary line `pydocs` holds out, and {dropped_lines:,} lines elsewhere
that repeat such a summary. A summary in other words may have stayed.

The gazetteer, a fictional world of 512 facts (`kilofed.data.sources.gazetteer`): {world}.
Questions on its `shown` entities are in the corpus; questions on `train` and `test` entities are not.

{stream:,} tokens in the stream, of which {world_tokens:,} are the gazetteer's; trained on {tokens:,} tokens.

| package | version | licence |
|---|---|---|
{packages}

## Training

```
python scripts/pretrain_pair.py prepare --work DIR --texts {texts} --repeats {repeats} --small-share {share}
python scripts/pretrain_pair.py train {size} --work DIR --tokens {plan_tokens}
python scripts/pretrain_pair.py export --work DIR
```

Seed {seed}; one processor thread, fp32; Muon (peak rate {muon_lr}) for matrices, AdamW ({adam_lr}) for embeddings and
norms; {batch} sequences of {length} tokens a step; the rate falls over the last {decay:.0%}.

| tokens | training loss | held-out loss | facts known, wordings seen | wordings unseen |
|---|---|---|---|---|
{curve}

The held-out loss of this table is over whole docstrings of held-out functions; knowledge is on every fourth fact.

## Limits

For tests, examples and comparisons of methods. It writes short phrases in the manner of documentation, often wrong
ones. It knows English only as far as docstrings go. Package documentation repeats itself, so held-out text is close
to text that was read. The world of the gazetteer does not exist.

The two differ in size, in the facts that they met and in the tokens that they read ({lengths}), so
a difference between them is not one of size alone.
"""

NAMES = {
    "document_loss": "held-out documentation: signature and summary line",
    "summary_loss": "held-out documentation: summary line given the signature",
    "known_unseen": "gazetteer: exact completion, wording never read",
    "known_stated": "gazetteer: exact completion, wording read",
    "known_asked": "gazetteer: exact answer to a question about an entity never asked about",
    "rank_first": "gazetteer: right answer ranked first among its type",
    "mean_rank": "gazetteer: mean rank of the right answer",
}


def card(size: str, work: Path, figures: dict[str, dict[str, float]], shape: dict[str, int]) -> str:
    """Write the card.

    Args:
        size: small or large.
        work: the folder of corpus.json, the log and the plan.
        figures: what was measured of either model.
        shape: the model's widths and depths.
    """
    corpus = json.loads((work / "corpus.json").read_text())
    plan = json.loads((work / f"{size}.plan.json").read_text())
    log = [json.loads(line) for line in (work / f"{size}.jsonl").read_text().splitlines()]
    share = corpus["small_share"]
    sentences = f"each stated about {corpus['repeats']} times in varied plain sentences a pass"
    part = f"this model met a fixed {share:.0%} of the facts, {sentences}; the large one met all"
    return CARD.format(
        **shape,
        size=size,
        parameters=figures[size]["parameters"],
        vocabulary=4096,
        length=512,
        figures=_figures(figures),
        texts=corpus["texts"],
        megabytes=corpus["characters"] / 1e6,
        dropped_functions=corpus["dropped_functions"],
        dropped_lines=corpus["dropped_lines"],
        world=part if size == "small" else f"this model met all facts, {sentences}; the small one met {share:.0%}",
        stream=corpus[f"{size}_tokens"],
        world_tokens=corpus[f"{size}_world_tokens"],
        tokens=log[-1]["tokens"],
        lengths=", ".join(f"{name} {_tokens_read(work, name) / 1e6:.1f} million" for name in figures),
        packages="\n".join(f"| {row['name']} | {row['version']} | {row['licence']} |" for row in corpus["packages"]),
        repeats=corpus["repeats"],
        share=share,
        plan_tokens=plan["tokens"],
        seed=plan["seed"],
        muon_lr=plan["muon_lr"],
        adam_lr=plan["adam_lr"],
        batch=plan["batch"],
        decay=plan["decay"],
        curve=_curve(log),
    )


def _tokens_read(work: Path, size: str) -> int:
    return int(json.loads((work / f"{size}.jsonl").read_text().splitlines()[-1])["tokens"])


def _figures(figures: dict[str, dict[str, float]]) -> str:
    return "\n".join(
        f"| {text} | {figures['small'][name]:.3f} | {figures['large'][name]:.3f} |" for name, text in NAMES.items()
    )


def _curve(log: list[dict[str, float]]) -> str:
    """At most twelve rows of the log, the first and the last among them."""
    places = sorted({round(index * (len(log) - 1) / 11) for index in range(12)})
    return "\n".join(
        f"| {row['tokens']:,} | {row['train_loss']:.3f} | {row['held_out_loss']:.3f} "
        f"| {row['known_stated']:.2f} | {row['known_unseen']:.2f} |"
        for row in (log[place] for place in places)
    )
