"""Where next-token logits come from: token ids and a cache in, raw logits out, of one model or of two at once.

A small model with and without its LoRA adapter gives two sets of logits in one batched forward: the base's weights are
read once for both.
"""

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from kilofed.errors import ModelError
from kilofed.generation.decoding import UNBOUNDED
from kilofed.models.loading import without_adapter

Forward = Callable[[Tensor], Tensor]
Route = Callable[[nn.Module], Forward | None]


@dataclass(frozen=True)
class ForwardInputs:
    """The inputs of one forward: B rows, T new positions after P cached ones."""

    input_ids: Tensor
    """(B, T)"""
    attention_mask: Tensor | None = None
    """(B, P + T), 0 at padding; None where nothing is padded."""
    position_ids: Tensor | None = None
    """(B, T); None lets each model count."""
    keep: int | Tensor = 0
    """The last so many positions, 0 for all, or (K,) which ones."""


class LogitSource(Protocol):
    """One or more models with one cache."""

    context: int
    """Longest sequence in tokens."""
    width: int
    """Width of the logits."""
    copies: int
    """How often its cache holds the batch."""
    has_all_logits: bool
    """False: logits are log-probabilities of the likeliest tokens, and -inf at all others."""

    def new_cache(self) -> Cache:
        """An empty cache."""

    def logits(self, inputs: ForwardInputs, cache: Cache | None) -> tuple[Tensor, ...]:
        """(B, K, width) logits of each model; `cache` is extended."""


class ModelSource:
    """A transformers model, with an adapter or without."""

    copies = 1
    has_all_logits = True

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        inner = getattr(module, "get_base_model", None)
        self._inner = cast(nn.Module, inner() if inner else module)
        self.config = cast(PreTrainedConfig, self._inner.config)
        self._accepts = set(inspect.signature(self._inner.forward).parameters)
        self.context = int(getattr(self.config, "max_position_embeddings", 0) or UNBOUNDED)
        self.width = int(self.config.vocab_size)
        # PEFT's own forward only walks all modules to find that there is nothing to do.
        self._called = self._inner if plain_lora(module) else module

    @property
    def device(self) -> torch.device:
        """Where the model's first weight lies."""
        return next(self.module.parameters()).device

    def new_cache(self) -> Cache:
        """An empty cache of the model's own shape."""
        return DynamicCache(config=self.config)

    def logits(self, inputs: ForwardInputs, cache: Cache | None) -> tuple[Tensor, ...]:
        """See LogitSource."""
        return (self._forward(inputs, cache),)

    def _forward(self, inputs: ForwardInputs, cache: Cache | None) -> Tensor:
        device = self.device
        more: dict[str, Tensor | int | Cache] = {}
        if inputs.attention_mask is not None:
            more["attention_mask"] = inputs.attention_mask.to(device)
        if inputs.position_ids is not None and "position_ids" in self._accepts:
            more["position_ids"] = inputs.position_ids.to(device)
        if cache is not None:
            more["past_key_values"] = cache
        partly = "logits_to_keep" in self._accepts
        if partly:
            more["logits_to_keep"] = inputs.keep
        logits = cast(
            Tensor, self._called(input_ids=inputs.input_ids.to(device), use_cache=cache is not None, **more).logits
        )
        return logits if partly else kept(logits, inputs.keep)


class BaseSource(ModelSource):
    """The base model inside a model with an adapter."""

    def logits(self, inputs: ForwardInputs, cache: Cache | None) -> tuple[Tensor, ...]:
        """See LogitSource."""
        with without_adapter(self.module):
            return (self._forward(inputs, cache),)


class SharedForwardPair(ModelSource):
    """Two sets of logits, (tuned, base): a model with a LoRA adapter, and the same without it, in one forward of 2 B rows.

    Raises:
        ModelError: the adapter is not plain LoRA on linear layers; `TwoForwardPair` serves any other.
    """

    copies = 2

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        layers = plain_lora(module)
        if layers is None:
            raise ModelError("only plain LoRA on linear layers can share a forward with its base: use two forwards")
        self._layers = layers
        # The layers are routed for the length of a forward; two threads must not meet in there.
        self._lock = threading.Lock()
        self.tuned = _SharedForwardPart(self, lambda layer: None)
        self.base = _SharedForwardPart(self, lambda layer: cast(Forward, layer.base_layer))

    def logits(self, inputs: ForwardInputs, cache: Cache | None) -> tuple[Tensor, ...]:
        """See LogitSource."""
        rows = inputs.input_ids.shape[0]
        mask, positions = (
            _twice(t, rows) if t is not None else None for t in (inputs.attention_mask, inputs.position_ids)
        )
        doubled = ForwardInputs(_twice(inputs.input_ids, rows), mask, positions, inputs.keep)
        with self._lock, _routed(self._layers, lambda layer: _on_first_half(layer, rows)):
            logits = self._forward(doubled, cache)
        return logits[:rows], logits[rows:]


class _SharedForwardPart(ModelSource):
    """One of two pair, without PEFT's walk over every module."""

    def __init__(self, pair: SharedForwardPair, route: Route) -> None:
        super().__init__(pair.module)
        self._pair, self._route = pair, route

    def logits(self, inputs: ForwardInputs, cache: Cache | None) -> tuple[Tensor, ...]:
        with self._pair._lock, _routed(self._pair._layers, self._route):
            return (self._forward(inputs, cache),)


