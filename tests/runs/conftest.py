"""A file of rows, and a copy of the tiny model that a test may damage."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.findings import Row


@pytest.fixture
def rows(tmp_path: Path) -> Callable[[list[Row]], str]:
    """Writes rows and gives the file's path."""

    def write(content: list[Row], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in content), "utf-8")
        return str(path)

    return write


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be spoilt."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))
