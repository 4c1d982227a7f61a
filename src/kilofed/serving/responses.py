"""Responses: whole answers and streamed chunks in the forms of OpenAI's two APIs."""

import json
import math
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from kilofed.generation.decoding import Token
from kilofed.generation.detokenizer import PlacedToken
from kilofed.serving.model import ServedModel
from kilofed.serving.requests import GenerationRequest
from kilofed.serving.steps import Step

LEAST_LOGPROB = -9999.0
"""Returned for minus infinity, which JSON does not know."""

Json = dict[str, object]


@dataclass
class Completion:
    """The answers to one request, as far as they have come. Changed by `add`."""

    served: ServedModel
    request: GenerationRequest
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    num_generated: int = 0
    """Tokens of all answers, end tokens counted."""

    def __post_init__(self) -> None:
        count = self.request.n * len(self.request.prompts)
        self.id = ("chatcmpl-" if self.request.is_chat else "cmpl-") + uuid.uuid4().hex
        self._texts: list[list[str]] = [[] for _ in range(count)]
        self._tokens: list[list[Step]] = [[] for _ in range(count)]
        self._ends: list[str | None] = [None] * count
        self._begun: set[int] = set()

    @property
    def usage(self) -> Json:
        """Tokens read and written; a prompt counts once, whatever n is."""
        asked = sum(map(len, self.request.prompts))
        total = asked + self.num_generated
        return {"prompt_tokens": asked, "completion_tokens": self.num_generated, "total_tokens": total}

    def add(self, step: Step) -> None:
        """Take in what has come, for `whole`."""
        self.num_generated += step.piece.num_new
        self._texts[step.index].append(step.piece.text)
        if self.request.logprobs:
            self._tokens[step.index].append(step)
        self._ends[step.index] = step.piece.finish_reason or self._ends[step.index]

    def whole(self) -> Json:
        """The response to a request without `stream`, once all has come."""
        choices: list[Json] = []
        for index, parts in enumerate(self._texts):
            logprobs = self._logprobs(self._tokens[index]) if self.request.logprobs else None
            said: Json = {"text": "".join(parts)}
            if self.request.is_chat:
                said = {"message": {"role": "assistant", "content": "".join(parts), "refusal": None}}
            choices.append({"index": index, **said, "logprobs": logprobs, "finish_reason": self._ends[index]})
        kind = "chat.completion" if self.request.is_chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": self.usage}

    def chunks(self, step: Step) -> list[Json]:
        """What is streamed for one step; nothing where it added no text and no token."""
        self.num_generated += step.piece.num_new
        piece, index = step.piece, step.index
        found: list[Json] = []
        if self.request.is_chat and index not in self._begun:
            self._begun.add(index)
            found.append(self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None, None))
        logprobs = self._logprobs([step]) if self.request.logprobs and piece.tokens else None
        if piece.text or logprobs or (piece.finish_reason and not self.request.is_chat):
            said: Json = {"delta": {"content": piece.text}} if self.request.is_chat else {"text": piece.text}
            found.append(
                self._chunk(index, said, logprobs, None if self.request.is_chat else piece.finish_reason or None)
            )
        if piece.finish_reason and self.request.is_chat:
            found.append(self._chunk(index, {"delta": {}}, None, piece.finish_reason))
        return found

    def last_chunk(self) -> list[Json]:
        """The chunk with the usage, where it was asked for."""
        if not self.request.include_usage:
            return []
        return [{**self._head(self._chunk_kind), "choices": [], "usage": self.usage}]

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.request.is_chat else "text_completion"

    def _chunk(self, index: int, said: Json, logprobs: Json | None, end: str | None) -> Json:
        choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": end}
        usage: Json = {"usage": None} if self.request.include_usage else {}
        return {**self._head(self._chunk_kind), "choices": [choice], **usage}

    def _head(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.served.name}

    def _logprobs(self, steps: Iterable[Step]) -> Json:
        placed_tokens = [(placed, step.offset) for step in steps for placed in step.piece.tokens]
        if self.request.is_chat:
            return {"content": [self._of_chat(placed.token) for placed, _ in placed_tokens], "refusal": None}
        return self._of_text(placed_tokens)

    def _of_text(self, placed_tokens: list[tuple[PlacedToken, int]]) -> Json:
        tokens = [placed.token for placed, _ in placed_tokens]
        tops: list[Mapping[str, float] | None] = [self._top(token) for token in tokens]
        return {
            "tokens": [self._name(token.id) for token in tokens],
            "token_logprobs": [_number(token.logprob) for token in tokens],
            "top_logprobs": tops if self.request.sampling.num_logprobs else None,
            "text_offset": [placed.start + offset for placed, offset in placed_tokens],
        }

    def _top(self, token: Token) -> Mapping[str, float] | None:
        """By name; where two tokens have one name, the likelier one counts."""
        if math.isnan(token.logprob):
            return None
        found: dict[str, float] = {}
        for known, logprob in token.top:
            found.setdefault(self._name(known), max(logprob, LEAST_LOGPROB))
        return found

    def _of_chat(self, token: Token) -> Json:
        tops = [self._named(known, logprob) for known, logprob in token.top]
        return {**self._named(token.id, token.logprob), "top_logprobs": tops}

    def _named(self, token: int, logprob: float) -> Json:
        known = list(self.served.codec.bytes(token))
        return {"token": self._name(token), "logprob": max(logprob, LEAST_LOGPROB), "bytes": known}

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self.request.names_as_ids else self.served.codec.name(token)


def event(value: Json) -> bytes:
    """One server-sent event (HTML standard, section 9.2)."""
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


LAST_EVENT = b"data: [DONE]\n\n"


def _number(logprob: float) -> float | None:
    return None if math.isnan(logprob) else max(logprob, LEAST_LOGPROB)
