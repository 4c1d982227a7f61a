"""Server-sent events written by us and by sse-starlette: time per event, and what importing it changes.

    pip install sse-starlette && python benchmarks/serving/event_stream.py [--quick] [--json]

Both write the same number of events of one token each to a client that reads nothing but counts; medians of alternating
rounds. sse-starlette is not a dependency of kilofed: why stands in `kilofed.serving.streaming`.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable

from starlette.responses import StreamingResponse
from starlette.types import Message, Scope

SCOPE: Scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b""}
PATCH = (
    "import uvicorn; before = uvicorn.Server.handle_exit; import sse_starlette; "
    "print(uvicorn.Server.handle_exit is not before)"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer events and rounds")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    try:
        from sse_starlette import EventSourceResponse
    except ModuleNotFoundError:
        raise SystemExit("sse-starlette is missing: pip install sse-starlette") from None
    num, rounds = (1_000, 5) if options.quick else (5_000, 15)
    ours = [json.dumps({"choices": [{"text": f"t{i}"}]}) for i in range(num)]

    def own() -> StreamingResponse:
        async def body() -> AsyncIterator[bytes]:
            for text in ours:
                yield f"data: {text}\n\n".encode()

        return StreamingResponse(body(), media_type="text/event-stream")

    def other() -> EventSourceResponse:
        async def body() -> AsyncIterator[str]:
            for text in ours:
                yield text

        return EventSourceResponse(body())

    times: dict[str, list[float]] = {"own": [], "sse-starlette": []}
    for _ in range(rounds):
        for name, make in (("own", own), ("sse-starlette", other)):
            times[name].append(asyncio.run(seconds(make)) / num * 1e6)
    ratio = statistics.median(b / a for a, b in zip(times["own"], times["sse-starlette"], strict=True))
    patched = subprocess.run([sys.executable, "-c", PATCH], capture_output=True, text=True, check=True).stdout.strip()
    found = {
        **{f"{name} us/event": round(statistics.median(each), 2) for name, each in times.items()},
        "ratio": round(ratio, 2),
        "import replaces uvicorn's handler": patched == "True",
    }
    print(json.dumps(found) if options.json else "\n".join(f"{name}: {value}" for name, value in found.items()))


async def seconds(make: Callable[[], StreamingResponse]) -> float:
    """Wall time of one response to a client that stays."""
    stays = asyncio.Event()

    async def receive() -> Message:
        await stays.wait()
        return {"type": "http.disconnect"}

    async def send(_: Message) -> None: ...

    began = time.perf_counter()
    await make()(SCOPE, receive, send)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
