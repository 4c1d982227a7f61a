"""A client's own state from message to message, on its own disk, far enough back to answer a message again."""

import os
import re
from pathlib import Path

from torch import Tensor

from kilofed.errors import PayloadError, RunError
from kilofed.files import replace_file
from kilofed.payload import Payload

When = tuple[int, int]
"""(round, exchange)."""

_NAME = re.compile(r"round-(\d+)-(\d+)\.safetensors")


class States:
    """One client's states: the newest, the one before it, and the newest of an earlier round.

    A message of (round, exchange) finds the newest state that is older than it. So a message that comes twice meets
    the same state, and so does one of a server that went back to the start of a round.

    Args:
        folder: one file per state; nothing is remembered outside it, so any process may answer the next message.
            None keeps the states in this object.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._held: dict[When, dict[str, Tensor]] = {}

    def before(self, when: When) -> dict[str, Tensor]:
        """A copy of the newest state older than `when`; empty if there is none.

        Raises:
            RunError: the state's file is damaged.
        """
        newest = max((held for held in self._kept() if held < when), default=None)
        return self._read(newest) if newest else {}

    def keep(self, when: When, state: dict[str, Tensor]) -> None:
        """Write `state` as that of `when`; later states go, and earlier ones that no message can ask for.

        Raises:
            RunError: the disk is full or not writable; what was there is untouched.
        """
        if self._folder:
            self._folder.mkdir(parents=True, exist_ok=True)
            replace_file(self._file(when), Payload(state).encode())
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

    def _kept(self) -> set[When]:
        if not self._folder:
            return set(self._held)
        try:
            names = os.listdir(self._folder)
        except FileNotFoundError:
            return set()
        found = filter(None, map(_NAME.fullmatch, names))
        return {(int(match[1]), int(match[2])) for match in found}

    def _read(self, when: When) -> dict[str, Tensor]:
        if not self._folder:
            return _copy(self._held[when])
        file = self._file(when)
        try:
            return dict(Payload.decode(file.read_bytes()).tensors)
        except PayloadError as error:
            raise RunError(f"the client state {file} is damaged: put a copy of it back, or start afresh") from error

    def _file(self, when: When) -> Path:
        assert self._folder is not None
        return self._folder / f"round-{when[0]:06d}-{when[1]:04d}.safetensors"


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}
