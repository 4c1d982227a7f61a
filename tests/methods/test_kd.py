"""KD-FedLLM: identities, clients with other models, refused inputs."""

import json
from pathlib import Path

import pytest
import torch
from tests.conftest import stated

from kilofed.config.fields import Value
from kilofed.config.recipe import Recipe
from kilofed.config.tables import changed
from kilofed.distillation import ensemble
from kilofed.distillation.passes import Distilled
from kilofed.engines.inprocess import InProcess
from kilofed.errors import ClientError, RecipeError
from kilofed.federation.cohort import Cohort, Rules
from kilofed.federation.ledger import Ledger
from kilofed.federation.workload import WHOLE, Message, RunPreview
from kilofed.methods.kd import KD
from kilofed.models import loading
from kilofed.payload import Payload
from kilofed.runs.sites import Sites

CLASSIFY: dict[str, Value] = {
    "data.task": "classify",
    "data.columns.text": "instruction",
    "data.columns.label": "client",
    "data.partition.kind": "iid",
    "data.partition.num_clients": 4,
}


def replies(found, round: int = 1) -> tuple[Payload, dict[int, Payload]]:
    """What the server asks in a round, and what each client answers."""
    method, server = found.sites.method, found.server
    rows = method.rows(server.public, server.seed, round)
    loading.write_trained(server.model, server.state)
    ask = method._ask(server.model, rows)
    cohort = Cohort(found.sites.client_ids(), InProcess(found.sites.client_ids(), found.sites.handle), Ledger(),
                    found.sites.policy, round=round)  # fmt: skip
    return ask, cohort.call("tune", ask, method._reply(ask.tensors["log_probs"]))


@pytest.mark.parametrize("overrides", [{}, CLASSIFY], ids=["tokens", "classes"])
def test_the_ensemble_of_one_client_is_its_own_scores(federate, overrides: dict[str, Value]) -> None:
    found = federate("kd", rounds=0, overrides=overrides, wire="float32", fresh=True)
    ask, answers = replies(found)
    teacher = found.sites.method.teacher(ask, answers[2])
    torch.testing.assert_close(teacher.log_probs_NB.float(), answers[2].tensors["log_probs"], rtol=1e-5, atol=1e-5)


def test_top_k_of_all_tokens_equals_full_scores(federate) -> None:
    """With k one below V the bucket of all other tokens holds a single token, so nothing is lost."""
    full = federate("kd", wire="float32", top_k=0, public_rows=2)
    almost = federate("kd", wire="float32", top_k=258, public_rows=2)
    beyond = federate("kd", wire="float32", top_k=9999, public_rows=2)
    assert beyond.content == full.content
    for name, tensor in full.server.state.items():
        torch.testing.assert_close(almost.server.state[name], tensor, rtol=1e-2, atol=1e-4)


def test_clients_that_do_not_train_do_not_change_the_server(federate) -> None:
    # SGD, since Adam also turns rounding errors into full steps.
    still = federate(
        "kd", overrides={"train.lr": 0.0, "train.optimizer": "sgd"}, client_distill_steps=0, wire="float32"
    )
    start = federate("kd", rounds=0).server.state
    for name, tensor in start.items():
        torch.testing.assert_close(still.server.state[name], tensor, rtol=0, atol=1e-5)


def test_a_client_keeps_its_own_adapter(federate, tmp_path: Path) -> None:
    found = federate("kd", folder=tmp_path)
    own = [Payload.decode(sorted((tmp_path / str(i)).rglob("*.safetensors"))[-1].read_bytes()) for i in (0, 1)]
    assert own[0].tensors.keys() == found.server.state.keys()
    assert any(not torch.equal(own[0].tensors[name], own[1].tensors[name]) for name in own[0].tensors)


def first_message(found) -> Message:
    """What the first client is sent and answers in the next round, numbers made up."""
    preview = RunPreview(found.recipe, found.server, lambda _: [], lambda _: [], [0, 1], found.done + 1)
    (message,) = found.sites.method.messages(preview)[0]
    return message


def test_only_scores_of_public_rows_are_sent(federate) -> None:
    found = federate("kd", rounds=1, public_rows=2)
    message = first_message(found)
    assert sorted(message.reply.tensors) == ["log_probs"]
    assert sorted(message.ask.tensors) == ["log_probs", "words"]
    num = sum(ensemble.num_positions(found.sites.method.rows(found.server.public, 0, 2)))
    assert message.reply.tensors["log_probs"].shape == (num, 9)


