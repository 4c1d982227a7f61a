"""A hub that cannot be reached is asked once, briefly."""

import socket
from collections.abc import Iterator

import datasets
import pytest
from huggingface_hub import constants

from kilofed import hub


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that has not asked; what is set is set back."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "getproxies", dict)
    hub.settle.cache_clear()
    yield
    hub.settle.cache_clear()


def test_an_unreachable_hub_puts_its_libraries_in_offline_mode_after_one_try(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def refuse(address: tuple[str, int], timeout: float) -> None:
        tried.append(address)
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    hub.settle()
    hub.settle()
    assert tried == [("huggingface.co", 443)]
    assert constants.HF_HUB_OFFLINE
    assert datasets.config.HF_HUB_OFFLINE


def test_a_hub_that_answers_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        hub.settle()
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("reason", ["offline", "proxy"])
def test_nobody_is_asked_if_the_user_is_offline_or_has_a_proxy(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", reason == "offline")
    monkeypatch.setattr(hub, "getproxies", lambda: {"https": "http://proxy"} if reason == "proxy" else {})
    hub.settle()
    assert (reason == "offline") == constants.HF_HUB_OFFLINE
