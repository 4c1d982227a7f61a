"""What can go wrong, as one family.

KilofedError                  every error that kilofed raises on purpose; a ValueError
├── RecipeError               the recipe asks for something that does not exist or does not fit
├── DataError                 a file, a row, a column or a split is not usable
├── ModelError                a model, tokeniser or adapter cannot be loaded or does not fit
├── PayloadError              bytes that are not a whole, well-formed payload
├── PrivacyError              a method asked for more than the privacy policy allows
├── ClientError               one client could not do its part: the run stops or goes on without it
│   ├── NonFiniteLoss         a loss was NaN or infinite
│   └── WrongWeights          a site holds other weights than the server
├── TooFewReplies             fewer clients answered than the quorum
├── RemoteError               a model behind an API cannot be asked or answers wrongly
│   └── BudgetSpent           the requests or tokens that may be sent to it are spent
├── RunError                  a run folder cannot be made, read, resumed or written
└── ServeError                a server cannot be started as it was asked to

The message says what was seen, what was expected and what to do:

    try:
        run = kilofed.run("tiny", {"rounds": 3})
    except kilofed.KilofedError as error:
        print(error)
"""

import difflib
from collections.abc import Iterable

LONGEST_SHOWN = 100
"""Characters of a value that a message shows."""


class KilofedError(ValueError):
    """Root of the family."""


class RecipeError(KilofedError):
    """The recipe asks for something that does not exist or does not fit."""


class DataError(KilofedError):
    """A file, a row, a column or a split is not usable."""


class ModelError(KilofedError):
    """A model, tokeniser or adapter cannot be loaded or does not fit."""


class PayloadError(KilofedError):
    """Bytes that are not a whole, well-formed payload."""


class PrivacyError(KilofedError):
    """A method asked for more than the privacy policy allows."""


class ClientError(KilofedError):
    """One client could not do its part."""


class NonFiniteLoss(ClientError):
    """A loss was NaN or infinite."""


class WrongWeights(ClientError):
    """A site holds other weights than the server."""


class TooFewReplies(KilofedError):
    """Fewer clients answered than the quorum."""


class RemoteError(KilofedError):
    """A model behind an API cannot be asked or answers wrongly."""


class BudgetSpent(RemoteError):
    """The requests or tokens that may be sent to the API are spent."""


class RunError(KilofedError):
    """A run folder cannot be made, read, resumed or written."""


class ServeError(KilofedError):
    """A server cannot be started as it was asked to."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The hint ` (did you mean X?)` for a misspelt name, or the list of what exists."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else f" (there is: {', '.join(names) or 'nothing'})"


def shorten(text: str, longest: int = LONGEST_SHOWN) -> str:
    """The beginning of a text that may be very long, as a message shows it."""
    return text if len(text) <= longest else f"{text[:longest]}... ({len(text):,} characters)"


def readable(text: str) -> str:
    """`text` with what cannot be printed as UTF-8 spelt out."""
    return text.encode("utf-8", "backslashreplace").decode()
