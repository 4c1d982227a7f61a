"""A file holds either all of what was written or what it held before."""

import errno
import io
import json
import os
import threading
from pathlib import Path

import pytest

from kilofed.errors import RunError
from kilofed.files import append_line, cut_after, replace_file


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
        patch.setattr(Path, "open", lambda self, mode: Half(self, mode))
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


def test_cut_after_drops_later_rounds(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    for number in (0, 1, 1, 2, 3):
        append_line(path, {"round": number})
    cut_after(path, 1)
    assert rows(path) == [{"round": 0}, {"round": 1}, {"round": 1}]


@pytest.mark.parametrize("kept", range(1, len('{"round":1}\n')))
def test_cut_after_drops_a_line_cut_anywhere(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "lines"
    append_line(path, {"round": 0})
    with path.open("a", encoding="utf-8") as file:
        file.write('{"round":1}\n'[:kept])
    cut_after(path, 1)
    append_line(path, {"round": 1, "again": True})
    assert rows(path) == [{"round": 0}, {"round": 1, "again": True}]


def test_cut_after_drops_a_character_cut_in_half(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    append_line(path, {"round": 0})
    with path.open("ab") as file:
        file.write('{"round":1,"text":"ä'.encode()[:-1])
    cut_after(path, 1)
    assert rows(path) == [{"round": 0}]


def test_cut_after_of_no_file_makes_none(tmp_path: Path) -> None:
    cut_after(tmp_path / "lines", 1)
    assert not (tmp_path / "lines").exists()
