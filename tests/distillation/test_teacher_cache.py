"""Cached scores are the teacher's for each row in any batch; distillation brings the student closer to it."""

from pathlib import Path

import pytest
import torch

from kilofed.config.recipe import AdapterSpec, ModelSpec, TrainSpec
from kilofed.data import examples
from kilofed.data.examples import Example
from kilofed.distillation import losses, teacher_cache
from kilofed.models import loading, training


def rows(number: int) -> list[Example]:
    stream = torch.Generator().manual_seed(0)
    found = []
    for at in range(number):
        ids = torch.randint(3, 259, (6 + at % 4,), generator=stream).tolist()
        found.append(Example(ids, [examples.IGNORED] * 3 + ids[3:], ids[:3], []))
    return found


@pytest.fixture
def teacher(tiny_large: Path) -> torch.nn.Module:
    return loading.load_base(ModelSpec(str(tiny_large)))


def test_cached_scores_are_the_teachers_in_any_batch(teacher: torch.nn.Module) -> None:
    some = rows(7)
    cache = teacher_cache.score(teacher, some, k=0, batch_size=3)
    batch = training.collate_tokens([some[5], some[0], some[3]])
    scores = cache.scores(batch)
    with torch.inference_mode():
        logits, targets = training.token_logits(teacher, batch)
    assert len(scores.ids_NK) == len(targets)
    torch.testing.assert_close(losses.spread(scores), logits.log_softmax(1), rtol=2e-3, atol=2e-3)


def test_a_repeated_row_is_scored_once_and_takes_few_bytes(teacher: torch.nn.Module) -> None:
    some = rows(3)
    cache = teacher_cache.score(teacher, [*some, *some], k=4)
    assert len(cache) == 3
    tokens = sum(training.collate_tokens([row]).num_targets for row in some)
    assert cache.num_bytes == tokens * (4 * 2 + 5 * 2)  # Four token ids, four scores and the rest.


def test_the_objective_is_the_mean_kl_mixed_with_cross_entropy(teacher: torch.nn.Module, tiny_model: Path) -> None:
    student, some = loading.load_base(ModelSpec(str(tiny_model))), rows(4)
    batch = training.collate_tokens(some)
    cache = teacher_cache.score(teacher, some, k=5, temperature=2.0)
    logits, _ = training.token_logits(student, batch)
    kl = losses.forward_kl(cache.scores(batch), logits, 2.0).mean()
    own = training.loss(student, batch)
    for share in (0.0, 0.25, 1.0):
        mixed = teacher_cache.objective(cache, direction="forward", own_answers=share)(student, batch)
        torch.testing.assert_close(mixed, (1 - share) * kl + share * own)


def test_a_student_with_a_larger_vocabulary_is_truncated_to_the_teachers(
    teacher: torch.nn.Module, tiny_model: Path
) -> None:
    student, some = loading.load_base(ModelSpec(str(tiny_model))), rows(2)
    cache, batch = teacher_cache.score(teacher, some, k=0), training.collate_tokens(some)
    before = teacher_cache.objective(cache, direction="reverse")(student, batch)
    student.resize_token_embeddings(272)
    torch.testing.assert_close(teacher_cache.objective(cache, direction="reverse")(student, batch), before)


def test_distillation_brings_the_student_to_the_teacher(teacher: torch.nn.Module, tiny_model: Path) -> None:
    student = loading.load_model(ModelSpec(str(tiny_model)), AdapterSpec(kind="full"), 0)
    some = rows(4)
    cache, batch = teacher_cache.score(teacher, some, k=32), training.collate_tokens(some)
    objective = teacher_cache.objective(cache, direction="forward")
    before = objective(student, batch).item()
    spec = TrainSpec(steps=60, batch_size=4, lr=1e-2)
    stream = torch.Generator().manual_seed(0)
    training.fit(student, iter([some] * 60), spec, first=0, total=60, dropout=stream, objective=objective)
    assert objective(student, batch).item() < 0.2 * before
    assert not any(p.requires_grad and p.grad is not None for p in teacher.parameters())
