"""What `kilofed check` says of rows, clients, tokeniser and template."""

import statistics
from collections import Counter
from collections.abc import Iterator
from typing import cast

from torch import nn

from kilofed.data.examples import IGNORED
from kilofed.data.readers import layout
from kilofed.models.training import num_steps
from kilofed.runs.look import Finding, Look, some
from kilofed.units import count, percent

LEAST_LEARNT = 0.02
"""Share of tokens that should be learnt."""
MOST_CUT = 0.05
"""Share of rows that may be cut."""
MOST_PASSES = 30.0
"""Passes over a client's rows after which it learns them by heart."""


def data(look: Look) -> Iterator[Finding]:
    rows = look.corpus.rows
    yield Finding("good", "data", rows.note)
    spec = look.recipe.data
    kind = layout(spec.columns, rows.train, spec.task)
    yield Finding("good", "columns", f"the rows are read as {kind}")
    yield from _classes(look)


def _classes(look: Look) -> Iterator[Finding]:
    """The agreed label set, and how often its least label occurs."""
    if not (names := look.corpus.classes):
        return
    column, where = look.recipe.data.columns.label, "data.labels" if look.recipe.data.labels else "the training rows"
    held = Counter(str(row[column]) for row in look.corpus.rows.train)
    text = f"{count(len(names))} labels from {where}: {some(names)}"
    if absent := [name for name in names if not held[name]]:
        yield Finding("warn", "labels", f"{text}; no training row has {some(absent)}: they cannot be learnt")
    else:
        yield Finding("good", "labels", f"{text}; {count(min(held[n] for n in names))} training rows or more of each")


def clients(look: Look) -> Iterator[Finding]:
    look.sites.client_ids()  # Refuses a cohort or a quorum of more clients than there are.
    recipe, shares = look.recipe, look.corpus.shares
    sizes = sorted(len(share.train) for share in shares)
    spread = f"{sizes[0]} to {sizes[-1]} training rows each, median {statistics.median(sizes):g}"
    yield Finding("good", "clients", f"{count(len(shares))} clients with {spread}")
    tiny = [share.name for share in shares if len(share.train) < recipe.train.batch_size]
    if tiny:
        text = (
            f"{some(tiny)}: fewer rows than train.batch_size={recipe.train.batch_size}, so every step sees all of them"
        )
        yield Finding("warn", "clients", f"{text}; lower it or set data.partition.min_rows")


def passes(look: Look) -> Iterator[Finding]:
    recipe, shares = look.recipe, look.corpus.shares
    part = (recipe.cohort or len(shares)) / len(shares)
    passes = []
    for share in shares:
        steps = recipe.rounds * num_steps(recipe.train, len(share.train)) * part
        passes.append(steps * min(recipe.train.batch_size, len(share.train)) / len(share.train))
    text = f"each client sees its rows {min(passes):.2g} to {max(passes):.2g} times over in {recipe.rounds} rounds"
    if max(passes) > MOST_PASSES:
        yield Finding("warn", "passes", f"{text}: that learns small clients by heart; fewer rounds or train.steps")
    elif max(passes) < 0.1:
        yield Finding("warn", "passes", f"{text}: most rows are never seen; more rounds or train.steps")
    else:
        yield Finding("good", "passes", text)


def leaks(look: Look) -> Iterator[Finding]:
    shares, renderer = look.corpus.shares, look.corpus.renderer
    rows: dict[str, set[int]] = {}
    prompts: dict[str, set[int]] = {}
    for number, share in enumerate(shares):
        for row in share.train:
            rows.setdefault(renderer.key(row), set()).add(number)
            prompts.setdefault(renderer.key(row, answer=False), set()).add(number)
    seen: Counter[str] = Counter()
    tested = 0
    for number, share in enumerate(shares):
        for row in share.test:
            tested += 1
            key, prompt = renderer.key(row), renderer.key(row, answer=False)
            if key in rows:
                seen["the same row" if number in rows[key] else "the same row at another client"] += 1
            elif prompt in prompts:
                seen["the same prompt" if number in prompts[prompt] else "the same prompt at another client"] += 1
    shared = sum(len(holders) > 1 for holders in rows.values())
    if seen:
        kinds = ", ".join(f"{number} with {kind}" for kind, number in sorted(seen.items()))
        yield Finding("warn", "leaks", f"{sum(seen.values())} of {tested} held-out rows are also in the training rows "
                      f"({kinds}): their scores are too good; drop them from one side")  # fmt: skip
    else:
        yield Finding(
            "good", "leaks", f"none of {tested} held-out rows is among the training rows, by row or by prompt"
        )
    if shared:
        yield Finding("warn", "leaks", f"{shared} training rows are held by more than one client: "
                      "parties are less different than they look")  # fmt: skip


