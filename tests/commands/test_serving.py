"""chat: an answer per line of standard input."""

import io
from pathlib import Path

import pytest

from kilofed.cli import main


def test_chat_answers_piped_lines_until_an_empty_one(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("add 1 and 2\nadd 3 and 3\n\nnever asked\n"))
    assert main(["chat", str(folder), "--max-new-tokens", "5"]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") >= 2
    assert ">" not in err
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["chat", str(folder)]) == 0
    assert capsys.readouterr().out == ""
