"""Tests and benchmarks mirror the sources: a module's tests and the scripts on its package are found by its path."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src" / "kilofed"

OF_THE_WHOLE = {
    "test_architecture.py",
    "test_assets.py",
    "test_bad_input.py",
    "test_docs.py",
    "test_exports.py",
    "test_fuzz.py",
    "test_killed.py",
    "test_layers.py",
    "test_mirror.py",
    "test_mentions.py",
    "test_notebook.py",
    "test_over_http.py",
    "test_package.py",
    "test_pretrain_pair.py",
    "test_recipes.py",
    "test_site.py",
    "engines/test_all.py",
    "methods/test_all.py",
    "methods/test_classify.py",
}
"""Tests of more than one module."""

PACKAGES_WITH_CODE = {"data/sources": "data/sources/test_sources.py"}
"""A package's `__init__.py` that is more than a docstring and is tested in a file of its own."""


def expected() -> set[str]:
    """The test file of each module: `tests/<package>/test_<module>.py`."""
    modules = (path.relative_to(SOURCES) for path in SOURCES.rglob("*.py"))
    return {
        str(module.with_name(f"test_{module.name}"))
        for module in modules
        if module.name not in {"__init__.py", "__main__.py"}
    }


def found() -> set[str]:
    return {str(path.relative_to(ROOT / "tests")) for path in (ROOT / "tests").rglob("test_*.py")}


def test_every_module_has_its_test_file() -> None:
    assert expected() <= found()


def test_every_test_file_has_its_module_or_is_of_the_whole() -> None:
    assert found() - expected() == OF_THE_WHOLE | set(PACKAGES_WITH_CODE.values())


@pytest.mark.parametrize("package", PACKAGES_WITH_CODE)
def test_a_package_that_is_tested_by_itself_has_code(package: str) -> None:
    assert len((SOURCES / package / "__init__.py").read_text("utf-8").splitlines()) > 10


def test_benchmarks_lie_in_folders_named_like_packages() -> None:
    packages = {path.parent.name for path in SOURCES.glob("*/__init__.py")}
    folders = {path.parent.relative_to(ROOT / "benchmarks").parts for path in (ROOT / "benchmarks").rglob("*.py")}
    assert {parts[0] for parts in folders if parts} <= packages | {"gpu", "robustness"}
    assert {path.name for path in (ROOT / "benchmarks").glob("*.py")} == {
        "architecture.py",
        "method_bytes.py",
        "start_up.py",
    }
