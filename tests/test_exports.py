"""The public names: few, sorted, lazy, and each what its home defines."""

import subprocess
import sys

import pytest

import kilofed


def test_public_names_are_these() -> None:
    assert kilofed.__all__ == sorted(kilofed.__all__)
    assert set(kilofed.__all__) == {
        "Client",
        "Cohort",
        "Engine",
        "KilofedError",
        "Ledger",
        "Mechanism",
        "Method",
        "Payload",
        "Recipe",
        "Run",
        "Server",
        "load",
        "on_client",
        "resume",
        "run",
    }
    assert set(dir(kilofed)) == set(kilofed.__all__)


@pytest.mark.parametrize("name", kilofed.__all__)
def test_a_public_name_is_the_thing_of_its_home(name: str) -> None:
    found = getattr(kilofed, name)
    assert found.__name__ == name
    assert getattr(sys.modules[found.__module__], name) is found


def test_every_public_name_is_documented() -> None:
    assert all(getattr(kilofed, name).__doc__ for name in kilofed.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'kilofed' has no attribute 'train_everything'"):
        _ = kilofed.train_everything  # type: ignore[attr-defined]


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_importing_kilofed_imports_nothing_heavy() -> None:
    code = "import sys, kilofed; print(sorted(m for m in sys.modules if m.partition('.')[0] in "
    assert run_python(code + "('torch', 'transformers', 'numpy', 'datasets', 'peft')))") == "[]"
