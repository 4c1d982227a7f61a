"""Steps from the decoding thread reach the event loop in order; who leaves or runs out of time stops the work."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator

import pytest

from kilofed.errors import ModelError
from kilofed.generation.detokenizer import Piece
from kilofed.serving.scheduler import QueueFull, Scheduler
from kilofed.serving.steps import Step
from kilofed.serving.streaming import StepStream, unless_gone
from kilofed.serving.validation import Refusal


def numbered(count: int, error: Exception | None = None) -> Iterator[Step]:
    for index in range(count):
        yield Step(index, Piece("x", ()), 0)
    if error:
        raise error


async def collected(scheduler: Scheduler, work: Iterator[Step], seconds: float = 30.0) -> list[int]:
    stream = StepStream(scheduler, work, asyncio.get_running_loop().time() + seconds)
    try:
        return [step.index async for batch in stream.batches() for step in batch]
    finally:
        stream.close()


def test_every_step_comes_once_and_in_order() -> None:
    async def both(scheduler: Scheduler) -> list[list[int]]:
        return await asyncio.gather(collected(scheduler, numbered(300)), collected(scheduler, numbered(41)))

    with Scheduler(2, 0) as scheduler:
        assert asyncio.run(both(scheduler)) == [list(range(300)), list(range(41))]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ModelError("a prompt is too long"), "model_error", "a prompt is too long"),
        (ZeroDivisionError("secret inside"), "model_error", r"the model failed \(ZeroDivisionError\)"),
        (ConnectionAbortedError(), "shutting_down", "the server is shutting down"),
    ],
)
def test_a_failure_comes_after_the_steps_and_says_nothing_of_the_inside(
    error: Exception, code: str, said: str
) -> None:
    with Scheduler(1, 1) as scheduler:
        with pytest.raises(Refusal, match=f"^{said}$") as caught:
            asyncio.run(collected(scheduler, numbered(3, error)))
        assert caught.value.code == code
        assert caught.value.status in (500, 503)
        assert asyncio.run(collected(scheduler, numbered(2))) == [0, 1]  # The next request is served.


def test_a_request_whose_time_is_up_is_a_504_and_its_work_is_closed() -> None:
    gate, closed = threading.Event(), threading.Event()

    def slow() -> Iterator[Step]:
        try:
            yield Step(0, Piece("x", ()), 0)
            gate.wait(30)
            yield from numbered(100)
        finally:
            closed.set()

    with Scheduler(1, 0) as scheduler:
        with pytest.raises(Refusal, match="longer than this server allows") as caught:
            asyncio.run(collected(scheduler, slow(), seconds=0.2))
        gate.set()
        assert closed.wait(30)
    assert caught.value.status == 504
    assert caught.value.headers == {"x-should-retry": "false"}


def test_a_full_queue_is_refused_before_anything_is_made() -> None:
    gate = threading.Event()

    def held() -> Iterator[Step]:
        gate.wait(30)
        yield from numbered(1)

    async def third(scheduler: Scheduler) -> None:
        loop = asyncio.get_running_loop()
        first = StepStream(scheduler, held(), loop.time() + 30)
        with pytest.raises(QueueFull):
            StepStream(scheduler, numbered(1), loop.time() + 30)
        gate.set()
        assert [step.index async for batch in first.batches() for step in batch] == [0]
        first.close()

    with Scheduler(1, 0) as scheduler:
        asyncio.run(third(scheduler))


def done_when(work: Callable[[], Coroutine[object, object, None]], *messages: str) -> bool:
    async def both() -> bool:
        waiting = list(messages)

        async def receive() -> dict[str, object]:
            if waiting:
                return {"type": waiting.pop(0)}
            await asyncio.sleep(30)
            return {"type": "http.disconnect"}

        return await unless_gone(work(), receive)

    return asyncio.run(both())


async def nothing() -> None:
    await asyncio.sleep(0)


async def forever() -> None:
    await asyncio.sleep(30)


async def failing() -> None:
    raise ValueError("inside")


def test_work_is_done_unless_the_client_leaves() -> None:
    assert done_when(nothing)
    assert done_when(nothing, "http.request")  # More of the body is no leaving.
    assert not done_when(forever, "http.request", "http.disconnect")


def test_what_the_work_raises_is_raised() -> None:
    with pytest.raises(ValueError, match="inside"):
        done_when(failing)
