import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def plain() -> ModuleType:
    """HSP-1 written a second time, with numpy only."""
    path = Path(__file__).parents[3] / "benchmarks" / "zeroth" / "plain_hsp1.py"
    spec = importlib.util.spec_from_file_location("plain_hsp1", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
