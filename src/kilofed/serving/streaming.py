"""From the decoding thread to the network: a request's steps as they come, until the client leaves or time is up.

Server-sent events are written here and in `responses.event`, a dozen lines, and not by sse-starlette: on import it
replaces uvicorn's signal handler for the whole process; at a stop it cancels answers without their last event, also
those of a server that starts later; its log at DEBUG level holds the answers; and it takes several times as long per
event (`benchmarks/serving/event_stream.py`).
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, MutableMapping

from kilofed.errors import KilofedError
from kilofed.serving.scheduler import Done, Failed, Scheduler
from kilofed.serving.steps import Step
from kilofed.serving.validation import Refusal

log = logging.getLogger("kilofed")

Message = MutableMapping[str, object]
Receive = Callable[[], Awaitable[Message]]


class OutOfTime(Exception):
    """The time of a request is up."""


class StepStream:
    """One request at the scheduler, seen from the event loop; `close` it in any case.

    Args:
        deadline: in the event loop's time; the request then fails.

    Raises:
        QueueFull: as `Scheduler.submit`.
    """

    def __init__(self, scheduler: Scheduler, work: Iterator[Step], deadline: float) -> None:
        loop = asyncio.get_running_loop()
        items: asyncio.Queue[Step | Done | Failed] = asyncio.Queue()
        self._items = items
        self._job = scheduler.submit(work, lambda item: _hand_over(loop, items, item))
        self._timer = loop.call_at(deadline, items.put_nowait, Failed(OutOfTime()))

    async def batches(self) -> AsyncIterator[list[Step]]:
        """The steps in order, as many at once as have come. Raises Refusal: the request failed or its time is up."""
        while True:
            steps, end = self._sorted([await self._items.get()])
            if steps:
                yield steps
            if isinstance(end, Failed):
                raise _refusal(end.error)
            if end is not None:
                return

    def close(self) -> None:
        """Cancel the request; nothing more comes."""
        self._job.cancel()
        self._timer.cancel()

    def _sorted(self, items: list[Step | Done | Failed]) -> tuple[list[Step], Done | Failed | None]:
        """Steps that have come, and the end if it has."""
        while not self._items.empty():
            items.append(self._items.get_nowait())
        steps: list[Step] = []
        for item in items:
            if not isinstance(item, Step):
                return steps, item
            steps.append(item)
        return steps, None


async def unless_gone(work: Coroutine[object, object, None], receive: Receive) -> bool:
    """Do `work` until it is over or the client has left; whether it is over.

    What `work` raises is raised.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            return False
        working.result()
        return True
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _hand_over(
    loop: asyncio.AbstractEventLoop, items: "asyncio.Queue[Step | Done | Failed]", item: Step | Done | Failed
) -> None:
    loop.call_soon_threadsafe(items.put_nowait, item)


def _refusal(error: Exception) -> Refusal:
    """What the client reads of a failure: our own sentence, or the kind of error and nothing of its inside."""
    if isinstance(error, OutOfTime):
        return Refusal(
            "the answer took longer than this server allows: ask for fewer tokens",
            code="timeout",
            status=504,
            kind="server_error",
            headers={"x-should-retry": "false"},
        )
    if isinstance(error, ConnectionAbortedError):
        return Refusal("the server is shutting down", code="shutting_down", status=503, kind="server_error")
    if isinstance(error, KilofedError):
        return Refusal(str(error), code="model_error", status=500, kind="server_error")
    log.error("a request failed", exc_info=error)
    return Refusal(f"the model failed ({type(error).__name__})", code="model_error", status=500, kind="server_error")
