"""The script that counts the layout: right on a tree small enough to count by hand; and what the real tree may not have."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
FILES = {
    "src/kilofed/__init__.py": '"""Root."""\n',
    "src/kilofed/units.py": '"""Doc."""\n\nONE = 1\n',
    "src/kilofed/maths/__init__.py": "",
    "src/kilofed/maths/sums.py": "from kilofed.units import ONE\n\n\ndef add() -> int:\n    # Why.\n    return ONE\n",
    "src/kilofed/maths/means.py": (
        "from typing import TYPE_CHECKING\n\nfrom kilofed.maths import sums\n\n"
        "if TYPE_CHECKING:\n    from kilofed.runs.loop import go\n\n\n"
        "@staticmethod\ndef mean() -> int:\n    from kilofed import units\n\n    return sums.add() + units.ONE\n"
    ),
    "src/kilofed/runs/__init__.py": "",
    "src/kilofed/runs/loop.py": "import kilofed.maths.means\n\n\ndef go() -> None: ...\n",
    "tests/test_one.py": "def test_one() -> None:\n    assert True\n",
}


@pytest.fixture(scope="module")
def architecture() -> ModuleType:
    spec = importlib.util.spec_from_file_location("architecture", ROOT / "benchmarks" / "architecture.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_small_tree_is_counted_as_by_hand(architecture: ModuleType, tmp_path: Path) -> None:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, "utf-8")
    found = architecture.measure(tmp_path)
    assert found["packages and files of the root"] == 4  # The root's own, units, maths, runs.
    assert found["modules"] == 7
    assert found["most modules in one folder"] == 2
    # sums -> units; means -> sums, units; loop -> means.
    assert found["arrows between modules"] == 4
    assert found["arrows between packages"] == 2
    assert found["floors of modules"] == 4
    assert found["floors of packages"] == 3
    assert found["circles of modules"] == found["circles of packages"] == []
    assert found["circles of modules, imports for types counted"] == ["maths.means-runs.loop"]
    assert found["largest function, lines"] == 5
    assert found["median function, lines"] == 3
    assert found["code lines"] == 1 + 3 + 8 + 2
    assert found["test code lines"] == 2
    assert found["test lines per code line"] == 0.14


def test_the_sources_hold_the_limits(architecture: ModuleType) -> None:
    found = architecture.measure(ROOT)
    assert found["circles of modules"] == found["circles of packages"] == []
    assert not found["functions over 60 lines"]
    assert found["test lines per code line"] >= 0.8
