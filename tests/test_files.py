"""A file holds either all of what was written or what it held before."""

import errno
import io
import json
import os
import threading
from pathlib import Path

import pytest

from kilofed.errors import RunError
from kilofed.files import append_line, cut_to, replace_file, sha256_of


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def rows(path: Path) -> list[object]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_replace_file_writes_the_whole_content(tmp_path: Path) -> None:
    path = tmp_path / "state"
    replace_file(path, b"first")
    replace_file(path, b"second" * 10_000)
    assert path.read_bytes() == b"second" * 10_000
    assert os.listdir(tmp_path) == ["state"]


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    path = tmp_path / "state"
    replace_file(path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, where, no_space)
        with pytest.raises(RunError, match=r"cannot write .*state.* untouched \(No space left on device\): make room"):
            replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state"]


def test_a_disk_that_fills_up_in_the_middle_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state"
    replace_file(path, b"old")

    class Half(io.FileIO):
        def write(self, content: bytes) -> int:  # type: ignore[override]
            super().write(content[: len(content) // 2])
            no_space()
            return 0

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", lambda name, mode, opener: Half(name, mode, opener=opener))
        with pytest.raises(RunError, match="No space left"):
            replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state"]


def test_the_content_is_on_the_disk_before_the_name_points_at_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), rename(a, b)))
    replace_file(tmp_path / "state", b"new")
    assert done == ["fsync", "rename", "fsync"]


def test_a_folder_that_does_not_exist_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"cannot write .*No such file or directory"):
        replace_file(tmp_path / "absent" / "state", b"new")


def test_a_reader_sees_one_content_or_the_other(tmp_path: Path) -> None:
    path = tmp_path / "state"
    contents = {bytes([number]) * 50_000 for number in range(4)}
    replace_file(path, min(contents))
    seen: set[bytes] = set()
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(5):
        for content in contents:
            replace_file(path, content)
    stop.set()
    reader.join()
    assert seen <= contents


def test_append_line_adds_one_json_line(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    append_line(path, {"round": 0})
    append_line(path, {"round": 1, "text": "ä\n"})
    assert rows(path) == [{"round": 0}, {"round": 1, "text": "ä\n"}]


def test_an_appended_line_is_on_the_disk_when_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bytes] = []
    fsync = os.fsync

    def seen(handle: int) -> None:
        fsync(handle)
        synced.append((tmp_path / "lines").read_bytes())

    monkeypatch.setattr(os, "fsync", seen)
    append_line(tmp_path / "lines", {"round": 0})
    append_line(tmp_path / "lines", {"round": 1})
    assert synced == [b'{"round":0}\n', b'{"round":0}\n{"round":1}\n']


def test_what_is_cut_is_gone_from_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"first\nsecond\n")
    synced: list[bytes] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(path.read_bytes()))
    cut_to(path, 6)
    assert synced == [b"first\n"]
    assert path.read_bytes() == b"first\n"


@pytest.mark.skipif(os.name == "nt", reason="Windows knows no such modes")
def test_a_secret_is_never_open_to_others_not_for_an_instant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[int] = []
    fsync = os.fsync

    def seen(handle: int) -> None:
        modes.extend(path.stat().st_mode & 0o777 for path in tmp_path.iterdir())
        fsync(handle)

    monkeypatch.setattr(os, "fsync", seen)
    before = os.umask(0)
    try:
        replace_file(tmp_path / "key", b"secret", mode=0o600)
        replace_file(tmp_path / "open", b"text")
    finally:
        os.umask(before)
    assert modes[0] == 0o600
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "open").stat().st_mode & 0o777 == 0o666


def test_a_digest_is_that_of_the_bytes_and_a_missing_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(RunError, match=r"b cannot be read \(No such file or directory\)"):
        sha256_of(tmp_path / "b")


def test_all_of_the_content_is_written_before_it_is_forced_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bytes] = []
    fsync = os.fsync

    def seen(handle: int) -> None:
        fsync(handle)
        synced.extend(path.read_bytes() for path in tmp_path.glob("*.part"))

    monkeypatch.setattr(os, "fsync", seen)
    replace_file(tmp_path / "state", b"new")
    assert synced == [b"new"]


def test_a_file_that_may_not_be_made_is_refused_for_that_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", forbidden)
        with pytest.raises(RunError, match="Permission denied"):
            replace_file(tmp_path / "state", b"new")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are listed in /proc")
def test_no_file_stays_open(tmp_path: Path) -> None:
    def num_open() -> int:
        return len(os.listdir("/proc/self/fd"))

    replace_file(tmp_path / "state", b"first")
    before = num_open()
    for _ in range(3):
        replace_file(tmp_path / "state", b"next")
        append_line(tmp_path / "lines", {"round": 0})
    assert num_open() == before
