"""Authentication: tokens, where they come from, and which addresses are this machine's."""

from pathlib import Path

import pytest

from kilofed.errors import ServeError
from kilofed.serving.auth import Auth, find_token
from kilofed.serving.validation import Refusal

TOKEN = "a-token-for-tests"


def test_the_token_opens_every_path_and_others_open_the_open_ones() -> None:
    auth = Auth(TOKEN)
    auth.check("/v1/completions", {"authorization": f"Bearer {TOKEN}"})
    auth.check("/v1/completions", {"authorization": f"bearer  {TOKEN} "})
    for path in ("/", "/health"):
        auth.check(path, {})
    for path in ("/v1/models", "/metrics", "/v1/completions", "//", "/health/"):
        for header in (
            "",
            TOKEN,
            f"Basic {TOKEN}",
            "Bearer",
            "Bearer \xff\xfe",
            f"Bearer {TOKEN}x",
            "Bearer " + "x" * 9999,
        ):
            with pytest.raises(Refusal) as caught:
                auth.check(path, {"authorization": header})
            assert caught.value.status == 401


def test_a_token_comes_from_the_file_else_the_environment_else_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("the-token-of-the-file\nanother line\n")
    monkeypatch.setenv("KILOFED_TOKEN", "the-token-of-the-environment")
    assert find_token(tmp_path / "token") == ("the-token-of-the-file", False)
    assert find_token(None) == ("the-token-of-the-environment", False)
    monkeypatch.delenv("KILOFED_TOKEN")
    drawn, is_new = find_token(None)
    assert is_new
    assert len(drawn) > 40
    assert find_token(None)[0] != drawn


@pytest.mark.parametrize("content", ["", "short", "sixteen letters and spaces", "ein-schönes-längeres-token"])
def test_a_token_that_is_weak_or_unsendable_is_refused_and_not_shown(tmp_path: Path, content: str) -> None:
    (tmp_path / "token").write_text(content, "utf-8")
    with pytest.raises(ServeError, match="expected at least 16") as caught:
        find_token(tmp_path / "token")
    assert not content or content not in str(caught.value)


def test_a_token_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff" * 40)
    for path in (tmp_path / "none", tmp_path, tmp_path / "binary"):
        with pytest.raises(ServeError, match="cannot be read from"):
            find_token(path)
