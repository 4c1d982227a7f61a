"""Round-robin scheduling: one thread takes a step of each active request in turns; the others wait in a bounded queue.

A request is an iterator. Nothing of it is computed together with another's, so an answer has the bits that it has when
it is alone.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

log = logging.getLogger("kilofed")

Item = TypeVar("Item")


@dataclass(frozen=True)
class Done:
    """The request's iterator has ended."""


@dataclass(frozen=True)
class Failed:
    """The request's iterator raised."""

    error: Exception


class QueueFull(Exception):
    """The queue is as long as it may get."""


class Job(Generic[Item]):
    """One request at the scheduler."""

    def __init__(self, work: Iterator[Item], emit: Callable[[Item | Done | Failed], None]) -> None:
        self._work, self._emit = work, emit
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """End it after the step that is being computed; nothing more is emitted."""
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        """Whether it was cancelled."""
        return self._cancelled.is_set()

    def step(self) -> bool:
        """Compute and emit one item; False if there is nothing more to do. Called by the scheduler's thread only."""
        if self._cancelled.is_set():
            self._close()
            return False
        try:
            item = next(self._work)
        except StopIteration:
            self._send(Done())
            return False
        # Whatever a model raises ends its own request, not the thread that serves all.
        except Exception as error:
            self._send(Failed(error))
            return False
        return self._send(item) or self._close()

    def stop(self, error: Exception) -> None:
        """End it with an error. Called by the scheduler's thread only."""
        self._send(Failed(error))
        self._close()

    def _send(self, item: Item | Done | Failed) -> bool:
        """Emit it, unless cancelled; whether the listener still listens."""
        if not self._cancelled.is_set():
            try:
                self._emit(item)
            except RuntimeError:  # The listener's event loop is closed.
                self._cancelled.set()
        return not self._cancelled.is_set()

    def _close(self) -> bool:
        close = getattr(self._work, "close", None)
        if close is not None:
            try:
                close()
            except Exception as error:
                log.error("a request could not be closed (%s: %s)", type(error).__name__, error)
        return False


class Scheduler:
    """A decoding thread and its queue; `close` it, or use it in a `with` block.

    Args:
        max_active: requests that are advanced in turns.
        max_waiting: requests beyond these that may wait.
    """

    def __init__(self, max_active: int, max_waiting: int) -> None:
        self._max_active, self._max_waiting = max_active, max_waiting
        self._waiting: deque[Job[object]] = deque()
        self._active: list[Job[object]] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)
        self._thread.start()

    def submit(self, work: Iterator[Item], emit: Callable[[Item | Done | Failed], None]) -> Job[Item]:
        """Put `work` into the queue.

        Args:
            emit: is called in the decoding thread with each item and at last with Done or Failed; must not block.

        Raises:
            QueueFull: there are `max_active` requests at work and `max_waiting` in front.
        """
        job = Job(work, emit)
        with self._changed:
            self._drop_cancelled()
            if self._closed or len(self._active) + len(self._waiting) >= self._max_active + self._max_waiting:
                raise QueueFull
            self._waiting.append(job)  # type: ignore[arg-type]
            self._changed.notify()
        return job

    @property
    def num_active(self) -> int:
        """Requests that are being decoded."""
        return len(self._active)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    def close(self) -> None:
        """End all requests with an error and wait for the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def __enter__(self) -> "Scheduler":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        while self._admit():
            for job in list(self._active):
                if self._closed:
                    break
                if not job.step():
                    with self._changed:
                        self._active.remove(job)
        for job in [*self._active, *self._waiting]:
            job.stop(ConnectionAbortedError("the server is shutting down"))

    def _admit(self) -> bool:
        """Start the first of the queue where there is room; wait where there is nothing to do. False once closed."""
        with self._changed:
            while not self._closed:
                self._drop_cancelled()
                while self._waiting and len(self._active) < self._max_active:
                    self._active.append(self._waiting.popleft())
                if self._active:
                    return True
                self._changed.wait()
            return False

    def _drop_cancelled(self) -> None:
        """Cancelled requests take no place in the queue."""
        for job in [job for job in self._waiting if job.is_cancelled]:
            self._waiting.remove(job)
