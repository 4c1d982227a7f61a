"""One warm process per client, each on an open gRPC stream that it dialled itself: an exchange costs a round trip.

Messages are bytes as they are; no generated code, nothing pickled but the opener's strings. A client shows a token of
its own. On loopback there is no TLS.
"""

import hmac
import importlib.util
import logging
import multiprocessing
import os
import queue
import secrets
import signal
import struct
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import wait

from kilofed.engines.opener import Opener, as_text, raise_again, safe_path
from kilofed.errors import RunError

if not importlib.util.find_spec("grpc"):
    raise RunError("engine stream needs gRPC: pip install 'kilofed[stream]'")

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # Read at import; it speaks of every connection that ends.

import grpc

log = logging.getLogger("kilofed")

SERVICE, WORK = "kilofed.Stream", "Work"
CLIENT, TOKEN = "kilofed-client", "kilofed-token"

READY, ASK, REPLY, FAILED, GONE = range(5)

HEAD = struct.Struct("<BQQ")
"""Kind, number of the exchange, length of the body; in front of each message, whose body follows in chunks."""

CHUNK = 2**20
"""Bytes of a body that travel in one gRPC message."""

PREFIX = 5
"""Bytes that gRPC puts before each of its messages; what HTTP/2 and TCP add is not counted."""

OPTIONS = (("grpc.max_receive_message_length", CHUNK + 1024), ("grpc.enable_http_proxy", 0))

SPARE = 4
"""Threads beyond one for each client, so that a stranger can be turned away."""

Arrived = tuple[int, "_Line", int, int, bytes]
"""(client, where it came from, kind, number of the exchange, body)."""


