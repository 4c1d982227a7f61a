"""Files that hold either all of what was written or what they held before."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from kilofed.errors import RunError


def replace_file(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Write `content` to `path` whole or not at all: temporary file, fsync, rename.

    Args:
        mode: who may read and write it, from its first instant; the process's umask takes away from it.

    Raises:
        RunError: the disk is full or not writable; `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with said(f"cannot write {path}; what was there is untouched"):
        try:
            with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def append_line(path: Path, row: Mapping[str, object]) -> None:
    """Append `row` to a JSON-lines file and force it to the disk. Raises RunError."""
    with said(f"cannot write {path}"), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, separators=(",", ":")) + "\n")
        file.flush()
        os.fsync(file.fileno())


def cut_to(path: Path, num_bytes: int) -> None:
    """Keep the first `num_bytes` of a file, on the disk. Raises RunError."""
    with said(f"cannot write {path}"), path.open("r+b") as file:
        file.truncate(num_bytes)
        file.flush()
        os.fsync(file.fileno())


def sha256_of(path: Path) -> str:
    """The digest of a file, 64 hex digits. Raises RunError: it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror or error}): put a copy of it back") from error


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
