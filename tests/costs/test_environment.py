"""Where a run ran: versions as text and nothing that names a user; memory in bytes, in the order that must hold."""

import getpass
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from kilofed.costs import environment


def test_versions_are_those_of_the_packages_and_missing_ones_are_empty() -> None:
    found = environment.describe("cpu")
    assert found["torch"] == metadata.version("torch")
    assert found["python"] == platform.python_version()
    assert found["device"] == "cpu"
    assert set(environment.PACKAGES) <= found.keys()
    assert all(isinstance(value, str) for value in found.values())
    assert environment._version("no-such-package-anywhere") == ""


def test_nothing_names_the_host_or_the_user() -> None:
    text = " ".join(environment.describe("cpu").values())
    assert platform.node() not in text or not platform.node()
    assert str(Path.home()) not in text
    assert f"/{getpass.getuser()}" not in text


def test_the_commit_is_that_of_the_sources_and_not_of_the_folder_one_stands_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = environment.describe("cpu")["git"]
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "--quiet", "."], check=True)
    assert environment.describe("cpu")["git"].rstrip("+") == here.rstrip("+")
    assert len(here.rstrip("+")) in (0, 40)


def test_the_peak_grows_with_what_is_held_and_never_shrinks_by_itself() -> None:
    before = environment.own_peak_memory()
    held = torch.ones(environment.own_peak_memory() // 4 + 50_000_000)  # More floats than the peak has bytes.
    grown = environment.own_peak_memory()
    size = held.nbytes
    del held
    assert grown >= before
    assert grown >= size
    assert environment.own_peak_memory() > 0.99 * grown  # Linux counts pages in batches.
    assert environment.peak_memory() >= size


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems keep the peak")
def test_a_forgotten_peak_begins_anew() -> None:
    held = torch.ones(100_000_000)
    size = held.nbytes
    high = environment.own_peak_memory()
    del held
    assert environment.reset_peak_memory()
    assert environment.own_peak_memory() < high - size // 2


def test_free_memory_is_less_than_all_of_it() -> None:
    all_of_it = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < environment.free_memory(torch.device("cpu")) <= all_of_it
