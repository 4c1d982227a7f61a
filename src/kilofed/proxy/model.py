"""A large model steered by small ones, as one causal language model (proxy-tuning, Liu et al. 2024, arXiv:2401.08565).

`ProxyModel` is a transformers model: `forward`, `generate`, left padding, KV caches of all parts, beams. The large model
is a black box: only its next-token scores are used.
"""

from collections.abc import Iterator, Sequence
from typing import Never, cast

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from kilofed.errors import ModelError
from kilofed.generation.decoding import UNBOUNDED, ModelGenerator, Sampling, Token, check_prompt, end_ids_of
from kilofed.proxy.api_model import RemoteModel
from kilofed.proxy.combination import Difference, Rule, complete
from kilofed.proxy.logit_sources import (
    ForwardInputs,
    JointCache,
    LogitSource,
    ModelSource,
    SharedForwardPair,
    TwoForwardPair,
    can_crop,
    small_source,
)
from kilofed.proxy.speculation import Drafting, Speculation
from kilofed.proxy.vocabulary import common_width


class ProxyModel(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """Next-token scores = rule(large, tuned, base); with `Difference`, large + alpha (tuned - base).

    Args:
        large: the model that is steered: a transformers causal model, or one behind an API.
        tuned: the small tuned model.
        base: the small model before tuning; None takes what lies under the adapter of `tuned`, and the two then share
            one batched forward. Not used by rules without a base.
        rule: how scores become one; see `kilofed.proxy.combination`.
        drafting: how far the small tuned model runs ahead in `generate_tokens`; `Drafting(longest=0)` drafts none.
        vocabulary: number of real tokens (`vocabulary.common_vocabulary`); logits are cut to it. None takes the width
            that all models have.

    Raises:
        ModelError: the models' widths differ or are below `vocabulary`; a base is needed and there is none.
    """

    config_class = PreTrainedConfig
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(
        self,
        large: nn.Module | RemoteModel,
        tuned: nn.Module,
        base: nn.Module | None = None,
        rule: Rule | None = None,
        *,
        drafting: Drafting | None = None,
        vocabulary: int | None = None,
    ) -> None:
        rule = rule or Difference()
        first = large if isinstance(large, RemoteModel) else ModelSource(large)
        sources = first, small_source(tuned, base, needs_base=rule.needs_base)
        width = common_width({"large": sources[0].width, "small": sources[1].width}, vocabulary)
        own = tuned if isinstance(large, RemoteModel) else large
        super().__init__(_config(ModelSource(own).config, width, min(source.context for source in sources)))
        self.rule = rule
        self.drafting = drafting or Drafting()
        self.width = width
        self.context = min(source.context for source in sources)
        self.large, self.tuned = large, tuned
        self.base = base if base is not tuned else None
        self.large_source: LogitSource = sources[0]
        self.small_source: LogitSource = sources[1]
        self.end_ids = end_ids_of(own, self.config.eos_token_id)
        self.cost_ratio = 0.05 if isinstance(large, RemoteModel) else _num_parameters(tuned) / _num_parameters(large)
        """What one forward of the small model costs in forwards of the large one, by their sizes; a guess for an API."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        tokenizer: object = None,
    ) -> CausalLMOutputWithPast:
        """The joint model's raw logits, float32.

        Args:
            input_ids: (B, T).
            attention_mask: (B, P + T) where P positions are cached; 0 at padding.
            position_ids: (B, T).
            past_key_values: what an earlier call gave; extended in place.
            use_cache: give a cache back; False takes none.
            logits_to_keep: the last so many positions (0 all), or (K,) which ones.
            return_dict: ignored; a dict-like output is always given.
            tokenizer: ignored; `generate` hands on what it checks stop strings with.

        Returns:
            .logits (B, K, vocabulary) and .past_key_values.

        Raises:
            ModelError: the sequence is longer than the context of one of the models.
        """
        cache = past_key_values if past_key_values is not None or not use_cache else self.new_cache()
        length = input_ids.shape[1] + (cache.get_seq_length() if cache is not None else 0)
        self._refuse_longer(length)
        inputs = ForwardInputs(input_ids, attention_mask, position_ids, logits_to_keep)
        first, second = cache.parts if isinstance(cache, JointCache) else (None, None)
        (large,) = self.large_source.logits(inputs, first)
        scores = self.joint_logits(large, *self.small_source.logits(inputs, second))
        return CausalLMOutputWithPast(logits=cast(torch.FloatTensor, scores), past_key_values=cache)

    def joint_logits(self, large: Tensor, tuned: Tensor, base: Tensor | None = None) -> Tensor:
        """The rule on logits of any widths and dtypes: (..., vocabulary), float32, where the large model's lie."""
        if not self.large_source.has_all_logits:
            known, others = large[..., : self.width], tuned if base is None else base
            large = complete(known, others[..., : self.width].to(large.device, torch.float32))
        parts = [
            part[..., : self.width].to(large.device, torch.float32)
            for part in (large, tuned, base)
            if part is not None
        ]
        return self.rule(parts[0], parts[1], parts[2] if len(parts) > 2 else parts[0])

    def new_cache(self) -> JointCache:
        """An empty cache for all parts."""
        sources = self.large_source, self.small_source
        return JointCache([source.new_cache() for source in sources], [source.copies for source in sources])

    def separate(self) -> tuple[LogitSource, LogitSource | None]:
        """The small model's sources one by one, for loops in which they are not in sync: tuned, and base if there is one."""
        small = self.small_source
        return (small.tuned, small.base) if isinstance(small, SharedForwardPair | TwoForwardPair) else (small, None)

    def generate_tokens(self, prompt_ids: Sequence[int], sampling: Sampling) -> Iterator[Token]:
        """As TokenGenerator.generate_tokens, several tokens per forward of the large model where drafts stand.

        Greedy tokens are those of one at a time but for ties within rounding; draws have the same distribution, not
        the same values.
        """
        check_prompt(prompt_ids, self.context)
        checks_several = not isinstance(self.large, RemoteModel) or self.large.checks_several
        if self.drafting.longest and checks_several and can_crop(self.new_cache()):
            yield from Speculation(self, sampling, self.drafting).tokens(prompt_ids)
        else:
            yield from ModelGenerator(self, self.end_ids).generate_tokens(prompt_ids, sampling)

    def score(self, ids: Sequence[int], num_logprobs: int = 0) -> list[Token | None]:
        """As TokenGenerator.score."""
        return ModelGenerator(self, self.end_ids).score(ids, num_logprobs)

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, object],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> bool:
        # transformers would make the cache of one model.
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache:
            model_kwargs["past_key_values"] = self.new_cache()
        return False  # What transformers reads from this is nothing.

    def train(self, mode: bool = True) -> "ProxyModel":
        """Nothing: a proxy is not trained, and its parts are not its own to switch."""
        return self

    def save_pretrained(self, *_: object, **__: object) -> Never:
        """Refused: a proxy is a large model that is not ours and small ones that are."""
        raise ModelError("a proxy has no weights of its own: save the small tuned model")

    def _refuse_longer(self, length: int) -> None:
        if length > self.context:
            shorter = "large" if self.large_source.context == self.context else "small"
            raise ModelError(
                f"{length} tokens are more than the {self.context} that the {shorter} model's context holds: "
                "shorten the prompt or the answer"
            )


def _config(large: PreTrainedConfig, width: int, context: int) -> PreTrainedConfig:
    """What `generate` asks a config for."""
    config = PreTrainedConfig()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(large, name, None))
    config.vocab_size = width
    if context < UNBOUNDED:
        config.max_position_embeddings = context
    return config


def _num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
