"""What a request makes the model do, as steps that are each computed when asked for."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from kilofed.generation.decoding import Token
from kilofed.generation.detokenizer import Piece, detokenize
from kilofed.serving.model import ServedModel
from kilofed.serving.requests import SEEDS, GenerationRequest

UNTOLD = Token(-1, math.nan)
"""Stands for what is not known of a token; its log-probability is returned as null."""


@dataclass(frozen=True)
class Step:
    """One piece of one answer."""

    index: int
    """Number of the answer: prompt number times n, plus the choice."""
    piece: Piece
    offset: int
    """Where the piece's tokens count their characters from: 0, or the echoed prompt's length."""


def steps(served: ServedModel, request: GenerationRequest) -> Iterator[Step]:
    """All answers to `request`, one after the other, piece by piece; close it to give the model's caches back."""
    for number, prompt in enumerate(request.prompts):
        echoed = _echo(served, request, prompt) if request.echo else None
        for choice in range(request.n):
            index, offset = number * request.n + choice, 0
            if echoed is not None:
                offset = len(echoed.text)
                yield Step(index, echoed, 0)
            if not request.sampling.max_new_tokens:
                continue
            seed = (request.sampling.seed + index + SEEDS) % (2 * SEEDS) - SEEDS
            tokens = served.generator.generate_tokens(prompt, replace(request.sampling, seed=seed))
            for piece in detokenize(tokens, served.codec, stops=request.stops, end_ids=served.generator.end_ids):
                yield Step(index, piece, offset)


def _echo(served: ServedModel, request: GenerationRequest, prompt: Sequence[int]) -> Piece:
    """The prompt as if it had been generated; scored where log-probabilities are wanted."""
    if request.logprobs:
        scored = served.generator.score(prompt, request.sampling.num_logprobs)
    else:
        scored = [None] * len(prompt)
    tokens = [
        UNTOLD._replace(id=known) if token is None else token for known, token in zip(prompt, scored, strict=True)
    ]
    pieces = list(detokenize(tokens, served.codec))
    return Piece(
        "".join(piece.text for piece in pieces),
        tuple(placed for piece in pieces for placed in piece.tokens),
        "" if request.sampling.max_new_tokens else "length",
        num_new=0,
    )
