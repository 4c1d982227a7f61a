"""Chat with a model in the terminal; a line in, an answer out, by the same decoding as `kilofed serve`."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from kilofed.generation.decoding import Sampling
from kilofed.generation.detokenizer import Piece, detokenize
from kilofed.serving.model import ServedModel, open_served_model


def converse(
    path: str | Path, *, max_new_tokens: int = 128, source: TextIO | None = None, to: TextIO | None = None
) -> None:
    """Answer each line of `source` (by default the keyboard) greedily on `to`, until it ends or an empty line.

    Args:
        path: what `kilofed serve` takes: a run folder, a model directory, builtin:small, a hub id.

    Raises:
        RunError, ModelError, DataError: as `open_served_model`; a line that alone fills the model's context.
    """
    source, to = source or sys.stdin, to or sys.stdout
    served = open_served_model(str(path))
    keyboard = source.isatty()
    if keyboard:
        print(f"{served.prompt_note}. An empty line or Ctrl-D ends the conversation.", file=sys.stderr)
    messages: list[dict[str, str]] = []
    while line := _read_line(source, keyboard):
        messages.append({"role": "user", "content": line})
        messages, ids = fit_to_context(served, messages)
        tokens = served.generator.generate_tokens(ids, Sampling(max_new_tokens))
        said = _write(detokenize(tokens, served.codec, end_ids=served.generator.end_ids), to)
        messages.append({"role": "assistant", "content": said})


def _read_line(source: TextIO, keyboard: bool) -> str:
    if keyboard:
        print("> ", end="", file=sys.stderr, flush=True)
    return source.readline().strip()


def fit_to_context(served: ServedModel, messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[int]]:
    """The newest turns that leave room for an answer, and their tokens."""
    ids = served.conversation_ids(messages)
    whole = len(messages)
    while len(ids) >= served.generator.context and len(messages) > 2:
        messages = messages[2:]
        ids = served.conversation_ids(messages)
    if len(messages) < whole:
        print(
            "the conversation is longer than the model's context: its oldest turns are no longer seen", file=sys.stderr
        )
    return messages, ids


def _write(pieces: Iterable[Piece], to: TextIO) -> str:
    """Write an answer as it comes, without white space around it; the whole of it."""
    said = held = ""
    for piece in pieces:
        text = held + piece.text if said else piece.text.lstrip()
        ready = text.rstrip()
        held = text[len(ready) :]
        said += ready
        to.write(ready)
        to.flush()
    to.write("\n")
    to.flush()
    return said
