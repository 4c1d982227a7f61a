"""The large model of a proxy as a recipe names it: a local one, or one behind an OpenAI-compatible API."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal
from urllib.parse import urlsplit

from annotated_types import Ge, Gt

from kilofed.config.bounds import Settings
from kilofed.config.recipe import Dtype, ModelSpec
from kilofed.errors import RecipeError


@dataclass(frozen=True)
class LargeSpec(Settings):
    """The large model that is steered; the server alone loads or asks it."""

    path: str = "builtin:large"
    """`builtin:large`, a local directory, a hub id, or the address of an OpenAI-compatible API up to and with /v1, such
    as http://127.0.0.1:8000/v1, which is then asked and never loaded."""
    dtype: Dtype = "float32"
    """Dtype of its weights (a local model)."""
    device: str = "cpu"
    """Where it runs (a local model)."""
    revision: str = ""
    """Branch, tag or commit of a hub id."""
    name: str = ""
    """The model's name at the API; from here on the fields are for an API."""
    top_k: Annotated[int, Ge(1)] = 20
    """Likeliest tokens requested per position; more reveal more of the large model and cost more bytes."""
    key_variable: str = "KILOFED_API_KEY"
    """Environment variable with the key; unset or empty sends none. A key goes over https or to this machine alone."""
    scoring: Literal["echo", "steps"] = "echo"
    """echo: one prompt scores all its positions; steps: one prompt per position, for an API that cannot echo."""
    prompts: Literal["ids", "text"] = "ids"
    """How prompts are sent; text costs nothing but is refused where it does not come back as the same tokens."""
    names: Literal["ids", "text"] = "ids"
    """ids asks for tokens as `token_id:17` (kilofed, vLLM); text takes their text, which several tokens may share."""
    context: Annotated[int, Ge(0)] = 0
    """Longest sequence in tokens; 0 leaves it to the API to refuse."""
    batch_size: Annotated[int, Ge(1)] = 16
    """Prompts per request."""
    timeout: Annotated[float, Gt(0)] = 60.0
    """Seconds without a byte after which a try is given up."""
    max_tries: Annotated[int, Ge(1)] = 5
    """Tries per request, at 429, 5xx, time-outs, and cut or malformed answers; waits double from `first_wait`."""
    first_wait: Annotated[float, Ge(0)] = 0.5
    """Seconds before the second try."""
    max_requests: Annotated[int, Ge(0)] = 10_000
    """Requests that may be sent in the whole run, tries counted; what a resumed run sent before counts too."""
    max_tokens: Annotated[int, Ge(0)] = 20_000_000
    """Tokens that may be sent and asked for in the whole run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_variable):
            raise RecipeError(
                "the large model's key_variable is not a name of letters, digits and underscores: name the environment "
                "variable that holds the key, and put the key nowhere into a recipe"
            )
        if not self.is_remote:
            return
        parts = urlsplit(self.path)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RecipeError("the large model's address must begin with http:// or https:// and name a host")
        if parts.username or parts.password:
            raise RecipeError(f"the large model's address holds a password: put the key into ${self.key_variable}")
        if parts.query or parts.fragment:
            raise RecipeError(
                "the large model's address has something after ? or #: give it up to and with /v1, and put a key into "
                f"${self.key_variable}"
            )

    @property
    def is_remote(self) -> bool:
        """Whether it is asked over a network."""
        return "://" in self.path

    @property
    def local(self) -> ModelSpec:
        """A local one as models are named."""
        return ModelSpec(self.path, self.dtype, self.device, self.revision)
