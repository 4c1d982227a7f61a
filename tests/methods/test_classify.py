"""Every method that trains a model by its loss classifies rows as well as it writes tokens."""

import io
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

import kilofed
from kilofed.config.fields import Value
from kilofed.config.recipe import Recipe
from kilofed.config.tables import changed
from kilofed.errors import RunError
from kilofed.models import evaluation, loading
from kilofed.models.heads import MeanClassifier
from kilofed.reports import report
from kilofed.runs import export
from kilofed.serving import chat

CLASSIFY: dict[str, Value] = {
    "data.task": "classify",
    "data.columns.text": "instruction",
    "data.columns.label": "client",
    "data.partition.kind": "iid",
    "data.partition.num_clients": 4,
}


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "fedadam", "fedkseed", "fedmezo", "kd"])
def test_a_round_over_classes_has_a_finite_loss_and_trains_the_head(name: str, federate, tiny_encoder: Path) -> None:
    found = federate(name, rounds=1, overrides={**CLASSIFY, "model.path": str(tiny_encoder)})
    assert math.isfinite(found.metrics[0]["train_loss"])
    model = found.sites.method.deliver(found.server)
    scores = evaluation.score(model, found.sites.corpus.test_examples(0), 8)
    assert math.isfinite(scores.loss)
    assert scores.macro_f1 is not None
    assert loading.trained(model)["score.weight"].any()


def test_the_head_is_sent_with_the_adapter(federate, tiny_encoder: Path) -> None:
    found = federate("fedavg", rounds=1, overrides={**CLASSIFY, "model.path": str(tiny_encoder)})
    assert {"score.weight", "score.bias"} <= found.server.state.keys()
    assert found.server.state["score.weight"].shape == (3, 16)
    assert not torch.equal(found.server.state["score.weight"], torch.zeros(3, 16))


def test_a_run_over_classes_is_reported_and_exported_and_does_not_chat(
    tiny_recipe: Recipe, tiny_encoder: Path, tmp_path: Path
) -> None:
    less: dict[str, Value] = {"rounds": 1, "evaluate.baselines": ["base"], "model.path": str(tiny_encoder)}
    done = kilofed.run(changed(tiny_recipe, {**CLASSIFY, **less}), out=tmp_path / "run")
    rows = done.rows
    assert 0 <= (rows["federated"].macro_f1 or 0) <= 1
    assert rows["base"].loss == pytest.approx(math.log(4), rel=1e-5)
    assert rows["federated"].perplexity is None
    assert "macro-F1" in report.table(done.results)
    assert "ROUGE-L" not in report.table(done.results)
    page = (done.folder / "report.html").read_text("utf-8")
    assert "macro-F1" in page
    assert "4, in the order of their numbers: site 0, site 1, site 2, site 3" in page
    last = json.loads((done.folder / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
    assert "macro_f1" in last
    whole = export.merged(done.folder, tmp_path / "whole")
    head = load_file(whole / "head.safetensors")
    again = MeanClassifier(AutoModel.from_pretrained(whole), 4).eval()
    again.score.load_state_dict(head)
    model, _ = done.model()
    ids, mask = torch.arange(3, 13)[None], torch.ones(1, 10, dtype=torch.long)
    with torch.inference_mode():
        torch.testing.assert_close(again(ids, mask).logits, model(ids, mask).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(RunError, match="classifies rows and writes no answers"):
        chat.converse(done.folder, source=io.StringIO("hello\n"), to=io.StringIO())
