"""Ask a model behind an OpenAI-compatible completions API: bounded retries, a budget, a ledger, no key anywhere.

The key is read from the environment when a request is made and stands in its header only: not in a field, a message, a
log, the ledger or the cache. It goes to the address of the recipe and no other, and over plain http to this machine alone.
"""

import json
import logging
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

import httpx
import tenacity

from kilofed.errors import BudgetSpent, RemoteError
from kilofed.files import append_line, said
from kilofed.hosts import is_loopback
from kilofed.proxy.spec import LargeSpec

log = logging.getLogger("kilofed")

Json = dict[str, object]
BYTES_PER_SCORE = 400
"""Most bytes of an answer per log-probability, ten times what one takes; with MIB, what an answer may be long."""
MIB = 2**20
LONGEST_WAIT = 60.0
"""Most seconds between two tries, also where the API asks for more."""


class Api:
    """One API and the meter of what was sent to it.

    Args:
        spec: where it is and what may be asked.
        ledger: JSON-lines file that gets one row per request: prompts, tokens, bytes up and down, status, seconds. It
            is continued where it exists, and what it holds counts against the budget. None keeps none.

    Raises:
        RemoteError: there is a key, and it would cross a network in plain text.
    """

    def __init__(self, spec: LargeSpec, ledger: Path | None = None) -> None:
        self.spec = spec
        self._ledger = ledger
        self.num_requests, self.num_tokens = _spent(ledger)
        address = urlsplit(spec.path)
        here, safe = is_loopback(address.hostname or ""), address.scheme == "https"
        self._is_private = here or safe
        # A proxy of the environment would be handed what is meant for this machine, the key in plain text.
        self._http = httpx.Client(timeout=spec.timeout, follow_redirects=False, trust_env=safe or not here)
        self._refuse_plain_text()

    def complete(self, prompts: Sequence[Sequence[int]] | Sequence[str], num_tokens: int, *, echo: bool) -> list[Json]:
        """One more token for each prompt, with log-probabilities; with `echo`, those of the prompt's tokens too.

        Args:
            num_tokens: tokens in the prompts, for the budget.

        Returns:
            The `logprobs` of each choice, in the order of the prompts.

        Raises:
            BudgetSpent: before sending what is above the budget.
            RemoteError: refused, or no whole answer after all tries.
        """
        body: Json = {
            "model": self.spec.name,
            "prompt": list(prompts),
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": self.spec.top_k,
            "echo": echo,
        }
        if self.spec.names == "ids":
            body["return_tokens_as_token_ids"] = True
        content = json.dumps(body, separators=(",", ":")).encode()
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self.spec.max_tries),
            wait=self._wait,
            retry=tenacity.retry_if_exception_type(_Retry),
            reraise=True,
        )
        try:
            return retrying(self._try, content, len(prompts), num_tokens + len(prompts))
        except _Retry as error:
            raise RemoteError(
                f"{self.spec.path} gave no answer (tries: {self.spec.max_tries}, last: {error}): "
                "try later, or raise max_tries or timeout"
            ) from None

    def model_names(self) -> list[str]:
        """Names of the models that the API serves; empty where it gives none. Raises RemoteError: as `Api`."""
        key_headers = self._headers()
        try:
            with self._http.stream("GET", f"{self._base}/models", headers=key_headers) as answer:
                found = json.loads(_at_most(MIB, answer))
            return [str(row["id"]) for row in found["data"]]
        except (httpx.HTTPError, ValueError, KeyError, TypeError, RecursionError):
            return []

    def close(self) -> None:
        """End the connections."""
        self._http.close()

    @property
    def _base(self) -> str:
        return self.spec.path.rstrip("/")

    @property
    def _key(self) -> str:
        return os.environ.get(self.spec.key_variable, "")

    def _headers(self) -> dict[str, str]:
        self._refuse_plain_text()
        key = self._key
        if not (key.isascii() and key.isprintable() and " " not in key) and key:
            raise RemoteError(f"${self.spec.key_variable} holds characters that no key has: set it again")
        return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def _refuse_plain_text(self) -> None:
        if self._key and not self._is_private:
            raise RemoteError(
                f"{self.spec.path} is plain http, so that everyone on the way could read the key in "
                f"${self.spec.key_variable}: use https://, or unset the variable if the API asks for no key"
            )

    def _wait(self, state: tenacity.RetryCallState) -> float:
        failed = state.outcome.exception() if state.outcome else None
        asked = failed.wait if isinstance(failed, _Retry) else None
        # Half of it is chance, so that many who were refused together do not come back together.
        seconds: float = random.uniform(0.5, 1) * self.spec.first_wait * 2.0 ** (state.attempt_number - 1)
        seconds = min(max(seconds, asked or 0.0), LONGEST_WAIT)
        log.info("the API did not answer; next try in %.1f s", seconds)
        return seconds

    def _try(self, content: bytes, num_prompts: int, num_tokens: int) -> list[Json]:
        key_headers = self._headers()
        self._spend(num_tokens)
        began = time.monotonic()
        status, received, trouble, headers = 0, b"", "", httpx.Headers()
        most = MIB + BYTES_PER_SCORE * (self.spec.top_k + 3) * num_tokens
        try:
            with self._http.stream(
                "POST", f"{self._base}/completions", content=content, headers=key_headers
            ) as answer:
                received = _at_most(most, answer)
                status, headers = answer.status_code, answer.headers
        except httpx.TimeoutException:
            trouble = f"nothing came for {self.spec.timeout:g} s"
        except httpx.RequestError as error:
            trouble = f"the connection failed ({type(error).__name__})"
        self._record(num_prompts, num_tokens, len(content), len(received), status, time.monotonic() - began)
        if trouble:
            raise _Retry(trouble)
        if len(received) > most:
            raise RemoteError(
                f"{self.spec.path} answered with more than {most:,} bytes, which no answer to {num_prompts} prompts "
                "has: it is not the API that it should be"
            )
        if status == 429 or status >= 500:
            raise _Retry(f"status {status}", _seconds(headers.get("retry-after")))
        if status != 200:
            self._refused(status, received, headers)
        return self._logprobs(received, num_prompts)

    def _spend(self, num_tokens: int) -> None:
        for name, spent, most in (
            ("max_requests", self.num_requests + 1, self.spec.max_requests),
            ("max_tokens", self.num_tokens + num_tokens, self.spec.max_tokens),
        ):
            if spent > most:
                raise BudgetSpent(
                    f"the budget for {self.spec.name} is spent: {self.num_requests:,} requests and "
                    f"{self.num_tokens:,} tokens were sent, and the next would pass {name}={most:,}. What was answered "
                    f"is kept: raise {name} and resume"
                )
        self.num_requests += 1
        self.num_tokens += num_tokens

    def _record(self, prompts: int, tokens: int, up: int, down: int, status: int, seconds: float) -> None:
        if self._ledger:
            row: dict[str, object] = {"model": self.spec.name, "prompts": prompts, "tokens": tokens, "up": up}
            append_line(self._ledger, {**row, "down": down, "status": status, "seconds": round(seconds, 4)})

    def _refused(self, status: int, received: bytes, headers: httpx.Headers) -> NoReturn:
        if 300 <= status < 400:
            elsewhere = self._on_one_line(headers.get("location", "nowhere"))
            raise RemoteError(
                f"{self.spec.path} sends requests on to {elsewhere} (status {status}), and a key goes to no other "
                "address than the recipe's: set the large model's path to the address that answers"
            )
        if status in (401, 403):
            raise RemoteError(f"{self.spec.path} refused the key (status {status}): check ${self.spec.key_variable}")
        message = self._on_one_line(_message(received))
        names = [self._on_one_line(name) for name in self.model_names()[:20]]
        if names and self.spec.name not in names:
            raise RemoteError(f"{self.spec.path} does not serve {self.spec.name}; it serves {', '.join(names)}")
        if status == 404:
            raise RemoteError(
                f"{self.spec.path}/completions does not exist ({message}): the address must end with /v1"
            )
        raise RemoteError(f"{self.spec.path} refused the request with status {status} ({message})")

    def _on_one_line(self, text: str) -> str:
        """What a stranger wrote, without the key, before it is cut: half a key is one too."""
        text = text.replace(self._key, "[key]") if self._key else text
        return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))[:300]

    def _logprobs(self, received: bytes, num_prompts: int) -> list[Json]:
        try:
            choices = sorted(json.loads(received)["choices"], key=lambda choice: int(choice["index"]))
            found = [choice.get("logprobs") for choice in choices]
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise _Retry("the answer is not a completion") from error
        if len(found) != num_prompts:
            raise _Retry(f"{len(found)} answers came to {num_prompts} prompts")
        if any(not isinstance(one, dict) or not one.get("top_logprobs") for one in found):
            raise RemoteError(
                f"{self.spec.path} answers without log-probabilities: proxy-tuning needs the `logprobs` of the "
                "completions API, so take a server that gives them"
            )
        return found