class Stream:
    """An engine with a process for each client that was ever asked.

    A client whose process dies takes only itself out of the exchange, and gets another process when it is asked again.
    An error that a handler raises is raised here, as if it ran in this process.

    Args:
        ids: numbers of the clients.
        opener: how a client's process builds its handler.
        timeout: seconds after which an exchange ends without those who have not answered.
    """

    def __init__(self, ids: Sequence[int], opener: Opener, *, timeout: float = 3600.0) -> None:
        self._ids, self._opener, self._timeout = sorted(ids), opener, timeout
        self._inbox: queue.SimpleQueue[Arrived] = queue.SimpleQueue()
        self._homes: dict[int, _Home] = {}
        self._number = self._framing = 0
        # One thread serves one stream for as long as it lasts.
        self._threads = ThreadPoolExecutor(len(self._ids) + SPARE, "kilofed-stream")
        self._server = grpc.server(self._threads, options=OPTIONS)
        work = grpc.stream_stream_rpc_method_handler(self._serve)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {WORK: work}),))
        self._address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def client_ids(self) -> list[int]:
        return list(self._ids)

    def exchange(self, asks: Mapping[int, bytes]) -> Iterator[tuple[int, bytes]]:
        self._number += 1
        deadline = time.monotonic() + self._timeout
        for client in sorted(asks):
            if client not in self._homes or not self._homes[client].alive:
                self._start(client)
        waiting = set(asks)
        replies: dict[int, bytes] = {}
        for client in waiting:
            if self._homes[client].line:
                self._ask(client, asks[client])
        try:
            for client in sorted(asks):
                while client in waiting and client not in replies and time.monotonic() < deadline:
                    self._take(waiting, replies, asks, deadline)
                if client in replies:
                    waiting.discard(client)
                    yield client, replies.pop(client)
        finally:
            for client in (waiting - replies.keys()) & self._homes.keys():
                log.warning("client %d was still at work; its process is replaced", client)
                self._homes.pop(client).end()

    def overhead(self) -> int:
        """Bytes so far that are no part of a message: its head and gRPC's own prefix."""
        return self._framing

    def close(self) -> None:
        """End all processes and the server."""
        for home in self._homes.values():
            home.end()
        self._homes.clear()
        self._server.stop(None).wait()
        self._threads.shutdown()

    def _start(self, client: int) -> None:
        if client in self._homes:
            self._homes[client].end()
        self._homes[client] = _Home(client, self._opener, self._address)

    def _ask(self, client: int, body: bytes) -> None:
        line = self._homes[client].line
        assert line is not None
        self._framing += line.send(ASK, self._number, body)

    def _take(self, waiting: set[int], replies: dict[int, bytes], asks: Mapping[int, bytes], deadline: float) -> None:
        """Take one thing in that a client did: get ready, answer, fail, or die."""
        try:
            client, line, kind, number, body = self._inbox.get(timeout=min(1.0, max(0.0, deadline - time.monotonic())))
        except queue.Empty:
            for client in [one for one in waiting if self._homes[one].line is None and not self._homes[one].alive]:
                self._died(client, waiting)  # It never dialled.
            return
        home = self._homes.get(client)
        if home is None or home.token != line.token:
            return  # Word of a process that was replaced.
        if kind == GONE:
            self._died(client, waiting)
            return
        self._framing += _framing(len(body))
        if kind == READY:
            home.line = line
            if client in waiting:
                self._ask(client, asks[client])
        elif kind == FAILED and home.line is None:
            self._homes.pop(client).end()
            raise_again(body.decode(), f"client {client} at its start")
        elif number == self._number and client in waiting:
            if kind == FAILED:
                waiting.discard(client)
                raise_again(body.decode(), f"client {client}")
            replies[client] = body

    def _died(self, client: int, waiting: set[int]) -> None:
        home = self._homes.pop(client)
        code, met = home.end(grace=5.0), home.line
        if met is None:
            raise RunError(
                f"the process of client {client} ended at its start with exit code {code}; its words are on stderr\n"
                "  hint: a script that uses engine stream keeps its work under `if __name__ == '__main__':`"
            )
        log.warning("the process of client %d died (exit code %s); it is left out of this exchange", client, code)
        waiting.discard(client)

    def _serve(self, frames: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """One client's stream, in a thread of the server."""
        said = dict(context.invocation_metadata())
        name, token = str(said.get(CLIENT, "")), str(said.get(TOKEN, ""))
        home = self._homes.get(int(name)) if name.isdecimal() else None
        if home is None or not hmac.compare_digest(home.token, token) or home.dialled.is_set():
            log.warning("a connection without the token of client %r is refused", name)
            context.abort(
                grpc.StatusCode.UNAUTHENTICATED, "not the token of this client, or its stream is open already"
            )
            return
        home.dialled.set()
        line = _Line(token)
        threading.Thread(target=self._listen, args=(home.client, line, frames), daemon=True).start()
        yield from iter(line.outbox.get, None)

    def _listen(self, client: int, line: "_Line", frames: Iterator[bytes]) -> None:
        with suppress(grpc.RpcError, RuntimeError, StopIteration):  # The stream broke, and that says it all.
            while True:
                self._inbox.put((client, line, *_receive(frames)))
        line.outbox.put(None)
        self._inbox.put((client, line, GONE, 0, b""))


class _Line:
    """The server's end of one open stream."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def send(self, kind: int, number: int, body: bytes) -> int:
        """Send a message; how many bytes of framing it costs."""
        for frame in _frames(kind, number, body):
            self.outbox.put(frame)
        return _framing(len(body))


class _Home:
    """One client's process, seen from outside."""

    def __init__(self, client: int, opener: Opener, address: str) -> None:
        self.client, self.token = client, secrets.token_hex(16)
        self.line: _Line | None = None
        """Open once the process is ready for messages."""
        self.dialled = threading.Event()
        """Set when its one stream was opened."""
        self._process = multiprocessing.get_context("spawn").Process(
            target=_live, args=(address, self.token, client, opener), name=f"kilofed-client-{client}", daemon=True
        )
        with safe_path():
            self._process.start()

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def end(self, grace: float = 0.0) -> int | None:
        """End the process, after `grace` seconds at most; its exit code. Its state is on the disk before it answers."""
        self._process.join(grace)
        if self.alive:
            self._process.kill()
        self._process.join()
        return self._process.exitcode


def _live(address: str, token: str, client: int, opener: Opener) -> None:
    """The life of a client's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to answer.
    os.dup2(2, 1)  # Only the server writes data to stdout.
    threading.Thread(target=_follow_parent, daemon=True).start()
    outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def answer(kind: int, number: int, body: bytes) -> None:
        for frame in _frames(kind, number, body):
            outbox.put(frame)

    with grpc.insecure_channel(address, OPTIONS) as channel:
        about = ((CLIENT, str(client)), (TOKEN, token))
        frames = channel.stream_stream(f"/{SERVICE}/{WORK}")(iter(outbox.get, None), metadata=about)
        try:
            handler = opener.open()
        except Exception as error:
            answer(FAILED, 0, as_text(error).encode())
            outbox.put(None)
            with suppress(grpc.RpcError):
                list(frames)
            return
        answer(READY, 0, b"")
        with suppress(grpc.RpcError, StopIteration):  # The server is gone.
            while True:
                _, number, body = _receive(frames)
                try:
                    reply = handler(client, body)
                except Exception as error:
                    answer(FAILED, number, as_text(error).encode())
                else:
                    answer(REPLY, number, reply)
        outbox.put(None)


def _follow_parent() -> None:
    # A process that outlived a killed run could write its state under the run that takes its place.
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _frames(kind: int, number: int, body: bytes) -> Iterator[bytes]:
    yield HEAD.pack(kind, number, len(body)) + body[:CHUNK]
    for start in range(CHUNK, len(body), CHUNK):
        yield body[start : start + CHUNK]


def _framing(length: int) -> int:
    return HEAD.size + PREFIX * max(1, -(-length // CHUNK))


def _receive(frames: Iterator[bytes]) -> tuple[int, int, bytes]:
    """The next message: (kind, number of the exchange, body). Raises StopIteration: the stream ended."""
    first = next(frames)
    kind, number, length = HEAD.unpack_from(first)
    parts, missing = [first[HEAD.size :]], length - (len(first) - HEAD.size)
    while missing:
        parts.append(next(frames))
        missing -= len(parts[-1])
    return kind, number, b"".join(parts)
