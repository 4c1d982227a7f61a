"""The notebook runs from its first cell to its last, and is kept without outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples" / "first_run.ipynb"


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_notebook_is_kept_without_outputs(notebook: nbformat.NotebookNode) -> None:
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(cells) > 3
    assert not any(cell.outputs or cell.execution_count for cell in cells)


@pytest.mark.slow
def test_the_notebook_runs(notebook: nbformat.NotebookNode, tmp_path: Path) -> None:
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    shown = [cell.outputs[-1].data["text/plain"] for cell in notebook.cells if cell.get("outputs")]
    assert len(shown) == 5
    assert all(name in shown[0] for name in ("base", "local", "federated", "central"))
    assert "report.html" in shown[1]
    assert all(name in shown[3] for name in ("fedavg", "fedprox", "fedavgm"))
    assert "4,096 tokens" in shown[4]
