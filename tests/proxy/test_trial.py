"""A sweep is what each model alone would score; a trial says yes only if the steered model beats both its parts."""

from pathlib import Path

import pytest
from tests.distillation.test_teacher_cache import rows

from kilofed.config.recipe import AdapterSpec, ModelSpec
from kilofed.models import evaluation, loading
from kilofed.proxy.combination import Difference
from kilofed.proxy.model import ProxyModel
from kilofed.proxy.trial import ProxyParts, Trial, sweep


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_sweep_scores_as_the_steered_model_does(tiny_model: Path, tiny_large: Path, kind: str) -> None:
    small, large = ModelSpec(str(tiny_model)), loading.load_base(ModelSpec(str(tiny_large)))
    tuned = loading.load_model(small, AdapterSpec(kind=kind, rank=2), 0)  # type: ignore[arg-type]
    for parameter in loading.trained(tuned).values():
        parameter.data += 0.1
    base = loading.load_base(small) if kind == "full" else None
    some = rows(20)
    found = sweep(ProxyParts(large, tuned, base), some, {alpha: Difference(alpha) for alpha in (0.0, 0.5, 2.0)})
    for alpha, loss in found.items():
        proxy = ProxyModel(large, tuned, base, Difference(alpha))
        assert loss == pytest.approx(evaluation.score(proxy, some, 8).loss, rel=1e-4)
    assert found.tuned == pytest.approx(evaluation.score(tuned, some, 8).loss, rel=1e-5)
    assert found[0.0] == pytest.approx(evaluation.score(large, some, 8).loss, rel=1e-5)


@pytest.mark.parametrize(
    ("large", "tuned", "steered", "pays", "words"),
    [
        (4.4, 4.5, 4.3, True, "likely to pay"),
        (6.9, 3.7, 4.3, False, "NOT likely to pay"),
        (4.3, 4.5, 4.4, False, "adds nothing"),
    ],
)
def test_the_verdict_is_yes_only_below_both_parts(
    large: float, tuned: float, steered: float, pays: bool, words: str
) -> None:
    found = Trial(large, 5.0, tuned, steered)
    assert found.pays is pays
    assert words in found.sentence
    assert found.gain == pytest.approx(tuned - steered)
