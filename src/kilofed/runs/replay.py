"""A seed-pool run's records as a checkpoint: the model of any round, from the base model and what clients reported."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from kilofed.errors import PayloadError, RunError
from kilofed.federation.parties import Server
from kilofed.files import said
from kilofed.methods.fedkseed import BASE, FedKSeed
from kilofed.models import loading
from kilofed.runs import commit
from kilofed.runs.folder import first_seed
from kilofed.runs.restore import restored
from kilofed.zeroth import seed_log
from kilofed.zeroth.pools import check_name, digest_name, log_name

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

    Every digest that the run noted on the way is compared, and the first one after it; without one, the coefficients
    with which the run ended.

    Args:
        round: 0 is the base model.
        without: number of a client whose reports are left out of every round.

    Raises:
        RunError: the run has no such records, or has a gap in them; its base model is not the one that lies there now;
            a record was changed, or the weights do not come out as they did in the run; `without` reported in no round.
    """
    folder = first_seed(run)
    server, sites = restored(folder)
    method = sites.method
    if not isinstance(method, FedKSeed):
        raise RunError(f"{run} is a run of {sites.recipe.method.name}, which keeps no seed records; fedkseed does")
    if not 0 <= round <= server.round:
        raise RunError(f"{run} has rounds 0 to {server.round}; there is no round {round}")
    records = _Records(folder / commit.FILE, method, server, dict(server.state))
    begun = records.base()
    found = records.walk(begun, round)
    if without is None:
        return Replayed(method.deliver(found), found.state, "")
    fewer, left_out = records.walk_without(begun, round, without)
    note = REMOVED.format(client=without, rounds=", ".join(map(str, left_out)))
    return Replayed(method.deliver(fewer), fewer.state, note)


@dataclass(frozen=True)
class _Records:
    """The records of a run, and what it noted of them."""

    path: Path
    """Where they stand."""
    method: FedKSeed
    server: Server
    kept: Mapping[str, Tensor]
    """The state with which the run ended."""

    def base(self) -> Server:
        """The server before round 1. Raises RunError: the base model is another."""
        fresh = replace(self.server, state={}, cache={}, round=0)
        self.method.setup(fresh)
        now, then = (seed_log.to_bytes(state[BASE]).hex() for state in (fresh.state, self.kept))
        if now != then:
            assert self.server.spec
            raise RunError(
                f"{self.server.spec.path} is not the model with which the run of {self.path} began: its weights hash to "
                f"{now}, the run's to {then}; give it that model"
            )
        return fresh

    def walk(self, begun: Server, last: int) -> Server:
        """The server after round `last`, once it and what follows agree with what the run noted. Raises RunError."""
        here, found = (replace(begun, state=dict(begun.state)) for _ in range(2))
        for number in range(1, self.server.round + 1):
            self._apply(here, number)
            if number == last:
                found = replace(here, state=dict(here.state))
            noted = self._compare_weights(here, number)
            if last <= number < self.server.round and noted:
                return found
        self._compare_end(here)
        return found

    def walk_without(self, begun: Server, last: int, client: int) -> tuple[Server, list[int]]:
        """The server after round `last` had `client` not answered, and the rounds in which it had. Raises RunError."""
        here, left_out = replace(begun, state=dict(begun.state)), []
        for number in range(1, last + 1):
            record = self._record(number)
            if record.is_floating_point():
                raise RunError("the run disclosed sums only: no single client's reports are there to be left out")
            replies = seed_log.unpack_reports(record)
            left_out += [number] if client in replies else []
            if set(replies) == {client}:
                raise RunError(f"round {number} had no other client than {client}: nothing is left of it")
            self._apply(here, number, frozenset({client}))
        if not left_out:
            raise RunError(f"client {client} is in no record of rounds 1 to {last}: there is nothing to leave out")
        return here, left_out

    def _record(self, number: int) -> Tensor:
        record = self.kept.get(log_name(number))
        if record is None:
            raise RunError(
                f"the record of round {number} is missing in {self.path}: the model of round {number - 1} can be replayed"
            )
        return record

    def _apply(self, server: Server, number: int, without: frozenset[int] = frozenset()) -> None:
        server.round, server.state[log_name(number)] = number, self._record(number)
        try:
            self._compare_record(number)
            self.method.pools.begin(server.state, number)
            self.method.pools.apply(server.seed, server.state, number, without=without)
        except PayloadError as error:
            raise RunError(f"the record of round {number} in {self.path} is damaged: {error}") from error

    def _compare_record(self, number: int) -> None:
        noted = self.kept.get(check_name(number))
        if noted is None:
            return
        record = self._record(number)
        found = seed_log.record_digests(number, record)
        if torch.equal(found, noted):
            return
        whose = ""
        if not record.is_floating_point() and found.shape == noted.shape:
            clients = list(seed_log.unpack_reports(record))
            changed = [c for c, same in zip(clients, (found == noted).all(dim=1).tolist(), strict=True) if not same]
            whose = f" (of client {', '.join(map(str, changed))})" if len(changed) < len(clients) else ""
        raise RunError(f"the record of round {number} in {self.path} was changed{whose}: put a copy of it back")

    def _compare_weights(self, server: Server, number: int) -> bool:
        """Whether the run noted a digest after round `number`. Raises RunError: it is another."""
        noted = self.kept.get(digest_name(number + 1))
        if noted is None:
            return False
        ahead, pools = dict(server.state), self.method.pools
        if number < server.num_rounds:
            pools.begin(ahead, number + 1)
        found = self.method.perturbed(server.model).digest(pools.point(server.seed, ahead))
        if found != seed_log.to_bytes(noted):
            raise RunError(
                f"the weights after round {number} hash to {found.hex()}, in the run of {self.path} to "
                f"{seed_log.to_bytes(noted).hex()}: a record since the last digest, of round {number} or of one before, "
                "was changed"
            )
        return True

    def _compare_end(self, server: Server) -> None:
        names = {name for name in {*self.kept, *server.state} if name.startswith(("state.", "sums", "versions"))}
        for name in sorted(names):
            one, other = self.kept.get(name), server.state.get(name)
            if one is None or other is None or not torch.equal(one, other):
                raise RunError(
                    f"the records in {self.path} do not lead to its {name} after round {server.round}: a record since "
                    "the last digest was changed"
                )
