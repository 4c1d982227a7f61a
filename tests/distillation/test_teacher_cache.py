"""Lessons are what the teacher says of each row, whatever batch it stands in; learning them brings the student there."""

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


def test_lessons_are_the_teachers_scores_in_any_batch(teacher: torch.nn.Module) -> None:
    some = rows(7)
    lessons = teacher_cache.ask(teacher, some, k=0, batch_size=3)
    batch = training.collate_tokens([some[5], some[0], some[3]])
    told = lessons.of(batch)
    with torch.inference_mode():
        logits, targets = training.token_logits(teacher, batch)
    assert len(told.ids_NK) == len(targets)
    torch.testing.assert_close(losses.spread(told), logits.log_softmax(1), rtol=2e-3, atol=2e-3)


def test_a_row_that_is_met_twice_is_asked_once_and_takes_few_bytes(teacher: torch.nn.Module) -> None:
    some = rows(3)
    lessons = teacher_cache.ask(teacher, [*some, *some], k=4)
    assert len(lessons) == 3
    tokens = sum(training.collate_tokens([row]).num_learnt for row in some)
    assert lessons.num_bytes == tokens * (4 * 2 + 5 * 2)  # Four word numbers, four scores and the rest.


def test_the_objective_is_the_mean_kl_and_mixes_in_the_rows_own_answers(
    teacher: torch.nn.Module, tiny_model: Path
) -> None:
    student, some = loading.load_base(ModelSpec(str(tiny_model))), rows(4)
    batch = training.collate_tokens(some)
    lessons = teacher_cache.ask(teacher, some, k=5, temperature=2.0)
    logits, _ = training.token_logits(student, batch)
    kl = losses.forward_kl(lessons.of(batch), logits, 2.0).mean()
    own = training.loss(student, batch)
    for share in (0.0, 0.25, 1.0):
        mixed = teacher_cache.objective(lessons, direction="forward", own_answers=share)(student, batch)
        torch.testing.assert_close(mixed, (1 - share) * kl + share * own)


def test_a_student_with_a_wider_vocabulary_is_cut_to_the_teachers(teacher: torch.nn.Module, tiny_model: Path) -> None:
    student, some = loading.load_base(ModelSpec(str(tiny_model))), rows(2)
    lessons, batch = teacher_cache.ask(teacher, some, k=0), training.collate_tokens(some)
    before = teacher_cache.objective(lessons, direction="reverse")(student, batch)
    student.resize_token_embeddings(272)
    torch.testing.assert_close(teacher_cache.objective(lessons, direction="reverse")(student, batch), before)


def test_learning_its_lessons_brings_the_student_to_the_teacher(teacher: torch.nn.Module, tiny_model: Path) -> None:
    student = loading.load_model(ModelSpec(str(tiny_model)), AdapterSpec(kind="full"), 0)
    some = rows(4)
    lessons, batch = teacher_cache.ask(teacher, some, k=32), training.collate_tokens(some)
    objective = teacher_cache.objective(lessons, direction="forward")
    before = objective(student, batch).item()
    spec = TrainSpec(steps=60, batch_size=4, lr=1e-2)
    stream = torch.Generator().manual_seed(0)
    training.fit(student, iter([some] * 60), spec, first=0, total=60, dropout=stream, objective=objective)
    assert objective(student, batch).item() < 0.2 * before
    assert not any(p.requires_grad and p.grad is not None for p in teacher.parameters())
