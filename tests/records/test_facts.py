"""run.json: what a run writes of itself before its first round is read back, strictly."""

import json
from pathlib import Path

import pytest
from tests.conftest import SIZES

import kilofed
from kilofed.config.fields import Value
from kilofed.config.recipe import Recipe
from kilofed.config.tables import changed, from_table, to_table
from kilofed.errors import RunError
from kilofed.payload import Payload
from kilofed.records import facts
from kilofed.records.codec import to_json
from kilofed.records.facts import VARIES, RunFacts, TensorFacts

LEAN: dict[str, Value] = {"evaluate.generate": 0, "evaluate.baselines": []}


def test_a_run_writes_facts_that_are_read_back(uneven: Recipe, tmp_path: Path) -> None:
    done = kilofed.run(changed(uneven, {**LEAN, "seeds": 2}), out=tmp_path / "run")
    state = Payload.decode((done.folder / "seed-0" / "state.safetensors").read_bytes()).tensors
    for folder, seeds in ((done.folder, 2), (done.folder / "seed-0", 1)):
        found = facts.read(folder)
        assert from_table(found.recipe).seeds == seeds  # type: ignore[arg-type]
        assert {one.name: one.train_rows + one.test_rows for one in found.clients} == SIZES
        assert found.created
        assert found.plan is None
        (fit,) = found.leaves
        assert {name: tensor.shape for name, tensor in fit.tensors.items()} == {n: t.shape for n, t in state.items()}


def test_sizes_that_differ_between_replies_vary(uneven: Recipe, tmp_path: Path) -> None:
    done = kilofed.run(changed(uneven, {**LEAN, "method": "split"}), out=tmp_path / "run")
    (forward,) = (one for one in facts.read(done.folder).leaves if one.action == "forward")
    assert TensorFacts("float32", (VARIES, 16)) in forward.tensors.values()
    assert "n x 16" in (done.folder / "report.html").read_text("utf-8")


def test_facts_of_a_run_that_has_just_begun_are_its_recipe(tiny_recipe: Recipe, tmp_path: Path) -> None:
    began = RunFacts(to_table(tiny_recipe), "2030-01-02T03:04:05+00:00")
    (tmp_path / facts.FILE).write_text(json.dumps(to_json(began)), "utf-8")
    assert facts.read(tmp_path) == began
    assert not began.clients


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ('{"recipe": {}, "more": 1}', "has the key more, which is none of its own"),
        ('{"clients": [{"id": 0}]}', r"lacks clients\.0\.name"),
        ('{"num_trained": "3"}', "has another num_trained than expected"),
    ],
)
def test_a_file_of_another_version_is_refused_in_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / facts.FILE).write_text(text, "utf-8")
    with pytest.raises(RunError, match=rf"run\.json {said}"):
        facts.read(tmp_path)
