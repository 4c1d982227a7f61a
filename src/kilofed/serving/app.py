"""The routes: OpenAI's completions, chat completions and models; health, metrics and a page to chat on."""

import re
from base64 import b64encode
from hashlib import sha256
from importlib import resources

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kilofed.serving.auth import Auth
from kilofed.serving.metrics import Metrics
from kilofed.serving.requests import read_chat_request, read_completion_request
from kilofed.serving.service import Service
from kilofed.serving.validation import Refusal, check_name

PATHS = ("/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")
HEADERS = {b"cache-control": b"no-store", b"x-content-type-options": b"nosniff", b"referrer-policy": b"no-referrer"}


def make_app(service: Service, auth: Auth) -> ASGIApp:
    """The whole server as one ASGI application."""
    # FastAPI's own documentation pages load scripts from other sites.
    app = FastAPI(title="kilofed", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(HTTPException, _not_found)
    app.add_exception_handler(Exception, _broken)
    page, policy = _page()

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await service.answer(request, read_completion_request)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await service.answer(request, read_chat_request)

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [service.model()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        check_name(name, service.served)
        return JSONResponse(service.model())

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        content, content_type = service.metrics.exposition(request.headers.get("accept", ""))
        return Response(content, headers={"Content-Type": content_type})

    @app.get("/")
    async def chat_page() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    return AccessMiddleware(app, auth, service.metrics)


class AccessMiddleware:
    """Authenticates before anything of a request is read, counts responses, and adds the common headers to them."""

    def __init__(self, app: ASGIApp, auth: Auth, metrics: Metrics) -> None:
        self._app, self._auth, self._metrics = app, auth, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI asks."""
        assert scope["type"] == "http"
        path = scope["path"]

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.responses.labels(path if path in PATHS else "other", message["status"]).inc()
                message["headers"] = [*message.get("headers", []), *HEADERS.items()]
            await send(message)

        try:
            headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
            self._auth.check(path, headers)
        except Refusal as refusal:
            await _said(refusal)(scope, receive, counted)
            return
        await self._app(scope, receive, counted)


def _said(refusal: Refusal) -> Response:
    return JSONResponse(refusal.body(), status_code=refusal.status, headers=refusal.headers)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return _said(error)


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = {404: f"there is no {request.url.path[:100]} here", 405: f"{request.method} is not for this path"}
    said = what.get(error.status_code, str(error.detail))
    return _said(Refusal(said, status=error.status_code, headers=error.headers))


async def _broken(_: Request, error: Exception) -> Response:
    # What went wrong is in the server's log; the client learns its kind only.
    return _said(Refusal(f"the server failed ({type(error).__name__})", status=500, kind="server_error"))


def _page() -> tuple[str, str]:
    """The chat page, and a policy under which a browser runs what stands in it and nothing else."""
    page = (resources.files("kilofed.serving") / "page.html").read_text("utf-8")
    hashes = {
        kind: b64encode(sha256(re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.S)[0].encode()).digest()).decode()
        for kind in ("script", "style")
    }
    policy = (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy
