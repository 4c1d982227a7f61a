"""The large model of a proxy, loaded or behind an API, and the proxy around it."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from kilofed.config.recipe import ModelSpec
from kilofed.errors import ModelError
from kilofed.models import loading
from kilofed.proxy.api_model import RemoteModel
from kilofed.proxy.combination import Difference, Rule
from kilofed.proxy.model import ProxyModel
from kilofed.proxy.spec import LargeSpec
from kilofed.proxy.vocabulary import common_vocabulary


@dataclass(frozen=True)
class LargeModel:
    """A large model that is loaded or reachable, with the number of tokens that it shares with the small one."""

    model: nn.Module | RemoteModel
    vocabulary: int | None
    """None: both models have as many, which was not checked."""

    def close(self) -> None:
        """End the connections to an API."""
        if isinstance(self.model, RemoteModel):
            self.model.close()

    def steer(self, tuned: nn.Module, base: nn.Module | None, rule: Rule) -> ProxyModel:
        """The large model, combined with `tuned` by `rule`; `base` None lies under the adapter of `tuned`."""
        return ProxyModel(self.model, tuned, base, rule, vocabulary=self.vocabulary)

    def unsteered(self, tuned: nn.Module, base: nn.Module | None, rule: Rule | None = None) -> nn.Module:
        """The large model by itself; where an API scores few tokens, a small model fills in the others.

        Args:
            rule: one that gives the large model alone; whether it has a base decides which small model fills in.
        """
        if isinstance(self.model, RemoteModel):
            return self.steer(tuned, base, rule or Difference(0.0))
        return self.model


def open_large_model(spec: LargeSpec, small: ModelSpec | None, folder: Path | None) -> LargeModel:
    """Load the large model, or open the way to its API.

    Args:
        small: what it is to be steered by; None takes it on trust that both have one tokeniser.
        folder: where an API's ledger and answers are kept; None keeps them in memory.

    Raises:
        ModelError: not available, or another tokeniser. RecipeError, RunError: as RemoteModel.
    """
    if not spec.is_remote:
        vocabulary = None
        if small is not None:
            vocabulary = common_vocabulary(loading.load_tokenizer(spec.local), loading.load_tokenizer(small))
        return LargeModel(loading.load_base(spec.local).requires_grad_(False), vocabulary)
    if small is None:
        raise ModelError("a large model behind an API needs the small model's tokeniser: name the small model")
    if not spec.name:
        raise ModelError(f"method.large.name is empty: say which model {spec.path} is to be asked for")
    model = RemoteModel(spec, loading.load_tokenizer(small), folder)
    return LargeModel(model, model.width)
