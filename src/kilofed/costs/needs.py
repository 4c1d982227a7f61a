"""What a run needs of memory and disk, by rule of thumb, and what is free."""

import os
from pathlib import Path

import torch
from transformers import PreTrainedModel

from kilofed.config.recipe import Recipe

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def memory(recipe: Recipe, model: PreTrainedModel, length: int) -> int:
    """Bytes beside the libraries at the run's peak, on the device that holds the model.

    Weights are held once, and once more while the local-only and central rows are made; trained tensors have a
    gradient, the optimiser's moments and five copies on their way to and from the server; on top comes the larger
    of one training step's activations and one evaluation step's logits.

    Args:
        model: with its adapter; weights are not looked at.
        length: tokens of the longest example.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    moments = {"adamw": 2, "adam": 2, "sgd": 0}[recipe.train.optimizer]
    copies = 2 if {"local", "central"} & set(recipe.evaluate.controls) else 1
    processes = recipe.engine.workers + 1 if recipe.engine.name != "inprocess" else 1
    config = model.config
    hidden, layers = int(getattr(config, "hidden_size", 1024)), int(getattr(config, "num_hidden_layers", 12))
    inner, words = (
        int(getattr(config, "intermediate_size", None) or 4 * hidden),
        int(getattr(config, "vocab_size", 50_000)),
    )
    width = 2 if recipe.train.autocast or recipe.model.dtype != "float32" else 4
    # Factors fitted to resident memory of a LLaMA of 3.4 M parameters: within a quarter of what was measured.
    part = -(-recipe.train.batch_size // recipe.train.accumulation)
    step = part * length * (layers * (16 * hidden + 7 * inner) * width + 4 * words * 4)
    score = recipe.evaluate.batch_size * length * 3 * words * 4
    learning = trained * 4 * (1 + moments)
    return processes * (weights + learning + max(step, score)) + (copies - 1) * weights + 5 * 4 * trained


def disk(recipe: Recipe, model: PreTrainedModel, num_clients: int) -> int:
    """Bytes of the run folder: the state, its temporary copy, the adapter, two ledger lines per exchange, a report."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    exchanges = recipe.rounds * (recipe.cohort or num_clients)
    return recipe.seeds * (3 * 4 * trained + 300 * exchanges + 5_000_000)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on `device`."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text("ascii").splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # Only Linux says what is free.