@pytest.mark.parametrize(("wire", "bound"), [("float16", 0.01), ("int8", ensemble.STEP)])
def test_the_wire_format_rounds_by_less_than_a_step(federate, wire: str, bound: float) -> None:
    scores = []
    for sent in ("float32", wire):
        found = federate("kd", rounds=0, wire=sent, fresh=True)
        ask, answers = replies(found)
        scores.append(found.sites.method.teacher(ask, answers[0]).log_probs_NB)
    in_range = scores[0] > -ensemble.RANGE
    assert 0 < float((scores[0] - scores[1])[in_range].abs().max()) <= bound


@pytest.mark.parametrize("words", [{"weighting": "entropy"}, {"weighting": "confidence"}, {"score_share": 0.5}])
def test_weights_are_sent_where_they_differ_between_positions(federate, words: dict[str, Value]) -> None:
    found = federate("kd", **words)
    message = first_message(found)
    assert sorted(message.reply.tensors) == ["counts", "log_probs"]
    assert found.content != federate("kd").content


@pytest.mark.parametrize("overrides", [{}, CLASSIFY], ids=["tokens", "classes"])
def test_clients_may_have_other_models(federate, tiny_large: Path, overrides: dict[str, Value]) -> None:
    found = federate("kd", overrides={**overrides, "method.models": {"1": str(tiny_large)}})
    shapes = [_sizes(found.sites.site(client).client.model) for client in (0, 1)]
    assert shapes[0] != shapes[1]
    assert found.metrics[-1]["train_loss"] > 0
    assert found.content != federate("kd", overrides=overrides).content


def test_a_classifying_client_may_have_another_tokeniser(federate, tiny_encoder: Path, tmp_path: Path) -> None:
    other = _with_another_word(tiny_encoder, tmp_path)
    found = federate("kd", rounds=1, overrides={**CLASSIFY, "method.models": {"0": str(other)}}, fresh=True)
    assert (
        found.sites.corpus.renderer_of(found.sites.method.client_model(found.recipe, 0))
        is not found.sites.corpus.renderer
    )
    assert found.metrics[-1]["train_loss"] > 0


def test_another_vocabulary_is_refused_for_language_models(federate, tiny_model: Path, tmp_path: Path) -> None:
    other = _with_another_word(tiny_model, tmp_path)
    with pytest.raises(ClientError, match=r"client 0: .*has another vocabulary than"):
        federate("kd", rounds=1, overrides={"method.models": {"0": str(other)}}, fresh=True)


def test_another_label_set_is_refused(federate, tiny_recipe: Recipe) -> None:
    found = federate("kd", rounds=0, overrides=CLASSIFY, fresh=True)
    ask, _ = replies(found)
    names = list(found.sites.corpus.classes)
    for labels, message in (
        ([*names, "more"], "its model scores 4 classes, the server's 3"),
        ([names[1], names[0], *names[2:]], "differ from the server's"),
    ):
        sites = Sites(changed(found.recipe, {"data.labels": list(labels)}))
        client = sites.site(0).client
        client.round = 1
        with pytest.raises(ClientError, match=message):
            sites.method.tune(client, ask)  # type: ignore[attr-defined]


def test_other_public_rows_are_refused(federate) -> None:
    found = federate("kd", rounds=0, public_rows=0, fresh=True)
    ask, _ = replies(found)
    client = Sites(changed(found.recipe, {"data.public_share": 0.3})).site(0).client
    client.round = 1
    with pytest.raises(ClientError, match="its public rows"):
        found.sites.method.tune(client, ask)


def test_no_public_rows_are_refused(federate) -> None:
    with pytest.raises(RecipeError, match=r"data\.public=FILE"):
        federate("kd", rounds=0, overrides={"data.public_share": 0.0}, fresh=True)


