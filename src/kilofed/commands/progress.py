"""Progress of a run on stderr: a bar on a terminal, a line per round elsewhere."""

import sys
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

METRICS = {"train_loss": "training loss", "loss": "held-out loss", "accuracy": "accuracy"}


class Progress:
    """Prints what a run reports."""

    folder: Path | None = None
    """Folder of the run that this process began last."""

    def __init__(self) -> None:
        self._bar: tqdm[None] | None = None
        self._terminal = sys.stderr.isatty()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def begin(self, folder: Path) -> None:
        """Print the folder of a run that begins."""
        type(self).folder = folder
        print(f"run folder: {folder}", file=sys.stderr)

    def stage(self, text: str) -> None:
        """Print what the run does outside of rounds."""
        if self._bar is not None and self._terminal:
            self._bar.set_description_str(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def round(self, number: int, total: int, metrics: Mapping[str, object]) -> None:
        """Print the metrics of round `number` of `total`."""
        text = "  ".join(
            f"{label} {metrics[name]:.4f}" for name, label in METRICS.items() if metrics.get(name) is not None
        )
        if not self._terminal:
            print(f"round {number}/{total}  {text}  {metrics['seconds']:.1f} s", file=sys.stderr, flush=True)
            return
        if self._bar is None:
            self._bar = tqdm(total=total, initial=number - 1, unit="round", file=sys.stderr, dynamic_ncols=True)
        self._bar.set_description_str(f"round {number}/{total}")
        self._bar.set_postfix_str(text)
        self._bar.update()

    @classmethod
    def hint(cls) -> str:
        """How to continue the run of this process after Ctrl-C; empty if none had begun."""
        return f" Finished rounds are saved: kilofed resume {cls.folder}" if cls.folder else ""
