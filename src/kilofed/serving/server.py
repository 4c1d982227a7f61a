"""Serve a model over HTTP: bind, say where, answer until stopped."""

import asyncio
import contextlib
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
import uvicorn

from kilofed.errors import ServeError
from kilofed.hosts import is_loopback
from kilofed.serving.app import make_app
from kilofed.serving.auth import Auth, find_token
from kilofed.serving.model import ServedModel, open_served_model
from kilofed.serving.requests import Limits
from kilofed.serving.scheduler import Scheduler
from kilofed.serving.service import Service

GRACE = 10
"""Seconds that answers may still take once the server is stopped."""
MOST_CONNECTIONS = 1024
LONGEST_HEADERS = 64 * 1024
"""Bytes of a request before its body."""


@dataclass(frozen=True)
class ServerConfig:
    """Where a server listens, and whether it asks for a token."""

    host: str = "127.0.0.1"
    """Address to bind; only this machine reaches the default."""
    port: int = 8000
    """0 takes a free one."""
    token_file: Path | None = None
    """File whose first line is the token; else KILOFED_TOKEN, else a new one that is printed once."""
    needs_token: bool = True
    """False accepts every program of this machine; only on a loopback address."""


def serve(served: ServedModel, config: ServerConfig, limits: Limits, *, to: TextIO | None = None) -> None:
    """Serve until SIGINT or SIGTERM; the address goes to `to` (by default stdout), all else to stderr.

    Raises:
        ServeError: the address is taken or not this machine's, the token is not usable, or there must be one.
    """
    _check(limits)
    if not config.needs_token and not is_loopback(config.host):
        raise ServeError(f"{config.host} is open to other machines, so that a token is needed: leave out --no-token")
    token, is_new = find_token(config.token_file) if config.needs_token else (None, False)
    with listening(config) as listener, Scheduler(limits.max_active, limits.max_waiting) as scheduler:
        print(f"serving {served.name}: {served.prompt_note}", file=sys.stderr)
        if is_new:
            print(f"token: {token}", file=sys.stderr)
        if not config.needs_token:
            print("no token: every program of this machine can use this server", file=sys.stderr)
        print(f"{url_of(listener)}/v1", file=to or sys.stdout, flush=True)
        HttpServer(served, scheduler, Auth(token), limits).run(sockets=[listener])


@contextlib.contextmanager
def running(served: ServedModel, *, token: str | None = None, limits: Limits | None = None) -> Iterator[str]:
    """Serve on a free port of this machine in a thread, for as long as the block runs; gives the URL without /v1.

    Args:
        token: None asks for none.
    """
    limits = limits or Limits()
    with listening(ServerConfig(port=0)) as listener, Scheduler(limits.max_active, limits.max_waiting) as scheduler:
        server = HttpServer(served, scheduler, Auth(token), limits)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="serve")
        thread.start()
        try:
            yield url_of(listener)
        finally:
            server.should_exit = True
            thread.join()


def open_model(path: str, *, name: str = "", template: str = "", device: str = "", threads: int = 0) -> ServedModel:
    """As `serving.model.open_served_model`, with at most `threads` threads for torch (0 leaves torch's own choice)."""
    if threads:
        torch.set_num_threads(threads)
    return open_served_model(path, name=name, template=template, device=device)


@contextlib.contextmanager
def listening(config: ServerConfig) -> Iterator[socket.socket]:
    """A bound socket, for as long as the block runs. Raises ServeError."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((config.host, config.port))
            listener.listen(128)
        except (OSError, OverflowError) as error:
            raise ServeError(
                f"cannot listen on {config.host} port {config.port} ({error}): choose another --port or --host"
            ) from error
        yield listener
    finally:
        listener.close()


def url_of(listener: socket.socket) -> str:
    """Where a bound socket is reached, such as http://127.0.0.1:8000."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class HttpServer(uvicorn.Server):
    """A uvicorn server that logs no request and, when stopped, ends what is under way with an error."""

    def __init__(self, served: ServedModel, scheduler: Scheduler, auth: Auth, limits: Limits) -> None:
        settings = uvicorn.Config(
            make_app(Service(served, scheduler, limits), auth),
            access_log=False,
            log_config=None,
            log_level="warning",
            lifespan="off",
            ws="none",
            proxy_headers=False,
            server_header=False,
            limit_concurrency=MOST_CONNECTIONS,
            # The other parser that uvicorn knows keeps headers of any length, also of those who have no token.
            http="h11",
            h11_max_incomplete_event_size=LONGEST_HEADERS,
            # Reached only where a client does not read its last event.
            timeout_graceful_shutdown=GRACE + 5,
        )
        super().__init__(settings)
        self._scheduler = scheduler

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let answers come to their end for GRACE seconds, then end them with an error."""
        closing = asyncio.create_task(self._close_scheduler())
        await super().shutdown(sockets)
        closing.cancel()

    async def _close_scheduler(self) -> None:
        await asyncio.sleep(GRACE)
        await asyncio.to_thread(self._scheduler.close)


def _check(limits: Limits) -> None:
    """Raise ServeError for limits under which nobody is ever answered."""
    least: dict[str, tuple[float, float]] = {
        "--max-active": (limits.max_active, 1),
        "--max-waiting": (limits.max_waiting, 0),
        "--max-body": (limits.max_body, 1),
        "--max-choices": (limits.max_choices, 1),
        "--max-logprobs": (limits.max_logprobs, 0),
        "--timeout": (limits.timeout, 0.001),
    }
    for name, (value, lowest) in least.items():
        if not value >= lowest:
            raise ServeError(f"{name} is {value:g}; expected at least {lowest:g}")
