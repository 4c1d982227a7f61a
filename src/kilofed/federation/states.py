"""A client's own state from message to message, on its own disk, far enough back to answer a message again.

A file says which client's state it is, of which run and of which message, and carries its own digest: one that was
damaged, renamed or taken from elsewhere is refused by its name.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from kilofed.errors import PayloadError, RunError
from kilofed.federation.sealed import SEAL, seal, unseal
from kilofed.files import replace_file, said
from kilofed.payload import Payload, Scalar

When = tuple[int, int]
"""(round, exchange)."""

_NAME = re.compile(r"round-(\d+)-(\d+)\.safetensors")
_AGAIN = "put a copy of it back, or run the recipe anew"


@dataclass(frozen=True)
class Mark:
    """Which state it was."""

    when: When
    sha256: str
    """64 hex digits."""


class States:
    """One client's states: the newest, the one before it, and the newest of an earlier round.

    A message of (round, exchange) finds the newest state that is older than it. So a message that comes twice meets
    the same state, and so does one of a server that went back to the start of a round.

    Args:
        folder: one file per state; nothing is remembered outside it, so any process may answer the next message.
            None keeps the states in this object.
        client: number of the client, which its files must carry.
    """

    def __init__(self, folder: Path | None = None, client: int = 0) -> None:
        self._folder, self._client = folder, client
        self._held: dict[When, dict[str, Tensor]] = {}

    def before(self, when: When, run: str = "") -> dict[str, Tensor]:
        """A copy of the newest state older than `when`; empty if there is none.

        Args:
            run: what the run is known by.

        Raises:
            RunError: the state's file is damaged, or is that of another client, message or run.
        """
        newest = max((held for held in self._kept() if held < when), default=None)
        return self._read(newest, run) if newest else {}

    def keep(self, when: When, state: dict[str, Tensor], run: str = "") -> None:
        """Write `state` as that of `when`; later states go, and earlier ones that no message can ask for.

        Raises:
            RunError: the disk is full or not writable; what was there is untouched.
        """
        if self._folder:
            with said(f"cannot make {self._folder}"):
                self._folder.mkdir(parents=True, exist_ok=True)
            replace_file(self._file(when), seal(state, self._about(when, run)))
        else:
            self._held[when] = _copy(state)
        kept = self._kept()
        needed = {
            when,
            max((held for held in kept if held < when), default=when),
            max((held for held in kept if held[0] < when[0]), default=when),
        }
        for held in kept - needed:
            if self._folder:
                self._file(held).unlink(missing_ok=True)
            self._held.pop(held, None)

    def newest(self, last_round: int) -> Mark | None:
        """The newest state of rounds up to `last_round`, by the digest that its file carries; None if there is none.

        Raises:
            RunError: the file cannot be read.
        """
        when = max((held for held in self._kept() if held[0] <= last_round), default=None)
        if when is None or not self._folder:
            return None
        file = self._file(when)
        try:
            with said(f"cannot read {file}"):
                return Mark(when, str(Payload.peek(file.read_bytes())[SEAL]))
        except (PayloadError, KeyError) as error:
            raise RunError(f"the client state {file} is damaged ({error}): {_AGAIN}") from error

    def hold_against(self, mark: Mark | None, last_round: int, run: str) -> None:
        """Refuse to go on after `last_round` with another state than that of `mark`, or a later one of this client.

        Raises:
            RunError: the state is gone, older, damaged, or is that of another client, message or run.
        """
        assert self._folder
        when = max((held for held in self._kept() if held[0] <= last_round), default=None)
        if mark and (when is None or when < mark.when):
            found = f"the newest there is {self._file(when).name}" if when else "there is none of a round so early"
            raise RunError(
                f"the client state {self._file(mark.when)} is missing, with which round {last_round} ended ({found}): "
                f"{_AGAIN}"
            )
        if when is None:
            return
        self._read(when, run)  # A client that was waited for no longer may have kept a later state than `mark`.
        if mark and when == mark.when and self.newest(last_round) != mark:
            raise RunError(
                f"the client state {self._file(when)} is not the one with which round {last_round} ended: {_AGAIN}"
            )

    def _kept(self) -> set[When]:
        if not self._folder:
            return set(self._held)
        try:
            names = os.listdir(self._folder)
        except (FileNotFoundError, NotADirectoryError):
            return set()
        found = filter(None, map(_NAME.fullmatch, names))
        return {(int(match[1]), int(match[2])) for match in found}

    def _read(self, when: When, run: str) -> dict[str, Tensor]:
        if not self._folder:
            return _copy(self._held[when])
        file = self._file(when)
        try:
            with said(f"cannot read {file}"):
                found = unseal(file.read_bytes())
        except PayloadError as error:
            raise RunError(f"the client state {file} is damaged ({error}): {_AGAIN}") from error
        about = {name: value for name, value in found.scalars.items() if name != SEAL}
        if about != (expected := self._about(when, run)):
            wrong = [f"{name} {about.get(name)}, expected {value}" for name, value in expected.items()
                     if about.get(name) != value]  # fmt: skip
            raise RunError(f"{file} holds another client state ({'; '.join(wrong)}): {_AGAIN}")
        return dict(found.tensors)

    def _about(self, when: When, run: str) -> dict[str, Scalar]:
        return {"client": self._client, "run": run, "round": when[0], "exchange": when[1]}

    def _file(self, when: When) -> Path:
        assert self._folder is not None
        return self._folder / f"round-{when[0]:06d}-{when[1]:04d}.safetensors"


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}
