"""state.safetensors: the server's state after a round, and what else of the run folder it goes with.

What kilofed keeps stands in scalars and in one tensor whose name no method has; the file carries its own digest.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from kilofed.errors import PayloadError, RunError
from kilofed.federation.sealed import seal, unseal
from kilofed.federation.states import Mark
from kilofed.files import replace_file, said
from kilofed.payload import Payload, Scalar

FILE = "state.safetensors"
CLIENTS = "@clients"
"""Name of the tensor with the newest state of each client: (num_clients, 7), client, round, exchange, digest."""


@dataclass(frozen=True)
class Lines:
    """What of a file of lines was there: how many, and their digest as `Tally` gives it."""

    num: int
    sha256: str


@dataclass(frozen=True)
class Commit:
    """A round that is over, and the files that it ended with."""

    state: Mapping[str, Tensor]
    """The method's own."""
    round: int
    run: str
    """The run's identity; "" in a file of a release that knew none, of which nothing below is known either."""
    recipe: str
    """Digest of what in the recipe changes numbers."""
    ledger: Lines
    metrics: Lines
    num_means: int
    """Means that were released since the run began."""
    clients: Mapping[int, Mark] = field(default_factory=dict)
    """The newest state of each client that has one."""

    @property
    def state_sha256(self) -> str:
        """Digest of round and state alone, 64 hex digits: of the numbers, wherever and however they came about."""
        return hashlib.sha256(Payload(self.state, {"round": self.round}).encode()).hexdigest()


def write(folder: Path, commit: Commit) -> None:
    """Put `commit` in the place of the one before. Raises RunError: it cannot be written; that one is untouched."""
    scalars: dict[str, Scalar] = {
        "round": commit.round,
        "run": commit.run,
        "recipe": commit.recipe,
        "ledger": commit.ledger.sha256,
        "ledger_lines": commit.ledger.num,
        "metrics": commit.metrics.sha256,
        "metrics_lines": commit.metrics.num,
        "num_means": commit.num_means,
    }
    table = {CLIENTS: _to_tensor(commit.clients)} if commit.clients else {}
    replace_file(folder / FILE, seal({**commit.state, **table}, scalars))


def read(folder: Path) -> Commit | None:
    """The newest round that was committed in `folder`; None if there is none.

    Raises:
        RunError: the file is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return None
    with said(f"cannot read {path}"):
        body = path.read_bytes()
    try:
        if Payload.peek(body).keys() == {"round"}:
            return _unsealed(Payload.decode(body))
        found = unseal(body)
        words, tensors = found.scalars, dict(found.tensors)
        clients = _from_tensor(tensors.pop(CLIENTS, torch.zeros(0, 7, dtype=torch.int64)))
        return Commit(
            tensors,
            int(words["round"]),
            str(words["run"]),
            str(words["recipe"]),
            Lines(int(words["ledger_lines"]), str(words["ledger"])),
            Lines(int(words["metrics_lines"]), str(words["metrics"])),
            int(words["num_means"]),
            clients,
        )
    except (PayloadError, KeyError, ValueError) as error:
        raise RunError(
            f"{path} is not a whole state of a run ({error}): put a copy of it back, or run the recipe anew"
        ) from error


def _unsealed(found: Payload) -> Commit:
    """What a release before digests committed."""
    nothing = Lines(0, "")
    return Commit(dict(found.tensors), int(found.scalars["round"]), "", "", nothing, nothing, 0)


def _to_tensor(clients: Mapping[int, Mark]) -> Tensor:
    rows = [
        [client, *mark.when, *(int(mark.sha256[at : at + 16], 16) - 2**63 for at in range(0, 64, 16))]
        for client, mark in sorted(clients.items())
    ]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 7)


def _from_tensor(table: Tensor) -> dict[int, Mark]:
    return {
        client: Mark((round, exchange), "".join(f"{part + 2**63:016x}" for part in digest))
        for client, round, exchange, *digest in table.tolist()
    }
