"""Every method that trains a model by its loss classifies rows as well as it writes tokens."""

import math
from pathlib import Path

import pytest
import torch

from kilofed import evaluate, models
from kilofed.recipe import Value

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
    scores = evaluate.score(model, found.sites.test_examples(0), 8)
    assert math.isfinite(scores.loss)
    assert scores.macro_f1 is not None
    assert models.trained(model)["score.weight"].any()


def test_the_head_is_sent_with_the_adapter(federate, tiny_encoder: Path) -> None:
    found = federate("fedavg", rounds=1, overrides={**CLASSIFY, "model.path": str(tiny_encoder)})
    assert {"score.weight", "score.bias"} <= found.server.state.keys()
    assert found.server.state["score.weight"].shape == (4, 16)
    assert not torch.equal(found.server.state["score.weight"], torch.zeros(4, 16))
