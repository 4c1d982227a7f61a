"""One request from its body to the last byte of its answer, whole or streamed."""

import asyncio
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from kilofed.serving.metrics import Metrics
from kilofed.serving.model import ServedModel
from kilofed.serving.requests import SEEDS, GenerationRequest, Limits
from kilofed.serving.responses import LAST_EVENT, Completion, event
from kilofed.serving.scheduler import QueueFull, Scheduler
from kilofed.serving.steps import Step, steps
from kilofed.serving.streaming import StepStream, unless_gone
from kilofed.serving.validation import Refusal

log = logging.getLogger("kilofed")

BODY_TIMEOUT = 30.0
"""Seconds in which the body of a request must have come."""
SLACK = 30.0
"""Seconds beyond the time limit in which a slow reader may take what is ready."""

Read = Callable[[bytes, ServedModel, Limits, int], GenerationRequest]


@dataclass
class Service:
    """What is served, by which scheduler, within which limits."""

    served: ServedModel
    scheduler: Scheduler
    limits: Limits
    metrics: Metrics = field(default_factory=Metrics)
    created: int = field(default_factory=lambda: int(time.time()))
    num_open: int = 0
    """Answers that are being made or read."""

    def __post_init__(self) -> None:
        self.metrics.active.set_function(lambda: self.scheduler.num_active)
        self.metrics.waiting.set_function(lambda: self.scheduler.num_waiting)

    async def answer(self, request: Request, read: Read) -> Response:
        """Read, validate, queue and answer."""
        arrived = asyncio.get_running_loop().time()
        body = await read_body(request, self.limits.max_body)
        wanted = await asyncio.to_thread(read, body, self.served, self.limits, secrets.randbelow(SEEDS))
        self.refuse_overload()
        try:
            stream = StepStream(self.scheduler, steps(self.served, wanted), arrived + self.limits.timeout)
        except QueueFull as full:
            raise self._busy() from full
        answer = Completion(self.served, wanted)
        self.metrics.prompt_tokens.inc(sum(map(len, wanted.prompts)))
        self.num_open += 1
        response = CompletionResponse(self, stream, answer, arrived)
        return response if wanted.stream else await response.whole(request)

    def model(self) -> dict[str, object]:
        """The one model, in OpenAI's form, with its context in tokens and what becomes of a conversation."""
        return {
            "id": self.served.name,
            "object": "model",
            "created": self.created,
            "owned_by": "kilofed",
            "max_model_len": self.served.generator.context,
            "talks": self.served.prompt_note,
        }

    def refuse_overload(self) -> None:
        """Raise Refusal where too many answers are being made or read."""
        # Answers that are ready and read slowly hold no place in the queue, but memory.
        if self.num_open >= 4 * (self.limits.max_active + self.limits.max_waiting):
            raise self._busy()

    def _busy(self) -> Refusal:
        turns = (self.scheduler.num_waiting + 1) / self.limits.max_active
        wait = min(max(math.ceil(self.metrics.mean_seconds * turns), 1), 60)
        return Refusal(
            f"{self.scheduler.num_active} requests are being answered and {self.scheduler.num_waiting} wait: try again later",
            code="queue_full",
            status=429,
            kind="rate_limit_error",
            headers={"Retry-After": str(wait)},
        )


class CompletionResponse(Response):
    """One answer on its way to the client: server-sent events, or gathered by `whole`."""

    def __init__(self, service: Service, stream: StepStream, answer: Completion, arrived: float) -> None:
        super().__init__(media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._service, self._stream, self._answer, self._arrived = service, stream, answer, arrived

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream, until all is sent, the client leaves, or it has read too slowly for too long."""
        deadline = self._arrived + self._service.limits.timeout + SLACK
        over = False
        try:
            async with asyncio.timeout_at(deadline):
                over = await unless_gone(self._send_all(send), receive)
        except TimeoutError:
            log.warning("a client read its stream too slowly; it was cut off")
        finally:
            self._close(over)

    async def whole(self, request: Request) -> Response:
        """All of the answer at once."""
        over = False
        try:
            over = await unless_gone(self._gather(), request.receive)
        finally:
            self._close(over)
        # Where the client has left, nobody reads this.
        return JSONResponse(self._answer.whole()) if over else Response(status_code=499)

    async def _gather(self) -> None:
        async for batch in self._batches():
            for step in batch:
                self._answer.add(step)

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for batch in self._batches():
                body = b"".join(event(chunk) for step in batch for chunk in self._answer.chunks(step))
                if body:
                    await send({"type": "http.response.body", "body": body, "more_body": True})
            tail = b"".join(event(chunk) for chunk in self._answer.last_chunk()) + LAST_EVENT
        except Refusal as refusal:
            self._service.metrics.failed.inc()
            tail = event(refusal.body())
        await send({"type": "http.response.body", "body": tail, "more_body": False})

    async def _batches(self) -> AsyncIterator[list[Step]]:
        first = True
        async for batch in self._stream.batches():
            if first:
                self._service.metrics.first_piece.observe(asyncio.get_running_loop().time() - self._arrived)
                first = False
            yield batch

    def _close(self, over: bool) -> None:
        self._stream.close()
        metrics = self._service.metrics
        self._service.num_open -= 1
        metrics.generated_tokens.inc(self._answer.num_generated)
        metrics.cancelled.inc(not over)
        metrics.whole.observe(asyncio.get_running_loop().time() - self._arrived)


async def read_body(request: Request, most: int) -> bytes:
    """The body of a JSON request.

    Raises:
        Refusal: it is not declared as JSON (415), has more than `most` bytes (413), or comes too slowly (408).
    """
    # A web page can send other types to any server without asking it first; JSON it cannot.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal("the request is not declared as JSON: send `Content-Type: application/json`", status=415)
    too_large = Refusal(f"the body has more than {most} bytes", code="request_too_large", status=413)
    declared = request.headers.get("content-length", "0")
    if not declared.isdigit() or int(declared) > most:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise too_large
                parts.append(part)
    except TimeoutError:
        raise Refusal("the body came too slowly", code="timeout", status=408) from None
    except ClientDisconnect:
        raise Refusal("the client left", status=499) from None
    return b"".join(parts)
