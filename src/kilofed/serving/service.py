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

from kilofed.serving.metrics import Meters
from kilofed.serving.model import Served
from kilofed.serving.requests import SEEDS, Ask, Limits
from kilofed.serving.responses import LAST_EVENT, Answer, event
from kilofed.serving.scheduler import Desk, Full
from kilofed.serving.steps import Step, steps
from kilofed.serving.streaming import Ticket, unless_gone
from kilofed.serving.validation import Refusal

log = logging.getLogger("kilofed")

BODY_TIMEOUT = 30.0
"""Seconds in which the body of a request must have come."""
SLACK = 30.0
"""Seconds beyond the time limit in which a slow reader may take what is ready."""

Read = Callable[[bytes, Served, Limits, int], Ask]


@dataclass
class Service:
    """Where requests meet the model: what is served, by whom, within which limits."""

    served: Served
    desk: Desk
    limits: Limits
    meters: Meters = field(default_factory=Meters)
    created: int = field(default_factory=lambda: int(time.time()))
    num_open: int = 0
    """Answers that are being made or read."""

    async def answer(self, request: Request, read: Read) -> Response:
        """Read, check, put into the line, and give out."""
        arrived = asyncio.get_running_loop().time()
        body = await read_body(request, self.limits.max_body)
        ask = await asyncio.to_thread(read, body, self.served, self.limits, secrets.randbelow(SEEDS))
        self.refuse_crowd()
        try:
            ticket = Ticket(self.desk, steps(self.served, ask), arrived + self.limits.timeout)
        except Full as full:
            raise self._busy() from full
        answer = Answer(self.served, ask)
        self.meters.prompt_tokens += sum(map(len, ask.prompts))
        self.num_open += 1
        flow = Flow(self, ticket, answer, arrived)
        return flow if ask.stream else await flow.whole(request)

    def model(self) -> dict[str, object]:
        """The one model, in OpenAI's form, with its context in tokens and what becomes of talks."""
        return {
            "id": self.served.name,
            "object": "model",
            "created": self.created,
            "owned_by": "kilofed",
            "max_model_len": self.served.generator.context,
            "talks": self.served.manner,
        }

    def refuse_crowd(self) -> None:
        """Raise Refusal where too many answers are being made or read."""
        # Answers that are ready and read slowly hold no place at the desk, but memory.
        if self.num_open >= 4 * (self.limits.max_active + self.limits.max_waiting):
            raise self._busy()

    def _busy(self) -> Refusal:
        turns = (self.desk.num_waiting + 1) / self.limits.max_active
        wait = min(max(math.ceil(self.meters.whole.mean * turns), 1), 60)
        return Refusal(
            f"{self.desk.num_active} requests are being answered and {self.desk.num_waiting} wait: try again later",
            code="queue_full",
            status=429,
            kind="rate_limit_error",
            headers={"Retry-After": str(wait)},
        )


class Flow(Response):
    """One answer on its way to the client: server-sent events, or gathered by `whole`."""

    def __init__(self, service: Service, ticket: Ticket, answer: Answer, arrived: float) -> None:
        super().__init__(media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._service, self._ticket, self._answer, self._arrived = service, ticket, answer, arrived

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
            self._service.meters.failed += 1
            tail = event(refusal.body())
        await send({"type": "http.response.body", "body": tail, "more_body": False})

    async def _batches(self) -> AsyncIterator[list[Step]]:
        first = True
        async for batch in self._ticket.batches():
            if first:
                self._service.meters.first_piece.add(asyncio.get_running_loop().time() - self._arrived)
                first = False
            yield batch

    def _close(self, over: bool) -> None:
        self._ticket.close()
        meters = self._service.meters
        self._service.num_open -= 1
        meters.generated_tokens += self._answer.num_generated
        meters.cancelled += not over
        meters.whole.add(asyncio.get_running_loop().time() - self._arrived)


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