def tokeniser(look: Look) -> Iterator[Finding]:
    tokenizer = look.corpus.tokenizer
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    classifies = bool(look.corpus.classes)
    if eos is None and not classifies:
        yield Finding("warn", "tokeniser", "the tokeniser has no end token: answers do not learn to stop and run to "
                      "evaluate.max_new_tokens; set eos_token in its tokenizer_config.json")  # fmt: skip
    elif pad == eos and not classifies:
        yield Finding("warn", "tokeniser", f"padding and end are one token ({tokenizer.eos_token}): kilofed masks padding "
                      "by position, so ends are learnt; programs that mask by token would unlearn to stop")  # fmt: skip
    rows = cast(nn.Embedding, look.outline.get_input_embeddings()).num_embeddings
    if len(tokenizer) > rows:
        yield Finding("bad", "tokeniser", f"the tokeniser has {count(len(tokenizer))} tokens, the model {count(rows)} "
                      "embeddings: take the tokeniser that belongs to the model")  # fmt: skip
    else:
        yield Finding("good", "tokeniser", f"{count(len(tokenizer))} tokens, {count(rows)} embeddings")


def template(look: Look) -> Iterator[Finding]:
    renderer = look.corpus.renderer
    if renderer.kind == "label":
        yield Finding("good", "template", "rows to classify: the text stands as it is, there is no prompt")
        return
    if renderer.kind == "text":
        yield Finding("good", "template", "running text: every token is learnt, there is no prompt")
        return
    asked = next((e.prompt_ids for e in look.whole), [])
    text = str(renderer.tokenizer.decode(asked))
    shown = text if len(text) <= 100 else text[:100] + "..."
    yield Finding("good", "template", f"{renderer.template}: a prompt begins {shown!r}")


def loss(look: Look) -> Iterator[Finding]:
    spec = look.recipe.data
    examples, kind = look.examples(spec), look.corpus.renderer.kind
    if kind == "label":
        yield Finding("good", "loss", f"{percent(len(examples) / len(look.sample))} of rows have a label")
        return
    tokens = sum(len(e.input_ids) for e in examples)
    learnt = sum(label != IGNORED for e in examples for label in e.labels[1:])
    if not learnt:
        yield Finding("bad", "loss", f"no token of {len(look.sample)} rows is learnt: answers are empty or cut away; "
                      f"check data.columns and data.max_length={spec.max_length}")  # fmt: skip
        return
    share = learnt / tokens
    text = f"{percent(share)} of tokens are learnt"
    if share < LEAST_LEARNT:
        yield Finding(
            "warn", "loss", f"{text}: nearly all work goes into prompts; check data.columns and the template"
        )
    else:
        yield Finding("good", "loss", f"{text} (in {len(look.sample)} rows)")


def truncation(look: Look) -> Iterator[Finding]:
    most = look.recipe.data.max_length
    lengths = sorted(len(e.input_ids) for e in look.whole)
    if not lengths:
        return
    cut = sum(length > most for length in lengths) / len(lengths)
    needed = lengths[min(int(0.95 * len(lengths)), len(lengths) - 1)]
    text = f"{percent(cut)} of rows are longer than data.max_length={most}"
    if cut > MOST_CUT:
        yield Finding(
            "warn", "truncation", f"{text} and lose part of their prompt or answer: {needed} would hold 95 %"
        )
    else:
        yield Finding("good", "truncation", f"{text}; the longest has {lengths[-1]} tokens")
    positions = getattr(look.outline.config, "max_position_embeddings", None)
    longest, answer = min(most, lengths[-1]), look.recipe.evaluate.max_new_tokens
    if isinstance(positions, int) and longest > positions:
        yield Finding("bad", "truncation", f"rows of {longest} tokens, the model has {positions} positions: "
                      f"set data.max_length={positions} or less")  # fmt: skip
    elif look.corpus.classes:
        return
    elif isinstance(positions, int) and look.recipe.evaluate.generate and longest + answer > positions:
        yield Finding("warn", "truncation", f"prompts of up to {longest} tokens and evaluate.max_new_tokens={answer} pass "
                      f"the model's {positions} positions: lower one of them")  # fmt: skip