class _Retry(Exception):
    """A try failed in a way that another may not."""

    def __init__(self, what: str, wait: float | None = None) -> None:
        super().__init__(what)
        self.wait = wait


def _spent(ledger: Path | None) -> tuple[int, int]:
    """Requests and tokens that an earlier process sent; a half-written last line is counted as one request."""
    if ledger is None or not ledger.exists():
        return 0, 0
    requests, tokens = 0, 0
    text = ledger.read_text("utf-8", errors="replace")
    if text and not text.endswith("\n"):
        with said(f"cannot write {ledger}"), ledger.open("a", encoding="utf-8") as file:
            file.write("\n")  # A killed process left half a line; the next row must not be glued to it.
    for line in text.splitlines():
        requests += 1
        try:
            tokens += int(json.loads(line)["tokens"])
        except (ValueError, KeyError, TypeError):
            continue
    return requests, tokens


def _seconds(header: str | None) -> float | None:
    try:
        return float(header) if header else None
    except ValueError:
        return None  # A date; the usual wait will do.


def _at_most(most: int, answer: httpx.Response) -> bytes:
    """The body, or somewhat more than `most` bytes of it."""
    parts, num = [], 0
    for part in answer.iter_bytes():
        parts.append(part)
        num += len(part)
        if num > most:
            break
    return b"".join(parts)


def _message(received: bytes) -> str:
    """What an error body says, in OpenAI's form or any other."""
    try:
        body = json.loads(received)
        error = body.get("error", body) if isinstance(body, dict) else body
        return str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, RecursionError):
        return received.decode("utf-8", errors="replace")
