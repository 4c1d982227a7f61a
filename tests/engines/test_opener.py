"""A handler is built from text alone, and an error crosses a process border as what it was."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kilofed import errors
from kilofed.engines.inprocess import Handler
from kilofed.engines.opener import Opener, as_text, raise_again, safe_path

NOT_A_FUNCTION = 3


def open_echo(prefix: str, suffix: str) -> Handler:
    """What `Opener` finds by the path of this module."""
    return lambda client, body: prefix.encode() + body + f"{suffix}{client}".encode()


def test_a_handler_is_opened_by_its_path_with_its_arguments() -> None:
    opener = pickle.loads(pickle.dumps(Opener(f"{__name__}:open_echo", ("<", ">"))))
    assert opener.open()(12, b"body") == b"<body>12"


def test_threads_are_set_where_they_are_stated() -> None:
    before = torch.get_num_threads()
    try:
        Opener(f"{__name__}:open_echo", ("", ""), threads=3).open()
        assert torch.get_num_threads() == 3
        Opener(f"{__name__}:open_echo", ("", "")).open()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("path", [f"{__name__}:nothing", f"{__name__}:NOT_A_FUNCTION", __name__])
def test_a_path_to_no_function_is_refused(path: str) -> None:
    with pytest.raises(errors.RecipeError, match="names no function; expected module:function"):
        Opener(path).open()


@pytest.mark.parametrize("kind", [errors.DataError, errors.NonFiniteLoss, errors.BudgetSpent])
def test_an_error_of_kilofed_stays_what_it_is(kind: type[errors.KilofedError]) -> None:
    with pytest.raises(kind, match=r"^client 3: a row: with colons$") as caught:
        raise_again(as_text(kind("client 3: a row: with colons")), "worker 1")
    assert type(caught.value) is kind


def test_any_other_error_comes_with_its_traceback_and_place() -> None:
    try:
        open_echo(*("too", "many", "words"))  # type: ignore[call-arg]
    except TypeError as error:
        text = as_text(error)
    with pytest.raises(RuntimeError, match="worker 1 failed:\n") as caught:
        raise_again(text, "worker 1")
    assert "test_opener.py" in str(caught.value)
    assert "TypeError: open_echo() takes 2 positional arguments but 3 were given" in str(caught.value)


def test_a_process_started_within_a_safe_path_takes_no_file_of_the_current_folder_for_a_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('hostile')\n", "utf-8")
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    command = [sys.executable, "-c", "import json; json.dumps(1)"]
    assert subprocess.run(command, cwd=tmp_path, check=False, capture_output=True).stderr.startswith(b"hostile")
    with safe_path():
        subprocess.run(command, cwd=tmp_path, check=True)
    assert "PYTHONSAFEPATH" not in os.environ
    monkeypatch.setenv("PYTHONSAFEPATH", "yes")
    with safe_path():
        assert os.environ["PYTHONSAFEPATH"] == "1"
    assert os.environ["PYTHONSAFEPATH"] == "yes"
