"""A client's own state from message to message, on its own disk, of the last two rounds that it took part in."""

import os
from pathlib import Path

from torch import Tensor

from kilofed.errors import PayloadError, RunError
from kilofed.files import replace_file
from kilofed.payload import Payload

When = tuple[int, int]
"""(round, exchange)."""

_PREFIX, _SUFFIX = "round-", ".safetensors"


class States:
    """One client's state, of the last two rounds that it took part in.

    A message of (round, exchange) finds the newest state that is older than it, so a server that went back a round
    meets the state it means.

    Args:
        folder: one file per round; nothing is remembered outside it, so any process may answer the next message.
            None keeps the states in this object.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._held: dict[int, tuple[When, dict[str, Tensor]]] = {}

    def before(self, when: When) -> dict[str, Tensor]:
        """A copy of the newest state older than `when`; empty if there is none.

        Raises:
            RunError: the state's file is damaged.
        """
        for number in sorted(self._rounds(), reverse=True):
            if number <= when[0]:
                held, state = self._read(number)
                if held < when:
                    return state
        return {}

    def keep(self, when: When, state: dict[str, Tensor]) -> None:
        """Write `state` as that of `when`; states of later rounds go, and of earlier ones all but the newest.

        Raises:
            RunError: the disk is full or not writable; what was there is untouched.
        """
        if self._folder:
            self._folder.mkdir(parents=True, exist_ok=True)
            scalars = {"round": when[0], "exchange": when[1]}
            replace_file(self._file(when[0]), Payload(state, scalars).encode())
        else:
            self._held[when[0]] = (when, _copy(state))
        earlier = [number for number in self._rounds() if number < when[0]]
        for number in self._rounds():
            if number > when[0] or number < max(earlier, default=0):
                if self._folder:
                    self._file(number).unlink(missing_ok=True)
                self._held.pop(number, None)

    def _rounds(self) -> list[int]:
        if not self._folder:
            return list(self._held)
        try:
            names = os.listdir(self._folder)
        except FileNotFoundError:
            return []
        numbers = [name.removeprefix(_PREFIX).removesuffix(_SUFFIX) for name in names]
        return [int(number) for number in numbers if number.isdecimal()]

    def _read(self, number: int) -> tuple[When, dict[str, Tensor]]:
        if not self._folder:
            when, state = self._held[number]
            return when, _copy(state)
        file = self._file(number)
        try:
            payload = Payload.decode(file.read_bytes())
        except PayloadError as error:
            raise RunError(f"the client state {file} is damaged: put a copy of it back, or start afresh") from error
        return (int(payload.scalars["round"]), int(payload.scalars["exchange"])), dict(payload.tensors)

    def _file(self, number: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{_PREFIX}{number:06d}{_SUFFIX}"


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}
