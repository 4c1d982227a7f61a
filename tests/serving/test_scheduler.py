"""One thread takes a step of each request in turns; who leaves, fails or comes too late harms nobody else."""

import queue
import threading
from collections.abc import Iterator

import pytest

from kilofed.serving.scheduler import Done, Failed, QueueFull, Scheduler


def counted(name: str, count: int, order: list[str]) -> Iterator[str]:
    for number in range(count):
        order.append(name)
        yield f"{name}{number}"


def held(gate: threading.Event) -> Iterator[str]:
    gate.wait(30)
    yield "held"


def told(items: "queue.Queue[object]") -> list[object]:
    """Everything up to the end."""
    found: list[object] = []
    while not found or not isinstance(found[-1], Done | Failed):
        found.append(items.get(timeout=30))
    return found


def test_requests_take_turns_and_each_hears_its_own() -> None:
    gate, order = threading.Event(), []  # type: ignore[var-annotated]
    first, one, two = queue.Queue(), queue.Queue(), queue.Queue()  # type: ignore[var-annotated]
    with Scheduler(3, 0) as scheduler:
        scheduler.submit(held(gate), first.put)  # The others come in while it holds the thread.
        scheduler.submit(counted("a", 3, order), one.put)
        scheduler.submit(counted("b", 2, order), two.put)
        gate.set()
        assert told(first) == ["held", Done()]
        assert told(one) == ["a0", "a1", "a2", Done()]
        assert told(two) == ["b0", "b1", Done()]
    assert order == ["a", "b", "a", "b", "a"]


def test_who_waits_comes_in_when_one_is_done() -> None:
    gate, order = threading.Event(), []  # type: ignore[var-annotated]
    items = [queue.Queue() for _ in range(4)]  # type: ignore[var-annotated]
    with Scheduler(1, 3) as scheduler:
        scheduler.submit(held(gate), items[0].put)
        for number, name in enumerate("abc", 1):
            scheduler.submit(counted(name, 2, order), items[number].put)
        with pytest.raises(QueueFull):
            scheduler.submit(counted("d", 1, order), lambda _: None)
        gate.set()
        for one in items:
            assert isinstance(told(one)[-1], Done)
        assert scheduler.num_active + scheduler.num_waiting <= 1
    assert order == ["a", "a", "b", "b", "c", "c"]


def test_a_failure_is_told_and_the_thread_goes_on() -> None:
    def failing() -> Iterator[str]:
        yield "one"
        raise RuntimeError("broken")

    one, two = queue.Queue(), queue.Queue()  # type: ignore[var-annotated]
    with Scheduler(2, 0) as scheduler:
        scheduler.submit(failing(), one.put)
        first, failed = told(one)
        assert first == "one"
        assert isinstance(failed, Failed)
        assert str(failed.error) == "broken"
        scheduler.submit(counted("a", 1, []), two.put)
        assert told(two) == ["a0", Done()]


def test_a_cancelled_request_is_closed_and_hears_nothing_more() -> None:
    closed, gate = threading.Event(), threading.Event()
    items: queue.Queue[object] = queue.Queue()

    def endless() -> Iterator[int]:
        try:
            number = 0
            while True:
                yield number
                number += 1
                gate.wait(30)
        finally:
            closed.set()

    with Scheduler(1, 0) as scheduler:
        job = scheduler.submit(endless(), items.put)
        assert items.get(timeout=30) == 0
        job.cancel()
        gate.set()
        assert closed.wait(30)
        assert items.empty()


def test_a_cancelled_request_in_the_line_makes_room() -> None:
    gate = threading.Event()
    first: queue.Queue[object] = queue.Queue()
    with Scheduler(1, 1) as scheduler:
        scheduler.submit(held(gate), first.put)
        waiting = scheduler.submit(counted("a", 1, []), lambda _: None)
        with pytest.raises(QueueFull):
            scheduler.submit(counted("b", 1, []), lambda _: None)
        waiting.cancel()
        second: queue.Queue[object] = queue.Queue()
        scheduler.submit(counted("c", 1, []), second.put)
        gate.set()
        assert told(second) == ["c0", Done()]


def test_closing_ends_all_requests_with_an_error() -> None:
    gate = threading.Event()
    items = [queue.Queue() for _ in range(3)]  # type: ignore[var-annotated]

    def slow() -> Iterator[int]:
        number = 0
        while True:
            gate.wait(0.01)
            yield number

    scheduler = Scheduler(2, 1)
    for one in items:
        scheduler.submit(slow(), one.put)
    items[1].get(timeout=30)
    scheduler.close()
    for one in items:
        last = told(one)[-1]
        assert isinstance(last, Failed)
        assert isinstance(last.error, ConnectionAbortedError)
    with pytest.raises(QueueFull):
        scheduler.submit(slow(), lambda _: None)


def test_a_listener_that_is_gone_ends_its_request() -> None:
    closed = threading.Event()

    def endless() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.set()

    def deaf(_: object) -> None:
        raise RuntimeError("Event loop is closed")

    with Scheduler(1, 0) as scheduler:
        scheduler.submit(endless(), deaf)
        assert closed.wait(30)
