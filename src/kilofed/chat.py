"""Talk to a run's model in the terminal; a line in, an answer out."""

import sys
from pathlib import Path
from typing import TextIO

from kilofed.data import Renderer
from kilofed.errors import RunError
from kilofed.evaluate import answer
from kilofed.run import delivered, first_seed, recipe_of


def talk(run: Path, *, max_new_tokens: int = 128, source: TextIO | None = None, to: TextIO | None = None) -> None:
    """Answer each line of `source` (by default the keyboard) greedily on `to`, until it ends or an empty line.

    Raises:
        RunError: no state in the run, or it classifies.
    """
    source, to = source or sys.stdin, to or sys.stdout
    recipe = recipe_of(first_seed(run))
    if recipe.data.task == "classify":
        raise RunError(f"{run} classifies rows and writes no answers: score rows with `kilofed eval`, or export it")
    model, tokenizer = delivered(run)
    renderer = Renderer(tokenizer, recipe.data, "messages" if tokenizer.chat_template else "response")
    keyboard = source.isatty()
    if keyboard:
        print("An empty line or Ctrl-D ends the talk.", file=sys.stderr)
    talked: list[dict[str, str]] = []
    while line := _ask(source, keyboard):
        talked.append({"role": "user", "content": line})
        text = answer(model, tokenizer, [renderer.prompt(talked)], max_new_tokens)[0].strip()
        talked.append({"role": "assistant", "content": text})
        print(text, file=to, flush=True)


def _ask(source: TextIO, keyboard: bool) -> str:
    if keyboard:
        print("> ", end="", file=sys.stderr, flush=True)
    return source.readline().strip()
