"""Bodies of requests in OpenAI's form, validated; what is refused is refused in OpenAI's form with the field named."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from kilofed.errors import DataError
from kilofed.generation.decoding import Sampling
from kilofed.serving.model import ServedModel
from kilofed.serving.validation import Refusal, check_name, num_prompts, read_messages, read_prompts, read_stops

SEEDS = 2**63
"""Seeds are from -2^63 to 2^63 - 1, as in OpenAI's API."""

COLDEST = 1e-6
"""Lowest temperature above 0; logits divided by less are no numbers in float32."""


@dataclass(frozen=True)
class Limits:
    """What one server takes on."""

    max_active: int = 8
    """Requests that are decoded in turns; each holds one cache."""
    max_waiting: int = 64
    """Requests that wait for a turn; one more is refused with 429."""
    max_body: int = 1 << 20
    """Bytes of a request."""
    timeout: float = 300.0
    """Seconds from a request's arrival to its answer's last byte."""
    max_choices: int = 128
    """Answers to one request: prompts times n."""
    max_logprobs: int = 128
    """Log-probabilities returned for each position; raise it to the vocabulary to return all."""


@dataclass(frozen=True)
class GenerationRequest:
    """One valid request."""

    is_chat: bool
    prompts: tuple[tuple[int, ...], ...]
    n: int
    """Answers to each prompt."""
    sampling: Sampling
    """With the seed of the first answer; the others' seeds follow it."""
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool
    echo: bool
    logprobs: bool
    """Whether each token is returned with its log-probability; `sampling` says how many others with it."""
    names_as_ids: bool
    """Tokens are named `token_id:17` instead of their text, which several tokens may share."""


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool = False


Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class _Body(BaseModel):
    """Fields of both APIs."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Probability | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-SEEDS, lt=SEEDS)] | None = None
    stop: JsonValue = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    # Taken only at the value at which they do nothing.
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    # Taken and not looked at.
    user: str | None = None
    metadata: JsonValue = None
    service_tier: JsonValue = None


class _TextBody(_Body):
    """`/v1/completions`."""

    prompt: JsonValue
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0)] | None = None
    best_of: int | None = None
    suffix: str | None = None
    return_tokens_as_token_ids: bool | None = None


class _ChatBody(_Body):
    """`/v1/chat/completions`."""

    messages: JsonValue
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    return_tokens_as_token_ids: bool | None = None
    response_format: JsonValue = None
    tools: list[JsonValue] | None = None
    tool_choice: JsonValue = None
    store: Literal[False] | None = None


def read_completion_request(body: bytes, served: ServedModel, limits: Limits, seed: int) -> GenerationRequest:
    """The request of `/v1/completions`.

    Args:
        seed: taken where the request names none.

    Raises:
        Refusal: malformed JSON, an unknown field, a wrong type, or more than the model or `limits` allow.
    """
    asked = _read(_TextBody, body)
    _check_common(asked, served, limits)
    _only(asked.best_of in (None, asked.n or 1), "best_of", "other than n")
    _only(not asked.suffix, "suffix")
    n = _choices(asked.n, num_prompts(asked.prompt), limits)  # Before time is spent on encoding them.
    prompts = read_prompts(asked.prompt, served)
    wanted = 16 if asked.max_tokens is None else asked.max_tokens
    if wanted == 0 and not asked.echo:
        raise Refusal("max_tokens is 0, which only says something with echo: true", param="max_tokens")
    _check_room([len(prompt) for prompt in prompts], wanted, served, ("prompt", "max_tokens"))
    return GenerationRequest(
        is_chat=False,
        prompts=tuple(tuple(prompt) for prompt in prompts),
        n=n,
        sampling=_sampling(asked, wanted, asked.logprobs or 0, limits, "logprobs", seed),
        stops=read_stops(asked.stop),
        stream=bool(asked.stream),
        include_usage=bool(asked.stream_options and asked.stream_options.include_usage),
        echo=bool(asked.echo),
        logprobs=asked.logprobs is not None,
        names_as_ids=bool(asked.return_tokens_as_token_ids),
    )


def read_chat_request(body: bytes, served: ServedModel, limits: Limits, seed: int) -> GenerationRequest:
    """The request of `/v1/chat/completions`; arguments and errors as in `read_completion_request`."""
    asked = _read(_ChatBody, body)
    _check_common(asked, served, limits)
    _only(asked.response_format in (None, {"type": "text"}), "response_format", "other than text")
    _only(not asked.tools, "tools")
    _only(asked.tool_choice in (None, "none", "auto"), "tool_choice")
    if asked.top_logprobs and not asked.logprobs:
        raise Refusal("top_logprobs needs logprobs: true", param="top_logprobs")
    try:
        ids = served.conversation_ids(read_messages(asked.messages))
    except DataError as error:
        raise Refusal(str(error), param="messages") from error
    field = "max_tokens" if asked.max_completion_tokens is None else "max_completion_tokens"
    wanted = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
    if wanted == 0:
        raise Refusal("max_tokens is 0; expected at least 1", param="max_tokens")
    _check_room([len(ids)], wanted or 1, served, ("messages", field))
    return GenerationRequest(
        is_chat=True,
        prompts=(tuple(ids),),
        n=_choices(asked.n, 1, limits),
        sampling=_sampling(
            asked, wanted or served.generator.context - len(ids), asked.top_logprobs or 0, limits, "top_logprobs", seed
        ),
        stops=read_stops(asked.stop),
        stream=bool(asked.stream),
        include_usage=bool(asked.stream_options and asked.stream_options.include_usage),
        echo=False,
        logprobs=bool(asked.logprobs),
        names_as_ids=bool(asked.return_tokens_as_token_ids),
    )


Kind = TypeVar("Kind", bound=_Body)


def _read(kind: type[Kind], body: bytes) -> Kind:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        words = [str(word) for word in first["loc"]]
        path = "".join(f"[{word}]" if word.isdigit() else f".{word}" for word in words).removeprefix(".")
        if first["type"] == "json_invalid":
            raise Refusal(f"the body is not JSON ({first['msg']})", code="invalid_json") from error
        if first["type"] == "missing":
            raise Refusal(f"{path} is missing", param=path, code="missing") from error
        if first["type"] == "extra_forbidden":
            raise Refusal(f"{path} is not known here: leave it out", param=path, code="unknown_parameter") from error
        raise Refusal(f"{path or 'the body'}: {_said(first['msg'])}", param=path or None) from error


def _said(message: str) -> str:
    """`Input should be a valid integer` as part of a sentence."""
    return message.removeprefix("Input ").replace("should be", "must be")


def _check_common(asked: _Body, served: ServedModel, limits: Limits) -> None:
    check_name(asked.model, served)
    _only(not asked.presence_penalty, "presence_penalty", "other than 0")
    _only(not asked.frequency_penalty, "frequency_penalty", "other than 0")
    _only(not asked.logit_bias, "logit_bias")


def _only(held: bool, field: str, what: str = "") -> None:
    if not held:
        raise Refusal(
            f"{field}{' ' * bool(what)}{what} is not supported: leave it out", param=field, code="unsupported"
        )


def _choices(n: int | None, prompts: int, limits: Limits) -> int:
    n = n or 1
    if n * prompts > limits.max_choices:
        field, seen = ("n", n) if n > 1 else ("prompt", prompts)
        raise Refusal(
            f"{field}: {seen} is too many; {prompts} prompts times n may give at most {limits.max_choices} answers",
            param=field,
        )
    return n


def _sampling(asked: _Body, wanted: int, num: int, limits: Limits, field: str, seed: int) -> Sampling:
    if num > limits.max_logprobs:
        raise Refusal(f"{field} is {num}; this server returns at most {limits.max_logprobs}", param=field)
    if asked.temperature is not None and 0 < asked.temperature < COLDEST:
        raise Refusal(f"temperature is {asked.temperature:g}; expected 0 or at least {COLDEST:g}", param="temperature")
    return Sampling(
        max_new_tokens=wanted,
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        seed=seed if asked.seed is None else asked.seed,
        num_logprobs=num,
    )


def _check_room(lengths: Sequence[int], wanted: int, served: ServedModel, fields: tuple[str, str]) -> None:
    """Raise Refusal where a prompt or a prompt with the answer does not fit the context."""
    context, longest = served.generator.context, max(lengths)
    if min(lengths) == 0:
        raise Refusal(f"{fields[0]} has no tokens", param=fields[0])
    room = context if wanted == 0 else context - 1
    if longest > room:
        raise Refusal(
            f"{fields[0]} has {longest} tokens; this model's context is {context} tokens, prompt and answer together",
            param=fields[0],
            code="context_length_exceeded",
        )
    if longest + wanted > context:
        raise Refusal(
            f"{fields[1]} is {wanted}, and with a prompt of {longest} tokens that is more than this model's context "
            f"of {context}: ask for at most {context - longest}",
            param=fields[1],
            code="context_length_exceeded",
        )
