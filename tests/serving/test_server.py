"""The command `kilofed serve`: where it listens, what it prints, how it stops."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from kilofed.cli import main
from kilofed.errors import ServeError
from kilofed.serving import server
from kilofed.serving.server import ServerConfig


def started(words: list[str], **environment: str) -> tuple[subprocess.Popen[str], str]:
    """The command in a process of its own, and the address that it printed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "kilofed", "serve", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        # Where tests run in the background of a shell, SIGINT would be ignored from the start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def ended(process: subprocess.Popen[str], number: signal.Signals) -> str:
    """What it said on stderr, once it was told to stop."""
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert "Traceback" not in err
    return err


@pytest.mark.slow
def test_the_command_prints_its_address_and_its_token_once_and_stops_cleanly(tiny_model: Path) -> None:
    process, url = started([str(tiny_model), "--port", "0", "--name", "tiny", "--threads", "1"])
    assert url.startswith("http://127.0.0.1:")
    assert url.endswith("/v1")
    assert httpx.get(f"{url}/models").status_code == 401
    err = ended(process, signal.SIGINT)
    assert process.returncode == 130
    (line,) = [line for line in err.splitlines() if line.startswith("token: ")]
    assert err.count(line.removeprefix("token: ")) == 1
    assert "serving tiny: the last user message is put into the template" in err


@pytest.mark.slow
def test_a_given_token_is_used_and_not_printed(tiny_model: Path) -> None:
    token = "a-token-of-the-environment"
    process, url = started([str(tiny_model), "--port", "0", "--name", "tiny"], KILOFED_TOKEN=token)
    reply = httpx.get(f"{url}/models", headers={"authorization": f"Bearer {token}"})
    assert [model["id"] for model in reply.json()["data"]] == ["tiny"]
    with httpx.stream(
        "POST",
        f"{url}/completions",
        json={"model": "tiny", "prompt": "a secret", "max_tokens": 100, "stream": True},
        headers={"authorization": f"Bearer {token}"},
    ) as stream:
        assert stream.status_code == 200
        assert next(stream.iter_bytes())
    err = ended(process, signal.SIGTERM)
    assert token not in err
    assert "secret" not in err
    assert process.returncode == -signal.SIGTERM


def test_an_address_that_is_taken_is_refused(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(tiny_model), "--port", str(port)]) == 1
    assert f"ServeError: cannot listen on 127.0.0.1 port {port}" in capsys.readouterr().err


@pytest.mark.parametrize(("host", "port"), [("256.1.1.1", 0), ("127.0.0.1", 70_000), ("127.0.0.1", -1), ("", 1 << 40)])
def test_an_address_that_is_none_is_refused(host: str, port: int) -> None:
    with pytest.raises(ServeError, match="cannot listen on"):
        with server.listening(ServerConfig(host, port)):
            pass


def test_without_a_token_other_machines_are_not_let_in(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(tiny_model), "--host", "0.0.0.0", "--no-token"]) == 1
    assert "ServeError: 0.0.0.0 is open to other machines, so that a token is needed" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--max-active", "0"], ["--max-waiting", "-1"], ["--timeout", "0"]])
def test_limits_that_let_nobody_in_are_refused(
    tiny_model: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(tiny_model), *words]) == 1
    assert f"ServeError: {words[0]} is {words[1]}" in capsys.readouterr().err


def test_it_serves_on_the_second_loopback_too(tiny_model: Path) -> None:
    try:
        with server.listening(ServerConfig("::1", 0)) as listener:
            assert server.url_of(listener).startswith("http://[::1]:")
    except ServeError:
        pytest.skip("this machine has no IPv6")


def test_headers_without_end_are_cut_off_before_any_token_is_asked_for(server) -> None:
    host, _, port = server.url.removeprefix("http://").partition(":")
    for request in (b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 2**20, b"GET /" + b"a" * 2**20):
        with socket.create_connection((host, int(port)), timeout=10) as client:
            try:
                client.sendall(request)
                answer = client.recv(1000)
            except (BrokenPipeError, ConnectionResetError):
                continue  # Cut off before all of it was taken.
            assert answer.startswith(b"HTTP/1.1 400")
    assert server.http.get("/health").status_code == 200
