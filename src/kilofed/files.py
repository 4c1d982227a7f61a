"""Files that hold either all of what was written or what they held before."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from kilofed.errors import RunError


def replace_file(path: Path, content: bytes) -> None:
    """Write `content` to `path` whole or not at all: temporary file, fsync, rename.

    Raises:
        RunError: the disk is full or not writable; `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with said(f"cannot write {path}; what was there is untouched"):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def cut_after(path: Path, last_round: int) -> None:
    """Drop the JSON lines of rounds above `last_round`, and a half-written last line, that a killed run left behind."""
    if not path.exists():
        return
    kept = []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not line.endswith("\n"):
                break  # Half-written, even if it reads well: the next line would be glued to it.
            try:
                row = json.loads(line)
            except ValueError:
                break  # Lines are appended in order, so only the last one can be half-written.
            if row["round"] <= last_round:
                kept.append(line)
    replace_file(path, "".join(kept).encode("utf-8"))


def append_line(path: Path, row: dict[str, object]) -> None:
    """Append `row` to a JSON-lines file and force it to the disk. Raises RunError."""
    with said(f"cannot write {path}"), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, separators=(",", ":")) + "\n")
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def said(what: str) -> Iterator[None]:
    """Turn an operating system's refusal into one sentence that begins with `what`."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{what} ({error.strerror or error}): make room or choose another folder, then resume"
        ) from error


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return  # Windows has no way to sync a folder, and its rename is durable with the file.
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
