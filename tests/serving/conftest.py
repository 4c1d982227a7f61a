"""The tiny model behind real HTTP on this machine, and one whose tokens come when the test lets them."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
import openai
import pytest

from kilofed.generation.decoding import Sampling, Token
from kilofed.serving.model import ServedModel, open_served_model
from kilofed.serving.requests import Limits
from kilofed.serving.server import running

TOKEN = "a-token-for-tests"


@dataclass
class Reached:
    """A running server and clients of it."""

    url: str
    token: str | None
    served: ServedModel
    http: httpx.Client
    api: openai.OpenAI

    def post(self, path: str, body: object, **headers: str) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.http.post(path, content=content, headers={"content-type": "application/json", **headers})

    def count(self, name: str) -> int:
        """A number of /metrics."""
        lines = self.http.get("/metrics").text.splitlines()
        return int(float(next(line for line in lines if line.startswith(f"{name} ")).split()[-1]))

    def waits_for(self, name: str, value: int) -> bool:
        """Whether a number of /metrics becomes `value` within ten seconds."""
        until = time.monotonic() + 10
        while (seen := self.count(name)) != value and time.monotonic() < until:
            time.sleep(0.01)
        return seen == value


Start = Callable[..., Reached]


@pytest.fixture(scope="session")
def served(tiny_model: Path) -> ServedModel:
    return open_served_model(str(tiny_model), name="tiny")


@pytest.fixture(scope="session")
def _stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def reach(stack: ExitStack, served: ServedModel, limits: Limits, token: str | None) -> Reached:
    url = stack.enter_context(running(served, token=token, limits=limits))
    headers = {"authorization": f"Bearer {token}"} if token else {}
    http = stack.enter_context(httpx.Client(base_url=url, headers=headers, timeout=60))
    api = openai.OpenAI(base_url=f"{url}/v1", api_key=token or "none", max_retries=0, timeout=60)
    return Reached(url, token, served, http, stack.enter_context(api))


@pytest.fixture(scope="session")
def server(_stack: ExitStack, served: ServedModel) -> Reached:
    """The tiny model behind a token, with the limits of `Limits` but for all log-probabilities."""
    return reach(_stack, served, Limits(max_logprobs=259), TOKEN)


@pytest.fixture
def start(served: ServedModel) -> Iterator[Start]:
    """Start a server of one's own: `start(served=, token=, **limits)`."""
    with ExitStack() as stack:

        def begin(served: ServedModel = served, token: str | None = TOKEN, **limits: int | float) -> Reached:
            return reach(stack, served, Limits(**limits), token)  # type: ignore[arg-type]

        yield begin


@dataclass
class Gated:
    """Speaks as the generator within, each token when the gate is open."""

    inner: ServedModel
    gate: threading.Event = field(default_factory=threading.Event)
    seconds: float = 0.0
    """Waited before each token."""

    def __post_init__(self) -> None:
        self.context, self.end_ids = self.inner.generator.context, frozenset[int]()
        self.num_begun = self.num_closed = self.num_tokens = 0

    def generate_tokens(self, prompt_ids: Sequence[int], sampling: Sampling) -> Iterator[Token]:
        self.num_begun += 1
        try:
            for token in self.inner.generator.generate_tokens(prompt_ids, sampling):
                assert self.gate.wait(20)
                time.sleep(self.seconds)
                self.num_tokens += 1
                yield token
        finally:
            self.num_closed += 1

    def score(self, ids: Sequence[int], num_logprobs: int = 0) -> list[Token | None]:
        return self.inner.generator.score(ids, num_logprobs)


@pytest.fixture
def gated(served: ServedModel) -> Iterator[tuple[Gated, ServedModel]]:
    """A gate and the tiny model behind it; the gate is open once the test is over."""
    generator = Gated(served)
    yield generator, replace(served, generator=generator)
    generator.gate.set()
