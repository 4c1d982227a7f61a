"""Progress on stderr: a line per round without a terminal, a bar on one."""

import io
from pathlib import Path

import pytest

from kilofed.commands.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_each_round_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as watch:
        watch.begin(Path("runs/tiny-1"))
        watch.stage("loading the model")
        watch.round(2, 3, {"train_loss": 1.25, "loss": None, "accuracy": 0.5, "seconds": 2.04})
    assert capsys.readouterr().err == (
        "run folder: runs/tiny-1\nloading the model\nround 2/3  training loss 1.2500  accuracy 0.5000  2.0 s\n"
    )


def test_on_a_terminal_rounds_move_one_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    with Progress() as watch:
        watch.round(2, 3, {"train_loss": 1.25, "seconds": 2.0})
        watch.round(3, 3, {"train_loss": 1.0, "seconds": 2.0})
        watch.stage("scoring")
    last = screen.getvalue().rpartition("\r")[2]
    assert "scoring" in last
    assert "3/3" in last
    assert "training loss 1.0000" in last


def test_the_hint_names_the_folder_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Progress, "folder", None)
    assert Progress.hint() == ""
    Progress().begin(Path("runs/tiny-7"))
    assert Progress.hint() == " Finished rounds are saved: kilofed resume runs/tiny-7"
