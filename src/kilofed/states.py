"""A client's own state from message to message, on its own disk, the last two rounds of it."""

from pathlib import Path

from torch import Tensor

from kilofed.files import replace_file
from kilofed.payload import Payload

When = tuple[int, int]
"""(round, exchange)."""


class States:
    """One client's state, the last two rounds of it.

    A message of (round, exchange) finds the newest state that is older than it, so a server that went back a round
    meets the state it means. With a folder each state is a file; without one it is kept in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._held: dict[int, tuple[When, dict[str, Tensor]]] = {}
        if folder and folder.is_dir():
            for file in sorted(folder.glob("round-*.safetensors")):
                payload = Payload.decode(file.read_bytes())
                when = int(payload.scalars["round"]), int(payload.scalars["exchange"])
                self._held[when[0]] = (when, dict(payload.tensors))

    def before(self, when: When) -> dict[str, Tensor]:
        """A copy of the newest state older than `when`; empty if there is none."""
        older = [held for held in self._held.values() if held[0] < when]
        newest = max(older, key=lambda held: held[0], default=(when, {}))
        return {name: tensor.clone() for name, tensor in newest[1].items()}

    def keep(self, when: When, state: dict[str, Tensor]) -> None:
        """Write `state` as that of `when`; states of later rounds and of rounds before the last two go."""
        self._held[when[0]] = (when, dict(state))
        if self._folder:
            self._folder.mkdir(parents=True, exist_ok=True)
            scalars = {"round": when[0], "exchange": when[1]}
            replace_file(self._file(when[0]), Payload(state, scalars).encode())
        for number in [n for n in self._held if n > when[0] or n < when[0] - 1]:
            del self._held[number]
            if self._folder:
                self._file(number).unlink(missing_ok=True)

    def _file(self, number: int) -> Path:
        assert self._folder is not None
        return self._folder / f"round-{number:06d}.safetensors"
