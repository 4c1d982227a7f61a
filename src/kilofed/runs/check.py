"""Preflight: what would go wrong in a run, found before anything is trained; one line per finding, with what to do."""

import logging
import os
import shutil
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from kilofed.config.recipe import MethodSpec, PrivacySpec, Recipe
from kilofed.costs import environment
from kilofed.costs.counter import CostCounter
from kilofed.data.examples import IGNORED, Example, Renderer
from kilofed.data.readers import Row, layout
from kilofed.errors import KilofedError, ModelError
from kilofed.federation.method import load_method
from kilofed.federation.presentation import Presentation
from kilofed.federation.workload import RunPreview
from kilofed.models import loading
from kilofed.models.training import num_steps
from kilofed.privacy.mechanisms import load_mechanism
from kilofed.runs.preview import MOST, bench_of, num_looked_at, preview_of, run_memory, traffic, turn_to
from kilofed.runs.sites import Sites
from kilofed.units import count, percent, size

log = logging.getLogger("kilofed")

Level = Literal["good", "warn", "bad"]

SAMPLE = 512
"""Most rows that are tokenised to look at masks and lengths."""
HELD_OUT = 128
"""About how many held-out rows a method may look at."""
LEAST_LEARNT = 0.02
MOST_CUT = 0.05
MOST_PASSES = 30.0
NO_LIMIT = 10**9


@dataclass(frozen=True)
class Finding:
    """One line of the preflight."""

    level: Level
    name: str
    """What was looked at, such as `truncation`."""
    text: str
    """What was seen and, unless it is good, what to do."""


def check(recipe: Recipe) -> list[Finding]:
    """Look at the recipe's method, machine, data, tokeniser and model; nothing is trained and nothing is written."""
    findings: dict[str, Finding] = {}  # By text: one broken thing is said once, however many looks meet it.

    def found(one: Finding) -> None:
        findings.setdefault(one.text, one)

    try:
        load_method(recipe.method)
    except KilofedError as error:
        found(Finding("bad", "method", _sentence(error)))
        recipe = replace(recipe, method=MethodSpec())
    try:
        load_mechanism(recipe.privacy)
    except KilofedError as error:
        found(Finding("bad", "privacy", _sentence(error)))
        recipe = replace(recipe, privacy=PrivacySpec())
    with _Heard() as heard:
        look = _Look(recipe)
        for name, part in PARTS.items():
            try:
                for finding in part(look):
                    found(finding)
            except KilofedError as error:
                found(Finding("bad", name, _sentence(error)))
    for text in heard.texts:
        found(Finding("warn", "data", text))
    return list(findings.values())


class _Look:
    """What several parts look at, made once."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.sites = Sites(recipe)
        self.corpus = self.sites.corpus

    @cached_property
    def sample(self) -> list[Row]:
        """Training rows, evenly over clients, at most about SAMPLE."""
        shares = self.corpus.shares
        each = max(SAMPLE // len(shares), 1)
        return [row for share in shares[:SAMPLE] for row in share.train[:: max(len(share.train) // each, 1)][:each]]

    @cached_property
    def whole(self) -> list[Example]:
        """The sample's examples, not cut."""
        spec = replace(self.recipe.data, max_length=NO_LIMIT)
        return Renderer(self.corpus.tokenizer, spec, self.corpus.renderer.kind, self.corpus.classes)(self.sample)

    @cached_property
    def outline(self) -> PreTrainedModel:
        """The model with its adapter, without weights."""
        return loading.outline(self.recipe.model, self.recipe.adapter, self.corpus.classes)

    @cached_property
    def bench(self) -> CostCounter:
        """What counts the run's passes."""
        return bench_of(self.sites)

    @cached_property
    def preview(self) -> RunPreview:
        """The run's first round, on a model without numbers."""
        preview = preview_of(self.sites, self.bench)
        self.sites.method.check(preview.server)
        return preview

    @cached_property
    def needed(self) -> int | None:
        """Bytes of memory that the run needs beside the libraries; None where nobody can tell."""
        try:
            return run_memory(self.sites, self.preview, self.bench)
        except ModelError:  # Its own code looks at numbers, which are not there.
            return None

    @property
    def fits(self) -> bool:
        """Whether the model may be loaded."""
        return self.needed is None or self.needed <= self.free

    @cached_property
    def free(self) -> int:
        """Bytes of memory that it can have."""
        return environment.free_memory(loading.find_device(self.recipe.model.device))


