"""The talk in the terminal: the decoder's answers, with what still fits of the talk."""

import io
from dataclasses import replace
from pathlib import Path

from kilofed.data.examples import Renderer
from kilofed.generation.decoding import Sampling
from kilofed.serving.chat import converse, fit_to_context
from kilofed.serving.model import open_served_model


def talked(path: Path, *lines: str) -> list[str]:
    to = io.StringIO()
    converse(path, max_new_tokens=12, source=io.StringIO("\n".join(lines) + "\n"), to=to)
    return to.getvalue().split("\n")


def test_the_answer_is_what_the_decoder_says_without_outer_space(tiny_model: Path) -> None:
    served = open_served_model(str(tiny_model))
    ids = served.conversation_ids([{"role": "user", "content": "add 1"}])
    said = served.codec.decode([token.id for token in served.generator.generate_tokens(ids, Sampling(12))])
    assert "\n".join(talked(tiny_model, "add 1")) == said.strip() + "\n"


def test_each_line_is_answered_until_an_empty_one(tiny_model: Path) -> None:
    once = talked(tiny_model, "add 1")
    assert talked(tiny_model, "add 1", "add 1", "", "never asked") == [*once[:-1], *once]
    assert talked(tiny_model, "") == [""]


def test_a_long_talk_loses_its_oldest_turns_and_says_so(tiny_model: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    plain = open_served_model(str(tiny_model))
    spec = replace(plain.renderer.spec, template="")
    served = replace(plain, renderer=Renderer(plain.codec.tokenizer, spec, "messages"))
    talk_so_far = [{"role": role, "content": "a" * 40} for role in ("user", "assistant", "user", "assistant", "user")]
    kept, ids = fit_to_context(served, talk_so_far)
    assert kept == talk_so_far[4:]
    assert len(ids) < 128
    assert "oldest turns are no longer seen" in capsys.readouterr().err
