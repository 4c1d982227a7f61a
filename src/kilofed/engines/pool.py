"""Worker processes that answer side by side: each builds its handler once and answers one message at a time.

A client always goes to the same worker. Messages cross pipes as they are; nothing is pickled but the opener's strings.
"""

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait

from kilofed.engines.opener import Opener, as_text, raise_again, safe_path
from kilofed.errors import RunError

log = logging.getLogger("kilofed")

READY, REPLY, FAILED = b"ready", b"reply", b"failed"

AHEAD = 16
"""Clients per worker that may be answered before their turn; bounds the replies held."""


class Pool:
    """An engine of worker processes.

    A worker that dies takes only the client in its hands out of the exchange, and another takes its place. An error
    that a handler raises is raised here, as if it ran in this process.

    Args:
        ids: numbers of the clients.
        opener: how a worker builds its handler.
        workers: number of processes, from 1.
        timeout: seconds after which an exchange ends without those who have not answered.
    """

    def __init__(self, ids: Sequence[int], opener: Opener, *, workers: int = 2, timeout: float = 3600.0) -> None:
        self._ids, self._timeout = sorted(ids), timeout
        self._workers = [_Worker(number, opener) for number in range(max(1, min(workers, len(self._ids))))]

    def client_ids(self) -> list[int]:
        return list(self._ids)

    def exchange(self, asks: Mapping[int, bytes]) -> Iterator[tuple[int, bytes]]:
        order = sorted(asks)
        deadline = time.monotonic() + self._timeout
        queues = [deque(c for c in order if c % len(self._workers) == w.number) for w in self._workers]
        replies: dict[int, bytes | None] = {}
        self._let_go()
        try:
            for place, client in enumerate(order):
                near = order[min(place + AHEAD * len(self._workers), len(order) - 1)]
                while True:
                    for worker, queue in zip(self._workers, queues, strict=True):
                        if queue and queue[0] <= near and worker.idle:
                            sent = queue.popleft()
                            replies.update(worker.send(sent, asks[sent]))
                    if client in replies or time.monotonic() >= deadline:
                        break
                    replies.update(self._receive(deadline - time.monotonic()))
                reply = replies.pop(client, None)
                if reply is not None:
                    yield client, reply
        finally:
            self._let_go()

    def overhead(self) -> int:
        """Not known: pipes do not say."""
        return 0

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            worker.end()

    def _receive(self, timeout: float) -> dict[int, bytes | None]:
        """What arrives within `timeout` seconds; None for a client whose worker died."""
        busy = [worker for worker in self._workers if not worker.idle]
        ready = wait([worker.connection for worker in busy], max(0.0, timeout))
        found: dict[int, bytes | None] = {}
        for worker in busy:
            if worker.connection in ready:
                found.update(worker.receive())
        return found

    def _let_go(self) -> None:
        """Replace workers that are still at work for an exchange that is over."""
        for worker in self._workers:
            if worker.client is not None:
                log.warning("worker %d was still busy with client %d; it is replaced", worker.number, worker.client)
                worker.restart()


class _Worker:
    """One process, seen from outside."""

    def __init__(self, number: int, opener: Opener) -> None:
        self.number, self._opener = number, opener
        self.client: int | None = None
        """Whose message it has in hand."""
        self._start()

    @property
    def idle(self) -> bool:
        """Ready for a message. A process that died at rest is replaced."""
        if self._ready and self.client is None and not self._process.is_alive():
            self._died()
        return self._ready and self.client is None

    def send(self, client: int, body: bytes) -> dict[int, bytes | None]:
        """Hand over a message; {client: None} if the worker died of it, else nothing."""
        self.client = client
        try:
            self.connection.send_bytes(client.to_bytes(8, "little", signed=True))
            self.connection.send_bytes(body)
        except OSError:
            return self._died()
        return {}

    def receive(self) -> dict[int, bytes | None]:
        """{client: reply}, or {client: None} if the worker died, or nothing when it got ready.

        Raises:
            KilofedError: one that the handler raised. RuntimeError: any other, with its traceback.
        """
        client = self.client
        try:
            status, body = self.connection.recv_bytes(), self.connection.recv_bytes()
        except (OSError, EOFError):
            return self._died()
        self.client = None
        if status == READY:
            self._ready = True
            return {}
        if status == REPLY:
            assert client is not None
            return {client: body}
        if not self._ready:
            self.end()
        at = "its start" if client is None else f"client {client}"
        raise_again(body.decode(), f"worker {self.number} at {at}")

    def restart(self) -> None:
        """End the process, whatever it is doing, and start another."""
        self.end()
        self._start()

    def end(self) -> None:
        """End the process and close its pipe."""
        self.connection.close()
        if self._process.is_alive():
            self._process.kill()
        self._process.join()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.client, self._ready = None, False
        self._process = context.Process(
            target=_serve, args=(theirs, self._opener), name=f"kilofed-worker-{self.number}", daemon=True
        )
        with safe_path():
            self._process.start()
        theirs.close()

    def _died(self) -> dict[int, bytes | None]:
        self._process.join(5)
        code, client = self._process.exitcode, self.client
        if not self._ready:
            self.end()
            raise RunError(
                f"worker {self.number} ended at its start with exit code {code}; its words are on stderr\n"
                "  hint: a script that uses engine pool keeps its work under `if __name__ == '__main__':`"
            )
        log.warning("worker %d died (exit code %s), client %s in its hands; another starts", self.number, code, client)
        self.restart()
        return {} if client is None else {client: None}


def _serve(connection: Connection, opener: Opener) -> None:
    """The life of a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer.
    os.dup2(2, 1)  # Only the parent writes data to stdout.
    threading.Thread(target=_follow_parent, daemon=True).start()
    with suppress(EOFError, OSError):  # The parent is gone.
        try:
            handler = opener.open()
        except Exception as error:
            _answer(connection, FAILED, as_text(error).encode())
            return
        _answer(connection, READY, b"")
        while True:
            client, body = int.from_bytes(connection.recv_bytes(), "little", signed=True), connection.recv_bytes()
            try:
                reply = handler(client, body)
            except Exception as error:
                _answer(connection, FAILED, as_text(error).encode())
            else:
                _answer(connection, REPLY, reply)


def _follow_parent() -> None:
    # A worker that outlived a killed run could write a client's state under the run that takes its place.
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _answer(connection: Connection, status: bytes, body: bytes) -> None:
    connection.send_bytes(status)
    connection.send_bytes(body)
