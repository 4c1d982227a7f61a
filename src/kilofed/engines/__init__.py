"""Engines move bytes between the server and numbered clients; one file each."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kilofed.config.recipe import EngineSpec
from kilofed.engines.inprocess import Handler, InProcess
from kilofed.engines.opener import Opener

if TYPE_CHECKING:  # A worker that imports this package needs nothing of it.
    from kilofed.federation.cohort import Engine


def open_engine(spec: EngineSpec, ids: Sequence[int], recipe_json: str, folder: Path, handler: Handler) -> "Engine":
    """The engine that `spec` names.

    Args:
        ids: numbers of the clients.
        recipe_json: what other processes build their handler from.
        folder: where client states are kept.
        handler: the clients' side in this process; the in-process engine's only.

    Raises:
        RunError: the extra that the engine needs is not installed.
    """
    # Equal numbers of threads give equal bits in every process.
    threads = spec.threads or torch.get_num_threads()
    opener = Opener("kilofed.runs.sites:open_handler", (recipe_json, str(folder.absolute())), threads)
    if spec.name == "pool":
        from kilofed.engines.pool import Pool

        return Pool(ids, opener, workers=spec.workers, timeout=spec.timeout)
    if spec.name == "stream":
        from kilofed.engines.stream import Stream

        return Stream(ids, opener, timeout=spec.timeout)
    if spec.name == "flower":
        from kilofed.engines.flower import Flower

        return Flower(ids, opener, workers=spec.workers, timeout=spec.timeout)
    return InProcess(ids, handler)