def _device(look: _Look) -> Iterator[Finding]:
    device = loading.find_device(look.recipe.model.device)
    text = f"{device} is there; {os.cpu_count()} cores, torch uses {torch.get_num_threads()}"
    yield Finding("good", "device", text)


def _data(look: _Look) -> Iterator[Finding]:
    rows = look.corpus.rows
    yield Finding("good", "data", rows.note)
    spec = look.recipe.data
    kind = layout(spec.columns, rows.train, spec.task)
    yield Finding("good", "columns", f"the rows are read as {kind}")
    yield from _classes(look)


def _classes(look: _Look) -> Iterator[Finding]:
    """The agreed label set, and how often its least label occurs."""
    if not (names := look.corpus.classes):
        return
    column, where = look.recipe.data.columns.label, "data.labels" if look.recipe.data.labels else "the training rows"
    held = Counter(str(row[column]) for row in look.corpus.rows.train)
    text = f"{count(len(names))} labels from {where}: {_some(names)}"
    if absent := [name for name in names if not held[name]]:
        yield Finding("warn", "labels", f"{text}; no training row has {_some(absent)}: they cannot be learnt")
    else:
        yield Finding("good", "labels", f"{text}; {count(min(held[n] for n in names))} training rows or more of each")


def _clients(look: _Look) -> Iterator[Finding]:
    look.sites.client_ids()  # Refuses a cohort or a quorum of more clients than there are.
    recipe, shares = look.recipe, look.corpus.shares
    sizes = sorted(len(share.train) for share in shares)
    spread = f"{sizes[0]} to {sizes[-1]} training rows each, median {statistics.median(sizes):g}"
    yield Finding("good", "clients", f"{count(len(shares))} clients with {spread}")
    tiny = [share.name for share in shares if len(share.train) < recipe.train.batch_size]
    if tiny:
        text = f"{_some(tiny)}: fewer rows than train.batch_size={recipe.train.batch_size}, so every step sees all of them"
        yield Finding("warn", "clients", f"{text}; lower it or set data.partition.min_rows")


def _passes(look: _Look) -> Iterator[Finding]:
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


def _leaks(look: _Look) -> Iterator[Finding]:
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


def _tokeniser(look: _Look) -> Iterator[Finding]:
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


def _template(look: _Look) -> Iterator[Finding]:
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


def _loss(look: _Look) -> Iterator[Finding]:
    spec = look.recipe.data
    renderer = Renderer(look.corpus.tokenizer, spec, look.corpus.renderer.kind, look.corpus.classes)
    examples = renderer(look.sample)
    if renderer.kind == "label":
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


def _truncation(look: _Look) -> Iterator[Finding]:
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


def _adapter(look: _Look) -> Iterator[Finding]:
    spec = look.recipe.adapter
    parameters = loading.trained(look.outline)
    num_trained, num_all = (sum(p.numel() for p in some) for some in (parameters.values(), look.outline.parameters()))
    text = f"{count(num_trained)} of {count(num_all)} parameters are trained ({percent(num_trained / num_all)})"
    if spec.kind == "lora":
        targets = sorted({name.split(".lora_")[0].rsplit(".", 1)[-1] for name in parameters if ".lora_" in name})
        text += f", LoRA of rank {spec.rank} on {', '.join(targets)}"
    if look.corpus.classes:
        text += f"; a head of kind {spec.head} for {len(look.corpus.classes)} labels is trained with them"
    yield Finding("good", "adapter", text)


def _memory(look: _Look) -> Iterator[Finding]:
    if look.needed is None:
        text = f"what {look.recipe.method.name} takes with this model cannot be foreseen; {size(look.free)} are free"
        yield Finding("warn", "memory", text)
        return
    text = f"about {size(look.needed)} of memory needed beside the libraries, {size(look.free)} free"
    if not look.fits:
        yield Finding("bad", "memory", f"{text}: raise train.accumulation, lower data.max_length or evaluate.batch_size, "
                      "or take a smaller model, dtype or adapter")  # fmt: skip
    elif look.needed > 0.7 * look.free:
        yield Finding("warn", "memory", f"{text}, which is tight: raise train.accumulation or lower data.max_length")
    else:
        yield Finding("good", "memory", text)


