"""One process at a time holds a run folder; another is told which one does.

The lock goes with the process: one that is killed leaves none behind, and worker processes do not inherit it. On Windows,
and on file systems that know no locks, nothing is held: there, two processes on one folder are the user's to avoid.
"""

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from kilofed.errors import RunError
from kilofed.files import said

log = logging.getLogger("kilofed")

FILE = "run.lock"
"""Says who holds the folder; what counts is the lock on it, not that it is there."""


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process until the block ends.

    Raises:
        RunError: another process holds it, or this one in another place.
    """
    handle = _open_locked(folder / FILE)
    try:
        if handle is not None:
            since = datetime.now(UTC).isoformat(" ", "seconds").removesuffix("+00:00")
            with said(f"cannot write {folder / FILE}"):
                os.truncate(handle, 0)
                os.write(handle, json.dumps({"pid": os.getpid(), "since": f"{since} UTC"}).encode())
        yield
    finally:
        if handle is not None:
            (folder / FILE).unlink(missing_ok=True)  # Before the lock goes: nobody else can have taken it.
            os.close(handle)


def _open_locked(path: Path) -> int | None:
    """A handle on the locked file; None where there are no locks."""
    if sys.platform == "win32":
        return None
    import fcntl

    while True:
        with said(f"cannot write {path}"):
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(handle, 200, 0)
            os.close(handle)
            raise RunError(
                f"{path.parent} is in use {_who(holder)}: wait for it to end, or end it, then resume"
            ) from error
        except OSError as error:
            os.close(handle)
            log.warning("%s cannot be locked (%s): see that no other process works on it", path.parent, error.strerror)
            return None
        if _is_at(path, handle):
            return handle
        os.close(handle)  # The one before removed it as it ended.


def _is_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def _who(content: bytes) -> str:
    try:
        found = json.loads(content)
        pid, since = int(found["pid"]), str(found["since"])
    except (ValueError, KeyError, TypeError):  # It has the lock and has not written yet.
        return "by another process"
    return f"by this process since {since}" if pid == os.getpid() else f"by process {pid} since {since}"
