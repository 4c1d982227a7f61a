"""How the next token is chosen, and what every model that generates text must be able to do.

Every generator (a model alone, a proxy of several) takes its tokens from `choose`, so that the same logits, the same
sampling and the same seed give the same token everywhere.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from kilofed.errors import ModelError

UNBOUNDED = 1 << 20
"""Context of a model whose config names none, in tokens."""
ROWS_AT_ONCE = 256
"""Positions that `ModelGenerator.score` takes through the output head at once."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    max_new_tokens: int = 128
    """Longest answer in tokens, the end token counted."""
    temperature: float = 0.0
    """0 takes the likeliest token; above 0 the logits are divided by it before one is drawn."""
    top_p: float = 1.0
    """Only the smallest set of likeliest tokens that holds this share, 0 to 1, is drawn from (Holtzman et al. 2020)."""
    seed: int = 0
    """Of the draws; has no effect at temperature 0."""
    num_logprobs: int = 0
    """How many of the likeliest tokens each position returns, with their log-probabilities."""


class Token(NamedTuple):
    """One token and what the model thought of it."""

    id: int
    logprob: float
    """Natural logarithm of its probability at temperature 1 among all tokens, whatever the sampling; <= 0."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens and their log-probabilities, likeliest first."""


@runtime_checkable
class TokenGenerator(Protocol):
    """A model that continues a text and scores one."""

    context: int
    """Most tokens of prompt and answer together."""
    end_ids: frozenset[int]
    """Tokens that end an answer."""

    def generate_tokens(self, prompt_ids: Sequence[int], sampling: Sampling) -> Iterator[Token]:
        """The answer's tokens, each computed when it is asked for.

        Ends after a token of `end_ids` (which is given out too), after `max_new_tokens`, or where the context is full.
        Several iterators of one generator may be advanced in turns by one thread; none sees the other.

        Raises:
            ModelError: at the first token, for an empty prompt or one that fills the context.
        """

    def score(self, ids: Sequence[int], num_logprobs: int = 0) -> list[Token | None]:
        """What the model thinks of each of `ids` after those before it; the first has nothing before it and is None.

        Raises:
            ModelError: no ids, or more than the context holds.
        """


class ModelGenerator:
    """A single transformers causal language model, one prompt at a time with its own cache."""

    def __init__(self, model: nn.Module, end_ids: Collection[int]) -> None:
        self.model = model
        self.end_ids = frozenset(end_ids)
        self.context = context_of(model)

    def generate_tokens(self, prompt_ids: Sequence[int], sampling: Sampling) -> Iterator[Token]:
        """As `TokenGenerator.generate_tokens`."""
        check_prompt(prompt_ids, self.context)
        generator = torch.Generator().manual_seed(sampling.seed)
        ids, cache = list(prompt_ids), None
        for _ in range(min(sampling.max_new_tokens, self.context - len(ids))):
            logits_V, cache = self._step(ids, cache)
            token = choose(logits_V, sampling, generator)
            yield token
            if token.id in self.end_ids:
                return
            ids = [token.id]

    @torch.inference_mode()
    def score(self, ids: Sequence[int], num_logprobs: int = 0) -> list[Token | None]:
        """As `TokenGenerator.score`."""
        check_prompt(ids, self.context + 1)
        tokens: list[Token | None] = [None]
        cache: object = None
        for start in range(0, len(ids) - 1, ROWS_AT_ONCE):
            part = ids[start : min(start + ROWS_AT_ONCE, len(ids) - 1)]
            out = self.model(input_ids=self._row(part), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            following = ids[start + 1 : start + 1 + len(part)]
            tokens += [
                as_token(logits_V, i, num_logprobs) for logits_V, i in zip(out.logits[0], following, strict=True)
            ]
        return tokens

    # Not around `generate_tokens`: between two tokens of a generator the mode would hold for the caller.
    @torch.inference_mode()
    def _step(self, ids: Sequence[int], cache: object) -> tuple[Tensor, object]:
        out = self.model(input_ids=self._row(ids), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[0, -1], out.past_key_values

    def _row(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(ids)], device=next(self.model.parameters()).device)


def choose(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> Token:
    """The next token: the likeliest at temperature 0, else a draw after temperature, then top_p.

    Its log-probabilities are those of `logits_V` at temperature 1, before top_p.

    Args:
        logits_V: (vocabulary,), any float dtype and device; minus infinity rules a token out.
        generator: on the CPU; advanced by one draw where temperature is above 0, else untouched.

    Raises:
        ModelError: a logit is NaN, or none is finite.
    """
    logits_V = logits_V.detach().to("cpu", torch.float32)
    if sampling.temperature == 0:
        chosen = int(logits_V.argmax())
    else:
        shares_V = probabilities(logits_V, sampling)
        if not bool(torch.isfinite(shares_V).all()):
            raise ModelError(
                "the model gave logits that are not numbers: its weights are damaged or overflow their dtype"
            )
        chosen = int(torch.multinomial(shares_V, 1, generator=generator))
    return as_token(logits_V, chosen, sampling.num_logprobs)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that `choose` draws from at a temperature above 0.

    Args:
        logits: (..., vocabulary).

    Returns:
        float32, (..., vocabulary); each row sums to 1, exactly 0 outside top_p.
    """
    logits = logits.to(torch.float32)
    # The largest becomes 0, so that no temperature can overflow.
    shares = torch.softmax((logits - logits.amax(-1, keepdim=True)) / sampling.temperature, -1)
    if sampling.top_p >= 1:
        return shares
    ordered, order = shares.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    before[..., 0] = -1.0  # The likeliest token always stays.
    kept = torch.where(before < sampling.top_p, ordered, 0.0)
    return torch.zeros_like(shares).scatter(-1, order, kept / kept.sum(-1, keepdim=True))


def as_token(logits_V: Tensor, chosen: int, num_logprobs: int) -> Token:
    """Token number `chosen` with its log-probability and the `num_logprobs` likeliest, in float32 at temperature 1.

    Raises:
        ModelError: a logit is NaN, or none is finite.
    """
    logprobs_V = torch.log_softmax(logits_V.to(torch.float32), -1)
    logprob = float(logprobs_V[chosen])
    if logprob != logprob:
        raise ModelError("the model gave logits that are not numbers: its weights are damaged or overflow their dtype")
    if not num_logprobs:
        return Token(chosen, logprob)
    values, ids = logprobs_V.topk(min(num_logprobs, len(logprobs_V)))
    return Token(chosen, logprob, tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def check_prompt(prompt_ids: Sequence[int], context: int) -> None:
    """Raise ModelError unless there is a token and room for one more."""
    if not prompt_ids:
        raise ModelError("the prompt has no tokens; give at least one, such as the tokeniser's first token")
    if len(prompt_ids) >= context:
        raise ModelError(
            f"the prompt has {len(prompt_ids)} tokens and the model's context is {context}: "
            "shorten it to leave room for an answer"
        )


def context_of(model: nn.Module) -> int:
    """Most tokens that `model` (transformers, with or without an adapter) can read at once."""
    config = model.config
    text = getattr(config, "get_text_config", lambda: config)()
    return int(getattr(text, "max_position_embeddings", None) or UNBOUNDED)


def end_ids_of(model: nn.Module, tokenizer_end: int | None) -> frozenset[int]:
    """Tokens that end an answer: the tokeniser's end token and those of the model's generation config."""
    config = getattr(model, "generation_config", None)
    named = getattr(config, "eos_token_id", None)
    more = named if isinstance(named, list | tuple) else [named]
    return frozenset(int(token) for token in (tokenizer_end, *more) if token is not None)
