"""The large model of a proxy as a run names it: a local one, or one behind an API; and the proxy around it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from kilofed.config.recipe import Dtype, ModelSpec
from kilofed.errors import ModelError
from kilofed.models import loading
from kilofed.proxy.api import RemoteSpec
from kilofed.proxy.api_model import RemoteModel
from kilofed.proxy.combination import Offset
from kilofed.proxy.model import ProxyModel
from kilofed.proxy.vocabulary import common_vocabulary


@dataclass(frozen=True)
class LargeSpec:
    """The large model that is steered; the server alone loads or asks it."""

    path: str = "builtin:large"
    """`builtin:large`, a local directory, a hub id, or the address of an OpenAI-compatible API, such as
    http://127.0.0.1:8000/v1, which is then asked and never loaded."""
    dtype: Dtype = "float32"
    """Dtype of its weights (a local model)."""
    device: str = "cpu"
    """Where it runs (a local model)."""
    revision: str = ""
    """Branch, tag or commit of a hub id."""
    name: str = ""
    """The model's name at the API; from here on the fields are for an API."""
    top_k: int = 20
    """Likeliest tokens told per position; more tell more of the large model and cost more bytes."""
    key_variable: str = "KILOFED_API_KEY"
    """Environment variable with the key; unset or empty sends none."""
    scoring: Literal["echo", "steps"] = "echo"
    """echo: one prompt scores all its positions; steps: one prompt per position, for an API that cannot echo."""
    prompts: Literal["ids", "text"] = "ids"
    """How prompts are sent."""
    names: Literal["ids", "text"] = "ids"
    """How the API names tokens: as `token_id:17`, or by their text."""
    context: int = 0
    """Longest sequence in tokens; 0 leaves it to the API to refuse."""
    timeout: float = 60.0
    """Seconds without a byte after which a try is given up."""
    max_requests: int = 10_000
    """Requests in the whole run; what a resumed run sent before counts too."""
    max_tokens: int = 20_000_000
    """Tokens in the whole run."""

    @property
    def is_remote(self) -> bool:
        """Whether it is asked over a network."""
        return self.path.startswith(("http://", "https://"))

    @property
    def local(self) -> ModelSpec:
        """A local one as models are named."""
        return ModelSpec(self.path, self.dtype, self.device, self.revision)


@dataclass(frozen=True)
class Large:
    """A large model that is at hand, with the number of words that it shares with the small one."""

    model: nn.Module | RemoteModel
    words: int | None
    """None: both models have as many, which was not looked into."""

    def close(self) -> None:
        """End the connections to an API."""
        if isinstance(self.model, RemoteModel):
            self.model.close()

    def steer(self, tuned: nn.Module, base: nn.Module | None, alpha: float) -> ProxyModel:
        """The large model, steered by `tuned`; `base` None lies under the adapter of `tuned`."""
        return ProxyModel(self.model, tuned, base, Offset(alpha), vocabulary=self.words)

    def alone(self, tuned: nn.Module, base: nn.Module | None) -> nn.Module:
        """The large model by itself; where an API tells of few tokens, the base fills in the others."""
        return self.steer(tuned, base, 0.0) if isinstance(self.model, RemoteModel) else self.model


def open_large(spec: LargeSpec, small: ModelSpec | None, folder: Path | None) -> Large:
    """Load the large model, or open the way to its API.

    Args:
        small: what it is to be steered by; None takes it on trust that both have one tokeniser.
        folder: where an API's ledger and answers are kept; None keeps them in memory.

    Raises:
        ModelError: not to be had, or another tokeniser. RecipeError, RunError: as RemoteModel.
    """
    if not spec.is_remote:
        words = None
        if small is not None:
            words = common_vocabulary(loading.load_tokenizer(spec.local), loading.load_tokenizer(small))
        return Large(loading.load_base(spec.local).requires_grad_(False), words)
    if small is None:
        raise ModelError("a large model behind an API needs the small model's tokeniser: name the small model")
    if not spec.name:
        raise ModelError(f"method.large.name is empty: say which model {spec.path} is to be asked for")
    remote = RemoteSpec(
        spec.path,
        spec.name,
        top_k=spec.top_k,
        key_variable=spec.key_variable,
        scoring=spec.scoring,
        prompts=spec.prompts,
        names=spec.names,
        timeout=spec.timeout,
        max_requests=spec.max_requests,
        max_tokens=spec.max_tokens,
    )
    model = RemoteModel(remote, loading.load_tokenizer(small), folder, context=spec.context)
    return Large(model, model.width)
