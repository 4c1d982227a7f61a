"""Authentication: the bearer token, and without one, requests of this machine's own programs only."""

import hmac
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from kilofed.errors import ServeError
from kilofed.hosts import is_loopback
from kilofed.serving.validation import Refusal

VARIABLE = "KILOFED_TOKEN"
SHORTEST = 16
"""Characters of a token that somebody else chose."""
OPEN_PATHS = frozenset({"/", "/health", "/favicon.ico"})
"""Neither a prompt nor an answer nor a count is behind these."""


@dataclass(frozen=True)
class Auth:
    """Accepts or refuses requests by their headers alone."""

    token: str | None
    """None accepts requests from this machine that do not come from a web page of another origin."""

    def check(self, path: str, headers: Mapping[str, str]) -> None:
        """Raise Refusal unless a request with these headers (lower-case names) may go on."""
        if self.token is None:
            _refuse_web_pages(headers)
        elif path not in OPEN_PATHS and not self._knows(headers.get("authorization", "")):
            raise Refusal(
                "the request has no valid key: send the server's token as `Authorization: Bearer TOKEN`",
                code="invalid_api_key",
                status=401,
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _knows(self, header: str) -> bool:
        kind, _, given = header.partition(" ")
        assert self.token is not None
        same = hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), self.token.encode())
        return kind.lower() == "bearer" and same


def find_token(file: Path | None) -> tuple[str, bool]:
    """The token of a file's first line, else of the environment, else a new one; and whether it is new.

    Raises:
        ServeError: the file cannot be read, or the token is too short or not printable ASCII without spaces.
    """
    if file is not None:
        try:
            token, where = file.read_text("utf-8").partition("\n")[0].strip(), str(file)
        except (OSError, UnicodeDecodeError) as error:
            raise ServeError(f"the token cannot be read from {file} ({error}): check the path") from error
    elif VARIABLE in os.environ:
        token, where = os.environ[VARIABLE].strip(), VARIABLE
    else:
        return f"kf-{secrets.token_urlsafe(32)}", True
    if len(token) < SHORTEST or not token.isascii() or not token.isprintable() or " " in token:
        raise ServeError(
            f"the token in {where} has {len(token)} characters; expected at least {SHORTEST}, printable ASCII "
            "without spaces"
        )
    return token, False


def _refuse_web_pages(headers: Mapping[str, str]) -> None:
    """A page of another origin may send requests to this machine from its reader's browser; its name gives it away."""
    host, origin = headers.get("host", ""), headers.get("origin", "")
    try:
        name = urlsplit(f"//{host}").hostname or ""
        foreign = bool(origin) and urlsplit(origin).netloc != host
    except ValueError:
        name, foreign = "", True
    if not is_loopback(name):
        raise Refusal(f"the host {host[:100]!r} is not this machine: without a token only it is served", status=403)
    if foreign or headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        raise Refusal(f"a page of {origin[:100] or 'another site'!r} may not use this server", status=403)
