"""An OpenAI-compatible completions server on loopback around a real model, with faults to order."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from torch import nn

Fault = Callable[[BaseHTTPRequestHandler], None]


class Loopback(ThreadingHTTPServer):
    """Serves `model` under the name `large`; keeps what it was sent; plays `faults` before it answers.

    Args:
        name_of: how a token is called where ids were not asked for.
        key: what requests must bear; empty asks for none.
    """

    daemon_threads = True

    def __init__(self, model: nn.Module, name_of: Callable[[int], str] = str, key: str = "") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model, self.name_of, self.key = model, name_of, key
        self.faults: list[Fault] = []
        self.bodies: list[dict[str, object]] = []
        self.headers: list[dict[str, str]] = []
        self.num_connections = 0
        self.tells_logprobs = True
        self.read: Callable[[str], list[int]] = lambda text: list(map(int, text.split()))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    @torch.inference_mode()
    def choice(self, index: int, ids: Sequence[int], body: dict[str, object]) -> dict[str, object]:
        log_p = self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        k = min(int(str(body["logprobs"])), log_p.shape[-1])
        by_id = body.get("return_tokens_as_token_ids", False)
        tops: list[dict[str, float] | None] = [None] if body["echo"] else []
        for row in log_p if body["echo"] else log_p[-1:]:
            best = row.topk(k)
            tops.append(
                {
                    f"token_id:{i}" if by_id else self.name_of(i): p
                    for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)
                }
            )
        return {"index": index, "text": "", "logprobs": {"top_logprobs": tops} if self.tells_logprobs else None}


class _Handler(BaseHTTPRequestHandler):
    server: Loopback
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.server.num_connections += 1

    def do_GET(self) -> None:
        self.answer(200, {"data": [{"id": "large"}, {"id": "other"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        self.server.headers.append(dict(self.headers))
        if self.server.faults:
            self.server.faults.pop(0)(self)
            return
        if self.server.key and self.headers.get("Authorization") != f"Bearer {self.server.key}":
            said = f"Incorrect API key provided: {self.headers.get('Authorization')}"
            self.answer(401, {"error": {"message": said}})
        elif body["model"] != "large":
            self.answer(404, {"error": {"message": f"no model {body['model']}"}})
        else:
            prompts = [self.server.read(text) if isinstance(text, str) else text for text in body["prompt"]]
            choices = [self.server.choice(n, ids, body) for n, ids in enumerate(prompts)]
            self.answer(200, {"choices": choices[::-1]})  # The order is not promised, the index is.

    def answer(self, status: int, body: object, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


def status(code: int, headers: dict[str, str] | None = None, message: str = "not now") -> Fault:
    return lambda handler: handler.answer(code, {"error": {"message": message}}, headers)  # type: ignore[attr-defined]


def malformed(content: bytes) -> Fault:
    return lambda handler: handler.answer(200, content)  # type: ignore[attr-defined]


def slow(seconds: float) -> Fault:
    return lambda handler: time.sleep(seconds)


def packed(content: bytes, encoding: str) -> Fault:
    """An answer that says that it is compressed."""
    return lambda handler: handler.answer(200, content, {"Content-Encoding": encoding})  # type: ignore[attr-defined]


def cut(handler: BaseHTTPRequestHandler) -> None:
    """Promise a hundred bytes, send ten, hang up."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100")
    handler.end_headers()
    handler.wfile.write(b'{"choices"')
    handler.close_connection = True


@contextmanager
def served(model: nn.Module, name_of: Callable[[int], str] = str, key: str = "") -> Iterator[Loopback]:
    """A running server."""
    server = Loopback(model, name_of, key)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
