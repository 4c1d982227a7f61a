"""Split learning is plain training, cut in two."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch

from kilofed import train
from kilofed.engines.inprocess import InProcess
from kilofed.errors import ClientError, PrivacyError, RecipeError, TooFewReplies
from kilofed.method import Cohort
from kilofed.payload import Payload
from kilofed.recipe import Recipe

ALONE = {"data.partition.kind": "iid", "data.partition.num_clients": 1}
FULL = {"adapter.kind": "full"}


def assert_equal(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) == 0.0


@pytest.mark.parametrize("labels", ["server", "client"])
@pytest.mark.parametrize("part", ["sequential", "joint", "averaged"])
def test_with_one_client_it_is_plain_training(federate, labels: str, part: str) -> None:
    split = federate("split", overrides=ALONE, labels=labels, server_part=part)
    plain = federate("fedavg", overrides=ALONE)
    assert_equal(split.server.state, plain.server.state)
    assert split.metrics == plain.metrics


@pytest.mark.parametrize("labels", ["server", "client"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_averaged_parts_are_fedavg_whatever_the_number_of_clients(federate, labels: str, optimizer: str) -> None:
    how = {"train.optimizer": optimizer, "train.schedule": "cosine", "train.epochs": 1, "train.weight_decay": 0.1}
    split = federate("split", overrides=how, labels=labels, server_part="averaged")
    plain = federate("fedavg", overrides=how)
    assert_equal(split.server.state, plain.server.state)


def test_all_parameters_are_trained_with_the_head_at_the_client_as_without_a_cut(federate) -> None:
    split = federate("split", overrides=FULL, labels="client", server_part="averaged")
    assert_equal(split.server.state, federate("fedavg", overrides=FULL).server.state)
