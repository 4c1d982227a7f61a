"""A seed-pool run's records as a checkpoint: the model of any round, from the base model and what clients reported."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from kilofed.errors import RunError
from kilofed.federation.parties import Server
from kilofed.files import said
from kilofed.methods.fedkseed import BASE, FedKSeed
from kilofed.models import loading
from kilofed.runs.folder import first_seed
from kilofed.runs.restore import restored
from kilofed.zeroth import seed_log
from kilofed.zeroth.pools import log_name

REMOVED = (
    "Client {client} is left out of rounds {rounds}: weights are those that the server would hold had it not answered.\n"
    "This is not unlearning: the other clients estimated gradients at weights that client {client} had changed, "
    "so its rows may still show in the model."
)


@dataclass(frozen=True)
class Replayed:
    """The model of one round of a run."""

    model: nn.Module
    state: dict[str, Tensor]
    """The server's state after that round, but for who holds which version."""
    note: str
    """What leaving a client out did and did not do; empty if none was."""


def write(run: Path, out: Path, *, round: int, without: int | None = None) -> str:
    """Write the model of `round` and its tokeniser to the new folder `out`; returns what is to be said about it.

    Raises:
        RunError: as `replay`, or `out` exists.
    """
    if out.exists():
        raise RunError(f"{out} already exists; choose another folder")
    done = replay(run, round=round, without=without)
    _, sites = restored(first_seed(run))
    part = out.with_name(f".{out.name}.part")
    with said(f"cannot write {out}"):
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)
        loading.save_adapter(done.model, part)
        sites.corpus.tokenizer.save_pretrained(str(part))
        part.rename(out)
    return "\n".join([str(out), *([done.note] if done.note else [])])


def replay(run: Path, *, round: int, without: int | None = None) -> Replayed:
    """The model that a run had after `round`, equal to the bit.

    Args:
        round: 0 is the base model.
        without: number of a client whose reports are left out of every round.

    Raises:
        RunError: the run has no such records, or has a gap in them; its base model is not the one that lies there now;
            the weights do not come out as they did in the run.
    """
    server, sites = restored(first_seed(run))
    method, kept = sites.method, server.state
    if not isinstance(method, FedKSeed):
        raise RunError(f"{run} is a run of {sites.recipe.method.name}, which keeps no seed records; fedkseed does")
    if not 0 <= round <= server.round:
        raise RunError(f"{run} has rounds 0 to {server.round}; there is no round {round}")
    method.setup(fresh := replace(server, state={}, cache={}, round=0))
    if seed_log.to_bytes(fresh.state[BASE]) != seed_log.to_bytes(kept[BASE]):
        raise RunError(
            f"{sites.recipe.model.path} is not the model that {run} began with: its weights hash to "
            f"{seed_log.to_bytes(fresh.state[BASE]).hex()}, the run's to {seed_log.to_bytes(kept[BASE]).hex()}"
        )
    left_out = _apply_records(method, fresh, kept, round, without)
    if without is None:
        _check(method, fresh, kept, round)
    note = (
        REMOVED.format(client=without, rounds=", ".join(map(str, left_out)) or "none") if without is not None else ""
    )
    return Replayed(method.deliver(fresh), fresh.state, note)


def _apply_records(
    method: FedKSeed, fresh: Server, kept: dict[str, Tensor], last: int, without: int | None
) -> list[int]:
    """Apply the records of rounds 1 to `last` to `fresh`; the rounds from which `without` was left out."""
    left_out = []
    for number in range(1, last + 1):
        record = kept.get(log_name(number))
        if record is None:
            raise RunError(f"the record of round {number} is missing: the model of round {number - 1} can be replayed")
        fresh.state[log_name(number)] = record
        method.pools.begin(fresh.state, number)
        if without is not None:
            if record.is_floating_point():
                raise RunError("the run disclosed sums only: no single client's reports are there to be left out")
            replies = seed_log.unpack_reports(record)
            left_out += [number] if without in replies else []
            if set(replies) == {without}:
                raise RunError(f"round {number} had no other client than {without}: nothing is left of it")
        method.pools.apply(
            fresh.seed, fresh.state, number, without=frozenset() if without is None else frozenset({without})
        )
    return left_out


def _check(method: FedKSeed, fresh: Server, kept: dict[str, Tensor], round: int) -> None:
    """Raise RunError unless the weights hash to what the next round of the run began with, where it noted that."""
    expected = kept.get(f"digest.{round + 1:06d}")
    if expected is None:
        return
    method.pools.begin(fresh.state, round + 1)
    point = method.pools.point(fresh.seed, fresh.state)
    if (found := method.perturbed(fresh.model).digest(point)) != seed_log.to_bytes(expected):
        raise RunError(
            f"the weights of round {round} hash to {found.hex()}, in the run {seed_log.to_bytes(expected).hex()}: "
            "the records were changed"
        )
