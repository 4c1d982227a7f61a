"""The promises that every file in methods/ keeps."""

import math
from pathlib import Path

import pytest
import torch

from kilofed.errors import PrivacyError
from kilofed.federation.method import method_names
from kilofed.payload import Payload

CENTRAL = {"privacy.kind": "central", "privacy.noise_key": "ab" * 16}

pytestmark = pytest.mark.parametrize("name", method_names())


def test_two_rounds_have_a_finite_loss_and_change_the_state(name: str, federate) -> None:
    before, after = federate(name, rounds=0), federate(name)
    assert [math.isfinite(metrics["train_loss"]) for metrics in after.metrics] == [True, True]
    assert after.content != before.content
    assert all(bool(tensor.isfinite().all()) for tensor in after.server.state.values())


def test_what_is_delivered_answers_with_what_was_learnt(name: str, federate) -> None:
    found = federate(name)
    model, ids = found.sites.method.deliver(found.server), torch.arange(3, 13)[None]
    with torch.inference_mode():
        learnt = model(input_ids=ids).logits
        blank = federate(name, rounds=0)
        base = blank.sites.method.deliver(blank.server)(input_ids=ids).logits
    assert learnt.isfinite().all()
    assert not torch.equal(learnt, base)


def test_the_same_seed_gives_the_same_bytes(name: str, federate) -> None:
    one, again = federate(name), federate(name, fresh=True)
    assert one.content == again.content
    assert one.metrics == again.metrics
    assert federate(name, overrides={"seed": 1}).content != one.content


def test_resumed_after_round_one_equals_uninterrupted(name: str, federate, tmp_path: Path) -> None:
    first = federate(name, rounds=1, folder=tmp_path)
    state = dict(Payload.decode(first.content).tensors)
    resumed = federate(name, folder=tmp_path, done=1, state=state)
    assert resumed.content == federate(name).content


def test_a_round_that_is_done_again_equals_the_first_time(name: str, federate, tmp_path: Path) -> None:
    first = federate(name, rounds=1, folder=tmp_path)
    state = {key: tensor.clone() for key, tensor in first.server.state.items()}
    whole = first.run(2).content
    assert federate(name, folder=tmp_path, done=1, state=state).content == whole


def test_forgetting_everything_but_client_state_changes_nothing(name: str, federate, tmp_path: Path) -> None:
    forgetful = federate(name, folder=tmp_path, forgetful=True)
    assert forgetful.content == federate(name).content


def test_under_central_privacy_it_runs_or_refuses(name: str, federate) -> None:
    try:
        found = federate(name, overrides=CENTRAL)
    except PrivacyError:
        return
    assert found.content != federate(name).content
    assert all(bool(tensor.isfinite().all()) for tensor in found.server.state.values())
    assert found.content == federate(name, overrides=CENTRAL, fresh=True).content


def test_one_client_that_never_answers_is_survived(name: str, federate, one_away) -> None:
    found = federate(name, engine=one_away)
    assert math.isfinite(found.metrics[-1]["train_loss"])
    assert found.content != federate(name).content
    assert sorted(found.ledger.per_client("up")) == [0, 1]
    assert sorted(found.ledger.per_client("down")) == [0, 1, 2]


def test_a_client_that_fails_in_round_1_takes_part_in_round_2(name: str, federate, away_in) -> None:
    found = federate(name, engine=away_in(1))
    assert [sorted(failed) for failed in found.failures] == [[1], []]
    answered = {(row.round, row.client) for row in found.ledger.rows() if row.direction == "up"}
    assert answered == {(1, 0), (1, 2), (2, 0), (2, 1), (2, 2)}
    assert [math.isfinite(metrics["train_loss"]) for metrics in found.metrics] == [True, True]
    assert found.content not in (federate(name).content, federate(name, engine=away_in(2)).content)


@pytest.mark.parametrize("overrides", [{}, CENTRAL])
def test_the_forecast_is_what_the_ledger_counts(name: str, federate, overrides: dict[str, str]) -> None:
    try:
        found = federate(name, rounds=1, overrides=overrides, fresh=True)
    except PrivacyError:
        return
    expected = found.forecast()
    found.run(2)
    exact = type(found.sites.method).exact_bytes
    for way in ("down", "up"):
        rows = [row for row in found.ledger.rows() if row.round == 2 and row.direction == way]
        by_client = {client: sum(row.bytes for row in rows if row.client == client) for client in expected}
        told = {client: of[way] for client, of in expected.items()}
        assert by_client == (told if exact else pytest.approx(told, rel=0.1))