def _disk(look: _Look) -> Iterator[Finding]:
    needed, free = _run_folder(look), shutil.disk_usage(Path.cwd()).free
    text = f"about {size(needed)} of disk needed for the run folder, {size(free)} free here"
    if needed > free:
        yield Finding("bad", "disk", f"{text}: make room or choose another --out")
    else:
        yield Finding("good", "disk", text)


def _run_folder(look: _Look) -> int:
    """Bytes: the state, its temporary copy, the adapter, two ledger lines per exchange, a report."""
    recipe = look.recipe
    trained = sum(p.numel() for p in loading.trained(look.outline).values())
    exchanges = recipe.rounds * (recipe.cohort or len(look.corpus.shares))
    return recipe.seeds * (3 * 4 * trained + 300 * exchanges + 5_000_000)


def _models(look: _Look) -> Iterator[Finding]:
    """Clients whose model is not the recipe's."""
    sites, recipe = look.sites, look.recipe
    others = Counter(sites.method.client_model(recipe, client) for client in sites.client_ids())
    for spec, number in others.items():
        if spec is not None and spec.path != recipe.model.path:
            sites.corpus.renderer_of(spec)  # Refuses a vocabulary in which the others cannot teach it.
            yield Finding(
                "good", "models", f"{spec.path} at {number} of {len(sites.corpus.shares)} clients: its vocabulary fits"
            )


def _weights(look: _Look) -> Iterator[Finding]:
    """Whether the model's weights are there and whole."""
    if look.fits and (spec := look.sites.method.server_model(look.recipe)):
        num = sum(1 for _ in look.sites.store.model(spec).parameters())
        yield Finding("good", "weights", f"{count(num)} tensors of {spec.path} are there")


def _bytes(look: _Look) -> Iterator[Finding]:
    recipe, ids = look.recipe, look.sites.client_ids()
    looked = num_looked_at(recipe, len(ids), MOST)
    rounds = []
    for number in range(1, looked + 1):
        turn_to(look.preview, look.sites, number)
        rounds.append(traffic(look.sites, look.preview))
    if not all(rounds):
        text = f"{recipe.method.name} does not say what it sends, so its bytes cannot be foreseen"
        yield Finding("warn", "bytes", text)
        return
    first = rounds[0].values()
    down, up = (statistics.fmean(sum(vars(one)[way] for one in mine) for mine in first) for way in ("down", "up"))
    total = (
        sum(one.down + one.up for sent in rounds for mine in sent.values() for one in mine) * recipe.rounds / looked
    )
    about = "" if type(look.sites.method).exact_bytes and looked == recipe.rounds else "about "
    text = f"{about}{size(down)} down and {size(up)} up per client in the first round, {size(total)} in the whole run"
    yield Finding("good", "bytes", text)


def _method(look: _Look) -> Iterator[Finding]:
    """What the method itself finds on some rows of the clients."""
    shown = look.sites.method.presentation()
    if type(shown).diagnose is Presentation.diagnose or not look.fits:
        return  # Nothing to say, or loading the weights would not go well.
    sites, recipe = look.sites, look.recipe
    sites.method.setup(server := sites.server())
    rows = Renderer(sites.corpus.tokenizer, recipe.data, sites.corpus.renderer.kind, sites.corpus.classes)(look.sample)
    held_out = [e for client in sites.client_ids()[:HELD_OUT] for e in sites.corpus.test_examples(client)]
    for found in shown.diagnose(server, rows, held_out[:: max(len(held_out) // HELD_OUT, 1)]):
        yield Finding("good" if found.good else "warn", "method", found.text)


PARTS: dict[str, Callable[[_Look], Iterator[Finding]]] = {
    "device": _device,
    "data": _data,
    "clients": _clients,
    "passes": _passes,
    "adapter": _adapter,
    "tokeniser": _tokeniser,
    "template": _template,
    "loss": _loss,
    "truncation": _truncation,
    "models": _models,
    "leaks": _leaks,
    "memory": _memory,
    "disk": _disk,
    "bytes": _bytes,
    "weights": _weights,
    "method": _method,
}


class _Heard(logging.Handler):
    """Keeps kilofed's warnings for as long as the block runs, so that they become findings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())

    def __enter__(self) -> "_Heard":
        self._passed_on, log.propagate = log.propagate, False
        log.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        log.removeHandler(self)
        log.propagate = self._passed_on


def _sentence(error: KilofedError) -> str:
    return " ".join(str(error).split())


def _some(names: Sequence[str]) -> str:
    """The first few names and how many more there are."""
    shown = ", ".join(names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
