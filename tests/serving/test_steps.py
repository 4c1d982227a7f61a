"""The steps of a request: prompts and choices in order, computed when asked for, echoes first."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import pytest

from kilofed.generation.decoding import Sampling, Token
from kilofed.serving.model import ServedModel
from kilofed.serving.requests import GenerationRequest
from kilofed.serving.steps import Step, steps


def request(*prompts: tuple[int, ...], n: int = 1, echo: bool = False, logprobs: bool = False, **sampling: object):
    chosen = Sampling(**{"max_new_tokens": 4, **sampling})  # type: ignore[arg-type]
    return GenerationRequest(False, prompts, n, chosen, (), False, False, echo, logprobs, False)


def answers(found: Sequence[Step]) -> dict[int, str]:
    texts: dict[int, str] = {}
    for step in found:
        texts[step.index] = texts.get(step.index, "") + step.piece.text
    return texts


@dataclass
class Watched:
    """Passes tokens on and counts them."""

    inner: object
    seeds: list[int] = field(default_factory=list)
    num_tokens: int = 0
    closed: int = 0

    @property
    def end_ids(self) -> frozenset[int]:
        return self.inner.end_ids  # type: ignore[attr-defined, no-any-return]

    def generate_tokens(self, prompt_ids: Sequence[int], sampling: Sampling) -> Iterator[Token]:
        self.seeds.append(sampling.seed)
        try:
            for token in self.inner.generate_tokens(prompt_ids, sampling):  # type: ignore[attr-defined]
                self.num_tokens += 1
                yield token
        finally:
            self.closed += 1


def test_answers_are_numbered_by_prompt_and_choice_and_come_one_after_the_other(served: ServedModel) -> None:
    found = list(steps(served, request((1, 70), (1, 71, 72, 73), n=3, temperature=1.0)))
    indices = [step.index for step in found]
    assert indices == sorted(indices)
    assert set(indices) == set(range(6))
    assert all(step.piece.finish_reason for step, after in zip(found, [*found[1:], None], strict=True)
               if after is None or after.index != step.index)  # fmt: skip


def test_each_answer_has_a_seed_of_its_own_that_stays_in_range(served: ServedModel) -> None:
    watched = Watched(served.generator)
    seen = replace(served, generator=watched)
    list(steps(seen, request((1, 70), (1, 71), n=2, seed=2**63 - 2)))
    assert watched.seeds == [2**63 - 2, 2**63 - 1, -(2**63), -(2**63) + 1]


def test_tokens_are_computed_when_a_step_is_taken_and_given_back_when_it_is_closed(served: ServedModel) -> None:
    watched = Watched(served.generator)
    walk = steps(replace(served, generator=watched), request((1, 70), n=5))
    assert watched.num_tokens == 0
    next(walk)
    assert watched.num_tokens == 1
    walk.close()
    assert (watched.num_tokens, watched.closed) == (1, 1)


def test_an_echo_comes_first_and_moves_the_answers_characters(served: ServedModel) -> None:
    prompt = tuple(served.codec.encode("abc"))
    plain, echoed = (list(steps(served, request(prompt, n=2, echo=echo))) for echo in (False, True))
    assert answers(echoed) == {index: "abc" + text for index, text in answers(plain).items()}
    firsts = [step for step in echoed if step.piece.num_new == 0 and not step.piece.finish_reason]
    assert [step.piece.text for step in firsts[:2]] == ["abc", "abc"]
    assert {step.offset for step in echoed if step not in firsts} == {3}


@pytest.mark.parametrize("logprobs", [False, True])
def test_a_prompt_alone_is_scored_where_that_is_wanted_and_ends_the_answer(
    served: ServedModel, logprobs: bool
) -> None:
    prompt = tuple(served.codec.encode("abcd"))
    (only,) = steps(served, request(prompt, echo=True, logprobs=logprobs, max_new_tokens=0, num_logprobs=2))
    scores = [placed.token.logprob for placed in only.piece.tokens]
    assert only.piece.finish_reason == "length"
    assert [placed.token.id for placed in only.piece.tokens] == list(prompt)
    assert math.isnan(scores[0])  # Nothing stands before the first token.
    assert all(score < 0 for score in scores[1:]) if logprobs else all(map(math.isnan, scores))