def test_a_client_with_logits_that_are_not_finite_is_named_and_left_out(federate, tmp_path: Path) -> None:
    """A token that occurs in public rows only makes the logits of one client's model NaN."""
    public = tmp_path / "public.jsonl"
    public.write_text("".join(json.dumps({"instruction": f"~ {n}"}) + "\n" for n in range(3)), "utf-8")
    found = federate("kd", rounds=0, overrides={**CLASSIFY, "data.public": str(public)}, public_rows=0, fresh=True)
    word = found.server.public[0].input_ids[0]

    def answer(number: int, body: bytes) -> bytes:
        weights = found.sites.site(number).client.model.get_input_embeddings().weight.data
        whole = weights[word].clone()
        weights[word] = torch.nan if number == 1 else whole
        reply = found.sites.handle(number, body)
        weights[word] = whole
        return reply

    cohort = Cohort(found.sites.client_ids(), InProcess(found.sites.client_ids(), answer), Ledger(),
                    found.sites.policy, round=1, rules=Rules(skip_failures=True))  # fmt: skip
    found.server.round = 1
    found.sites.method.round(found.server, cohort)
    assert list(cohort.failures) == [1]
    assert "NaN or infinite at 3 of 3 positions" in cohort.failures[1]
    assert all(bool(tensor.isfinite().all()) for tensor in found.server.state.values())


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", 0.0), ("score_share", 0.0), ("steps", 0), ("models", {"first": "x"})]
)
def test_fields_out_of_range_are_refused(federate, field: str, value: Value) -> None:
    with pytest.raises(RecipeError, match=field):
        federate("kd", rounds=0, fresh=True, **{field: value})


def _sizes(model: torch.nn.Module) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in loading.trained(model).values()]


def _with_another_word(model: Path, folder: Path) -> Path:
    """A copy of a model directory whose tokeniser spells one byte otherwise."""
    for item in model.iterdir():
        (folder / item.name).write_bytes(item.read_bytes())
    path = folder / "tokenizer.json"
    table = json.loads(path.read_text("utf-8"))
    words = table["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    path.write_text(json.dumps(table), "utf-8")
    return folder


def test_a_clients_scores_count_by_the_examples_it_trained_on(federate) -> None:
    # Two steps of at most four rows each, of clients with 2, 27 and 6 rows.
    by_rows, alike = (federate("kd", rounds=0, client_weighting=how, fresh=True) for how in ("examples", "uniform"))
    _, answers = replies(by_rows)
    assert [len(by_rows.sites.site(client).client.data) for client in answers] == [2, 27, 6]
    assert [answer.scalars["weight"] for answer in answers.values()] == [2 + 2, 4 + 4, 4 + 2]
    assert {answer.scalars["weight"] for answer in replies(alike)[1].values()} == {1}


def test_the_servers_model_is_its_own_again_after_clients_of_the_same_process(federate) -> None:
    """Where clients live elsewhere, nothing is written into the server's model while they work."""
    together, apart = (federate("kd", rounds=1, fresh=True, forgetful=away) for away in (False, True))
    assert together.sites.site(0).client.model is together.server.model
    assert together.content == apart.content


def test_defaults_and_bounds_are_those_that_runs_rely_on() -> None:
    assert stated(KD) == {
        "steps": (20, "at least 1"),
        "client_distill_steps": (10, "at least 0"),
        "lr": (0.001, "at least 0"),
        "batch_size": (16, "at least 1"),
        "temperature": (2.0, "above 0"),
        "top_k": (32, "at least 0"),
        "public_rows": (0, "at least 0"),
        "score_share": (1.0, "above 0 and at most 1"),
    }


def test_what_is_computed_is_foreseen_pass_by_pass(federate) -> None:
    # Three public rows in batches of four, one step of distilling and two of training; half of the rows are two.
    found = federate("kd", rounds=1, score_share=0.5)
    preview, costs = found.preview(), found.sites.method.costs()
    distil, *train, score = costs.client(preview, 2).passes
    assert (distil.rows, distil.learns, distil.kind) == (3, True, Distilled(8))
    assert [(one.rows, one.learns, one.kind) for one in train] == [(4, True, WHOLE), (2, True, WHOLE)]
    assert (score.rows, score.learns, score.kind) == (2, False, Distilled(8))
    first, *steps = costs.server(preview).passes
    assert (first.rows, first.learns, first.kind, first.times) == (3, False, Distilled(0), 2.0)
    assert [(one.rows, one.learns, one.kind) for one in steps] == [(3, True, Distilled(8))] * 2
    before = federate("kd", rounds=0, score_share=0.5)
    assert [one.kind for one in costs.client(before.preview(), 2).passes] == [WHOLE, WHOLE, Distilled(8)]
    every = federate("kd", rounds=0, top_k=0)
    assert every.sites.method.costs().server(every.preview()).passes[0].times == 1.0
