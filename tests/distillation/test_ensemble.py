"""Identities of ensemble distillation: k = V loses nothing, one client is itself, own scores change nothing."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kilofed.config.recipe import AdapterSpec, ModelSpec, TrainSpec
from kilofed.data.examples import IGNORED, Example
from kilofed.distillation import ensemble, losses
from kilofed.distillation.ensemble import Scores
from kilofed.errors import PayloadError
from kilofed.models import loading

V = 259
TOKENS = [
    Example([5, 6, 7, 8], [IGNORED, 6, 7, 8], [], []),
    Example([9, 10], [IGNORED, 10], [], []),
    Example([3, 4, 30], [IGNORED, IGNORED, 30], [], []),
]
ROWS = [Example([5, 6, 7, 8], [], [], [], 0), Example([9], [], [], [], IGNORED), Example([3, 4], [], [], [], 1)]
SGD = TrainSpec(steps=1, batch_size=3, lr=1.0, optimizer="sgd")


@pytest.fixture
def speaker(tiny_model: Path) -> nn.Module:
    return stirred(loading.load_model(ModelSpec(str(tiny_model)), AdapterSpec(rank=2), 0), 1)


@pytest.fixture
def classifier(tiny_encoder: Path) -> nn.Module:
    return stirred(loading.load_model(ModelSpec(str(tiny_encoder)), AdapterSpec(rank=2), 0, ("a", "b", "c")), 1)


def stirred(model: nn.Module, seed: int) -> nn.Module:
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in loading.trained(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=draws) / 4)
    return model


def scored(model: nn.Module, rows: list[Example], k: int = 0, weighting: ensemble.Weighting = "uniform") -> Scores:
    tokens = ensemble.choose_tokens(model, rows, k, 2) if k else None
    return ensemble.score(model, rows, tokens, temperature=2.0, batch_size=2, weighting=weighting)


def taught(model: nn.Module, rows: list[Example], teacher: Scores) -> dict[str, Tensor]:
    """What one step of distillation does to each trained tensor."""
    before = loading.read_trained(model)
    draws = torch.Generator().manual_seed(0)
    ensemble.fit(model, rows, teacher, SGD, temperature=2.0, direction="forward", generator=draws)
    after = loading.read_trained(model)
    loading.write_trained(model, before)
    return {name: after[name] - before[name] for name in after}


@pytest.mark.parametrize("k", [0, 8])
def test_own_scores_do_not_change_a_language_model(speaker: nn.Module, k: int) -> None:
    moved = taught(speaker, TOKENS, scored(speaker, TOKENS, k))
    assert max(float(change.abs().max()) for change in moved.values()) < 1e-6


def test_own_scores_do_not_change_a_classifier(tiny_encoder: Path) -> None:
    # Dropout would make the pupil another model than its teacher.
    model = stirred(loading.load_model(ModelSpec(str(tiny_encoder)), AdapterSpec(rank=2), 0, ("a", "b", "c")), 1)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    moved = taught(model, ROWS, scored(model, ROWS))
    assert max(float(change.abs().max()) for change in moved.values()) < 1e-5


def test_all_tokens_chosen_equal_full_scores(tiny_model: Path, speaker: nn.Module) -> None:
    other = stirred(loading.load_model(ModelSpec(str(tiny_model)), AdapterSpec(rank=2), 0), 2)
    tokens = ensemble.choose_tokens(other, TOKENS, V, 2)
    assert tokens.shape == (5, V)
    chosen = ensemble.score(other, TOKENS, tokens, temperature=2.0, batch_size=2)
    full, every = taught(speaker, TOKENS, scored(other, TOKENS)), taught(speaker, TOKENS, chosen)
    for name, change in full.items():
        assert change.any()
        torch.testing.assert_close(every[name], change, rtol=1e-4, atol=1e-7)


def test_a_step_lowers_the_distance_to_the_teacher(tiny_model: Path, speaker: nn.Module) -> None:
    teacher = scored(stirred(loading.load_model(ModelSpec(str(tiny_model)), AdapterSpec(rank=2), 0), 2), TOKENS, 8)
    spec, draws = TrainSpec(steps=20, batch_size=3, lr=0.02), torch.Generator().manual_seed(0)
    first = ensemble.fit(speaker, TOKENS, teacher, SGD, temperature=2.0, direction="forward", generator=draws)
    later = ensemble.fit(speaker, TOKENS, teacher, spec, temperature=2.0, direction="forward", generator=draws)
    assert later.loss < first.loss


def test_buckets_hold_all_mass_and_the_next_token(speaker: nn.Module) -> None:
    found = scored(speaker, TOKENS, 4)
    assert found.tokens_NK is not None
    torch.testing.assert_close(found.log_probs_NB.exp().sum(1), torch.ones(5))
    assert [token in row for token, row in zip([6, 7, 8, 10, 30], found.tokens_NK.tolist(), strict=True)] == [True] * 5


def test_batch_size_does_not_change_scores(speaker: nn.Module) -> None:
    one = ensemble.score(speaker, TOKENS, None, temperature=1.0, batch_size=1)
    torch.testing.assert_close(
        one.log_probs_NB, ensemble.score(speaker, TOKENS, None, temperature=1.0, batch_size=3).log_probs_NB
    )


def test_an_ensemble_of_one_is_that_one(speaker: nn.Module, classifier: nn.Module) -> None:
    for own in (scored(speaker, TOKENS, 8), scored(classifier, ROWS)):
        server = torch.full(own.log_probs_NB.shape, -1.0, dtype=torch.float64)
        found = ensemble.ensemble(server, ensemble.contribution(server, own), None)
        torch.testing.assert_close(found.float(), own.log_probs_NB)


def test_an_ensemble_is_the_softmax_of_mean_logits() -> None:
    logits = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    server = logits[0].log_softmax(1)
    parts = [ensemble.contribution(server, Scores(one.log_softmax(1), None, 5, torch.ones(4))) for one in logits]
    found = ensemble.ensemble(server, torch.stack(parts).mean(0), None)
    torch.testing.assert_close(found, logits.mean(0).log_softmax(1))


def test_who_did_not_score_a_row_does_not_move_its_mean() -> None:
    logits = torch.randn(3, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    server = torch.randn(2, 5, dtype=torch.float64).log_softmax(1)
    every = [Scores(one.log_softmax(1), None, 5, w) for one, w in zip(logits, weights, strict=True)]
    mean = torch.stack([ensemble.contribution(server, one) for one in every]).mean(0)
    found = ensemble.ensemble(server, mean, weights.mean(0))
    torch.testing.assert_close(found[0], logits[:2, 0].mean(0).log_softmax(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1], server[1])


def test_weights_lost_in_noise_leave_the_global_scores() -> None:
    server = torch.randn(2, 5, dtype=torch.float64).log_softmax(1)
    torch.testing.assert_close(ensemble.ensemble(server, server + 9.0, torch.tensor([-0.5, 0.0])), server)


@pytest.mark.parametrize(("wire", "most"), [("float32", 1e-6), ("float16", 4e-3), ("int8", ensemble.STEP / 2 + 1e-9)])
def test_encoding_rounds_by_less_than_a_step(wire: ensemble.Wire, most: float) -> None:
    sent = torch.linspace(-ensemble.RANGE, 0, 999)[None]
    back = ensemble.decode(ensemble.encode(sent, wire), wire)
    assert float((back - sent).abs().max()) <= most


def test_the_mean_of_int8_codes_is_the_code_of_the_mean() -> None:
    sent = torch.tensor([[-1.0, -4.0], [-3.0, -9.0]])
    codes = ensemble.encode(sent, "int8").double()
    assert float((ensemble.decode(codes.mean(0)[None], "int8") - sent.mean(0)).abs().max()) <= ensemble.STEP / 2


def test_probability_zero_is_encoded_as_the_smallest_value() -> None:
    assert ensemble.encode(torch.tensor([[-math.inf]]), "float16").item() == losses.MIN_LOG_PROB


def test_a_sure_model_counts_more(classifier: nn.Module) -> None:
    sure, unsure = torch.tensor([[20.0, 0.0, 0.0]]), torch.zeros(1, 3)
    assert ensemble._weights(sure, "confidence") > 0.99
    assert ensemble._weights(sure, "entropy") > 0.99
    torch.testing.assert_close(ensemble._weights(unsure, "confidence"), torch.tensor([1 / 3]))
    assert float(ensemble._weights(unsure, "entropy")) < 1e-6


LOG_PROBS = torch.tensor([[-1.0, -2.0, -9.5], [-0.5, -60.0, 0.0]])


@pytest.mark.parametrize(("wire", "most"), [("float32", 0.0), ("float16", 0.0), ("int8", 0.04)])
def test_what_is_encoded_is_read(wire: ensemble.Wire, most: float) -> None:
    sent = ensemble.encode(LOG_PROBS, wire)
    read = ensemble.read(sent, wire, (2, 3))
    assert torch.equal(read, ensemble.decode(sent, wire))
    assert float((read - LOG_PROBS.clamp(min=-16 if wire == "int8" else -60)).abs().max()) <= most
    assert ensemble.read(sent[:0], wire, (0, 3)).shape == (0, 3)


@pytest.mark.parametrize("wire", ["float32", "float16", "int8"])
def test_scores_that_encode_does_not_write_are_refused(wire: ensemble.Wire) -> None:
    sent = ensemble.encode(LOG_PROBS, wire)
    others = [ensemble.encode(LOG_PROBS, other) for other in ("float32", "float16", "int8") if other != wire]
    for wrong in (None, sent[1:], sent[:, 1:], sent.reshape(-1), sent.double(), *others):
        with pytest.raises(PayloadError, match=r"log-probabilities of .*; expected torch\.\w+ \(2, 3\)"):
            ensemble.read(wrong, wire, (2, 3))
    for value in (-128,) if wire == "int8" else (math.nan, math.inf, -math.inf, 0.01, -60.1):
        with pytest.raises(PayloadError, match=r"log-probabilities from .* to .*; expected -(60|127) to (0|127)"):
            ensemble.read(
                sent.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(value, dtype=sent.dtype)), wire, (2, 3)
            )


def test_tokens_that_the_server_does_not_choose_are_refused() -> None:
    good = torch.tensor([[5, 7], [258, 0]], dtype=torch.int16)
    assert ensemble.read_tokens(good, (2, 2), 259).tolist() == good.tolist()
    assert ensemble.read_tokens(good.int(), (2, 2), 40_000).dtype == torch.int64
    for wrong, num_outputs, message in (
        (None, 259, r"tokens of none; expected \(2, 2\)"),
        (good[1:], 259, r"tokens of shape \(1, 2\)"),
        (good[:, :, None], 259, r"tokens of shape \(2, 2, 1\)"),
        (good.int(), 259, r"token ids are torch\.int32 \(2, 2\); expected torch\.int16"),
        (good, 40_000, r"token ids are torch\.int16"),
        (good.float(), 259, r"token ids are torch\.float32"),
        (good, 258, "token ids from 0 to 258; expected ids from 0, and below 258"),
        (-good, 259, "token ids from -258 to 0"),
        (torch.tensor([[5, 7], [3, 3]], dtype=torch.int16), 259, "a token id comes twice at a position"),
    ):
        with pytest.raises(PayloadError, match=message):
            ensemble.read_tokens(wrong, (2, 2), num_outputs)
