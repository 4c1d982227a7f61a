"""A tiny recipe as words of the command line, and the folder of a finished run."""

from collections.abc import Callable
from pathlib import Path

import pytest

from kilofed.cli import main
from kilofed.reports import report


@pytest.fixture(scope="session")
def words(tiny_model: Path, tiny_rows: Path) -> Callable[..., list[str]]:
    """`words("run", "rounds=1")`: a command on tiny things."""
    small = {
        "model": tiny_model,
        "data": tiny_rows,
        "data.max_length": 48,
        "data.holdout": 0.2,
        "rounds": 2,
        "adapter.rank": 2,
        "train.steps": 1,
        "train.lr": 0.05,
        "evaluate.generate": 0,
        "evaluate.baselines": '["base"]',
    }
    return lambda command, *more: [command, "tiny", *(f"{key}={value}" for key, value in small.items()), *more]


@pytest.fixture(scope="session")
def folder(words: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("cli") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write", lambda folder: folder / "report.html")
        assert main(words("run", "--out", str(out))) == 0
    return out


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "write", lambda folder: folder / "report.html")
