"""What `kilofed check` says of model, machine, messages and method."""

import os
import shutil
import statistics
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from kilofed.federation.presentation import Presentation
from kilofed.models import loading
from kilofed.runs.look import Finding, Look
from kilofed.runs.preview import rounds, traffic
from kilofed.units import count, percent, size

HELD_OUT = 128
"""About how many held-out rows a method may look at."""


def device(look: Look) -> Iterator[Finding]:
    device = loading.find_device(look.recipe.model.device)
    text = f"{device} is there; {os.cpu_count()} cores, torch uses {torch.get_num_threads()}"
    yield Finding("good", "device", text)


def adapter(look: Look) -> Iterator[Finding]:
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


def memory(look: Look) -> Iterator[Finding]:
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


def disk(look: Look) -> Iterator[Finding]:
    needed, free = _run_folder(look), shutil.disk_usage(Path.cwd()).free
    text = f"about {size(needed)} of disk needed for the run folder, {size(free)} free here"
    if needed > free:
        yield Finding("bad", "disk", f"{text}: make room or choose another --out")
    else:
        yield Finding("good", "disk", text)


def _run_folder(look: Look) -> int:
    """Bytes: the state, its temporary copy, the adapter, two ledger lines per exchange, a report."""
    recipe = look.recipe
    trained = sum(p.numel() for p in loading.trained(look.outline).values())
    exchanges = recipe.rounds * (recipe.cohort or len(look.corpus.shares))
    return recipe.seeds * (3 * 4 * trained + 300 * exchanges + 5_000_000)


def models(look: Look) -> Iterator[Finding]:
    """Clients whose model is not the recipe's."""
    sites, recipe = look.sites, look.recipe
    others = Counter(sites.method.client_model(recipe, client) for client in sites.client_ids())
    for spec, number in others.items():
        if spec is not None and spec.path != recipe.model.path:
            sites.corpus.renderer_of(spec)  # Refuses a vocabulary in which the others cannot teach it.
            yield Finding(
                "good", "models", f"{spec.path} at {number} of {len(sites.corpus.shares)} clients: its vocabulary fits"
            )


def weights(look: Look) -> Iterator[Finding]:
    """Whether the model's weights are there and whole."""
    if look.fits and (spec := look.sites.method.server_model(look.recipe)):
        num = sum(1 for _ in look.sites.store.model(spec).parameters())
        yield Finding("good", "weights", f"{count(num)} tensors of {spec.path} are there")


def messages(look: Look) -> Iterator[Finding]:
    """Bytes on the wire."""
    recipe = look.recipe
    sent = [traffic(look.sites, look.preview) for _ in rounds(look.sites, look.preview)]
    if not all(sent):
        text = f"{recipe.method.name} does not say what it sends, so its bytes cannot be foreseen"
        yield Finding("warn", "bytes", text)
        return
    first = sent[0].values()
    down, up = (statistics.fmean(sum(vars(one)[way] for one in mine) for mine in first) for way in ("down", "up"))
    seen = sum(one.down + one.up for clients in sent for mine in clients.values() for one in mine)
    total = seen * recipe.rounds / len(sent)
    about = "" if type(look.sites.method).exact_bytes and len(sent) == recipe.rounds else "about "
    text = f"{about}{size(down)} down and {size(up)} up per client in the first round, {size(total)} in the whole run"
    yield Finding("good", "bytes", text)


def method(look: Look) -> Iterator[Finding]:
    """What the method itself finds on some rows of the clients."""
    shown = look.sites.method.presentation()
    if type(shown).diagnose is Presentation.diagnose or not look.fits:
        return  # Nothing to say, or loading the weights would not go well.
    sites, recipe = look.sites, look.recipe
    sites.method.setup(server := sites.server())
    rows = look.examples(recipe.data)
    held_out = [e for client in sites.client_ids()[:HELD_OUT] for e in sites.corpus.test_examples(client)]
    for found in shown.diagnose(server, rows, held_out[:: max(len(held_out) // HELD_OUT, 1)]):
        yield Finding("good" if found.good else "warn", "method", found.text)