class TwoForwardPair:
    """Two sets of logits, (tuned, base), in two forwards."""

    copies = 1
    has_all_logits = True

    def __init__(self, tuned: ModelSource, base: ModelSource) -> None:
        self.tuned, self.base = tuned, base
        self.context = min(tuned.context, base.context)
        self.width = min(tuned.width, base.width)

    def new_cache(self) -> Cache:
        """An empty cache for both."""
        return JointCache([self.tuned.new_cache(), self.base.new_cache()], [1, 1])

    def logits(self, inputs: ForwardInputs, cache: Cache | None) -> tuple[Tensor, ...]:
        """See LogitSource."""
        first, second = cache.parts if isinstance(cache, JointCache) else (None, None)
        return *self.tuned.logits(inputs, first), *self.base.logits(inputs, second)


class JointCache(Cache):
    """The caches of several models as one: all grow, are cropped and reordered together.

    Args:
        parts: one per model.
        copies: how often each part holds the batch: 2 for `SharedForwardPair`, whose rows are the batch twice.
    """

    def __init__(self, parts: list[Cache], copies: list[int]) -> None:
        super().__init__(layers=[layer for part in parts for layer in part.layers])
        self.parts = parts
        self.copies = copies

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in another order, as beam search wants."""
        for part, copies in zip(self.parts, self.copies, strict=True):
            rows = _num_rows(part) // copies
            chosen = torch.cat([beam_idx + rows * copy for copy in range(copies)])
            part.reorder_cache(cast(torch.LongTensor, chosen))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows only."""
        for part, copies in zip(self.parts, self.copies, strict=True):
            rows = _num_rows(part) // copies
            part.batch_select_indices(torch.cat([indices + rows * copy for copy in range(copies)]))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        for part in self.parts:
            part.batch_repeat_interleave(repeats)


def small_source(tuned: nn.Module, base: nn.Module | None, *, needs_base: bool) -> LogitSource:
    """The logits of the small model: tuned alone, or tuned and base in as few forwards as can be.

    Args:
        base: None takes the model under the adapter of `tuned`.

    Raises:
        ModelError: a base is needed, and `tuned` has no adapter to look under.
    """
    if not needs_base:
        return ModelSource(tuned)
    if base is not None and base is not tuned:
        return TwoForwardPair(ModelSource(tuned), ModelSource(base))
    if getattr(tuned, "disable_adapter", None) is None:
        raise ModelError("the tuned small model has no adapter, so its base is not inside it: give the base too")
    return SharedForwardPair(tuned) if plain_lora(tuned) else TwoForwardPair(ModelSource(tuned), BaseSource(tuned))


def plain_lora(module: nn.Module) -> "list[nn.Module] | None":
    """The LoRA layers of `module` if LoRA on linear layers is all that differs from the base; else None."""
    from peft.tuners.lora.layer import Linear, LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers = [part for part in module.modules() if isinstance(part, LoraLayer)]
    others = [
        part
        for part in module.modules()
        if isinstance(part, AuxiliaryTrainingWrapper | BaseTunerLayer) and not isinstance(part, LoraLayer)
    ]
    plain = all(
        type(layer) is Linear
        and len(layer.active_adapters) == 1
        and not layer.merged
        and not layer.disable_adapters
        and not layer.lora_variant
        and not any(layer.lora_bias.values())
        for layer in layers
    )
    return layers if layers and plain and not others else None


def can_crop(cache: Cache) -> bool:
    """Whether every layer can give back its last positions: full attention can, windows and recurrent states cannot."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def kept(logits_BTV: Tensor, keep: int | Tensor) -> Tensor:
    """The positions that `keep` names; see ForwardInputs."""
    if isinstance(keep, Tensor):
        return logits_BTV[:, keep.to(logits_BTV.device)]
    return logits_BTV[:, -keep:] if keep else logits_BTV


@contextmanager
def _routed(layers: list[nn.Module], route: Route) -> Iterator[None]:
    """Let each layer answer with `route(layer)` for the length of the block; None leaves it its own way."""
    for layer in layers:
        if (forward := route(layer)) is not None:
            layer.__dict__["forward"] = forward
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _on_first_half(layer: nn.Module, rows: int) -> Forward:
    """The LoRA layer's forward with the adapter on the first `rows` rows and the base alone on the others."""
    name = str(layer.active_adapters[0])  # type: ignore[index]
    base, scale = cast(nn.Module, layer.base_layer), float(layer.scaling[name])  # type: ignore[index]
    if name not in layer.lora_A:  # type: ignore[operator]
        return cast(Forward, base)
    parts = (layer.lora_A, layer.lora_B, layer.lora_dropout)
    down, up, drop = (cast(nn.ModuleDict, part)[name] for part in parts)
    kind = next(down.parameters()).dtype

    def forward(x: Tensor) -> Tensor:
        if x.shape[0] % (2 * rows):
            raise ModelError("a layer of this model mixes rows: its adapter and its base cannot share a forward")
        half = x.shape[0] // 2
        out = cast(Tensor, base(x))
        out[:half] += (up(down(drop(x[:half].to(kind)))) * scale).to(out.dtype)
        return out

    return forward


def _twice(tensor: Tensor, rows: int) -> Tensor:
    whole = tensor.expand(rows, -1)  # Positions of an unpadded batch may come as one row for all.
    return torch.cat([whole, whole])


def _num_rows(cache: Cache) -> int:
    keys = [keys for layer in cache.layers if isinstance(keys := getattr(layer, "keys", None), Tensor)]
    return len(keys[0])
