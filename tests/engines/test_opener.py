"""A handler is built from text alone, and an error crosses a process border as what it was."""

import pickle

import pytest
import torch

from kilofed import errors
from kilofed.engines.inprocess import Handler
from kilofed.engines.opener import Opener, as_text, raise_again

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
