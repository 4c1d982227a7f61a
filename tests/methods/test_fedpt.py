"""FedPT without its server phase is FedAvg; teachers do not move with their student; clients never see the large model."""

import json
from pathlib import Path

import pytest
import torch
from tests.conftest import stated
from tests.loopback import served
from torch import nn

import kilofed
from kilofed.config.fields import Value
from kilofed.config.recipe import ModelSpec, Recipe
from kilofed.config.tables import changed
from kilofed.distillation import losses
from kilofed.errors import BudgetSpent, ModelError, RecipeError
from kilofed.federation.address import Address
from kilofed.federation.method import method_names
from kilofed.federation.workload import RunPreview
from kilofed.methods import fedpt
from kilofed.methods.fedpt import FedPT
from kilofed.models import evaluation, loading, training
from kilofed.payload import Payload
from kilofed.proxy.large_model import open_large_model
from kilofed.proxy.model import ProxyModel
from kilofed.proxy.spec import LargeSpec
from kilofed.runs.loop import resume
from kilofed.runs.sites import Sites, open_handler
from kilofed.serving import chat

NEVER = {"distillation": "none"}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.arange(3, 15)[None]).logits


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_without_its_server_phase_it_is_fedavg_bit_for_bit(federate, kind: str) -> None:
    same: dict[str, Value] = {"adapter.kind": kind, "data.public_share": 0.2}
    steered, plain = federate("fedpt", overrides=same, **NEVER), federate("fedavg", overrides=same)
    assert steered.content == plain.content


def test_the_server_phase_starts_from_fedavg(federate) -> None:
    # What is thrown away leaves the average; a phase that is kept leaves something else.
    same: dict[str, Value] = {"data.public_share": 0.2}
    average = federate("fedavg", rounds=1, overrides=same).server.state
    thrown = federate("fedpt", rounds=1, lr=9.0, steps=6, tolerance=0.0, alpha=-5.0).server.state
    assert not thrown[fedpt.PHASES][0, 3]
    assert all(torch.equal(thrown[name], average[name]) for name in average)
    kept = federate("fedpt", rounds=1).server.state
    assert kept[fedpt.PHASES][0, 3]
    assert not all(torch.equal(kept[name], average[name]) for name in average)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_what_is_delivered_is_large_plus_alpha_times_what_was_learnt(federate, tiny_large: Path, kind: str) -> None:
    found = federate("fedpt", alpha=0.7, overrides={"adapter.kind": kind}, fresh=True)
    proxy = found.sites.method.deliver(found.server)
    assert isinstance(proxy, ProxyModel)
    large = logits(loading.load_base(ModelSpec(str(tiny_large))))
    base = logits(loading.load_base(found.recipe.model))
    tuned = logits(found.sites.method.trained(found.server))
    assert not torch.allclose(tuned, base)
    torch.testing.assert_close(logits(proxy), large + 0.7 * (tuned - base), rtol=1e-4, atol=1e-5)


def test_the_base_of_a_full_model_stays_what_it_was_in_every_round(federate) -> None:
    found = federate("fedpt", overrides={"adapter.kind": "full"}, fresh=True)
    base = found.sites.method.deliver(found.server).base
    untouched = loading.load_base(found.recipe.model)
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), untouched.parameters(), strict=True))
    assert all(
        a.data_ptr() != b.data_ptr() for a, b in zip(base.parameters(), found.server.model.parameters(), strict=True)
    )


def test_the_small_base_and_the_small_tuned_model_share_their_weights(federate) -> None:
    found = federate("fedpt")
    proxy = found.sites.method.deliver(found.server)
    assert proxy.base is None
    assert proxy.tuned is found.server.model is found.sites.store.model(found.recipe.model)


def test_the_teacher_is_never_the_students_own_graph(federate, monkeypatch: pytest.MonkeyPatch) -> None:
    # Scores are whole before the first step, carry no graph, and are those of the average, not of the moving student.
    asked: list[tuple[bool, bool]] = []
    loss = losses.KL["forward"]

    def watched(teacher, student, temperature=1.0):
        asked.append((teacher.log_probs_NK.requires_grad, student.requires_grad))
        return loss(teacher, student, temperature)

    monkeypatch.setitem(losses.KL, "forward", watched)
    found = federate("fedpt", rounds=1, steps=3, fresh=True)
    assert asked == [(False, True)] * 3
    assert all(p.grad is None for p in found.server.cache["large"].model.parameters())


def test_a_large_model_that_is_the_small_one_and_alpha_1_teaches_nothing(federate, tiny_model: Path) -> None:
    # large + 1 (tuned - base) with large = base is the student itself: the KL and its gradient are 0.
    same = {"large": str(tiny_model), "top_k": 0, "lr": 1e-2}
    found = federate("fedpt", rounds=1, **same).server.state
    plain = federate("fedpt", rounds=1, **same, **NEVER).server.state
    before, after = found[fedpt.PHASES][0, 1:3].tolist()
    assert after == pytest.approx(before, abs=0.02)  # float16 scores leave a little for Adam to chase.
    assert torch.cat([(found[name] - plain[name]).abs().flatten() for name in plain]).mean() < 0.02


@pytest.mark.parametrize("distil", ["forward", "reverse"])
def test_a_server_phase_brings_the_small_model_nearer_to_its_teacher(federate, distil: str) -> None:
    found = federate("fedpt", rounds=0, fresh=True, distillation=distil, steps=40, lr=5e-3, alpha=0.0)
    method, server = found.sites.method, found.server
    rows = method.public_rows(server)[0]
    batch = training.collate(rows)

    def distance() -> float:
        with torch.inference_mode():
            teacher, _ = training.token_logits(server.cache["large"].model, batch)
            student, _ = training.token_logits(method.trained(server), batch)
        return losses.KL[distil](teacher, student).mean().item()

    server.round = 1
    method.deliver(server)
    before = distance()
    method._distil(server)
    assert distance() < 0.95 * before


def test_a_small_model_is_never_left_worse_on_held_out_public_rows(federate) -> None:
    found = federate("fedpt", tolerance=0.0, lr=0.3, steps=5)
    for _, before, after, kept in found.server.state[fedpt.PHASES].tolist():
        assert bool(kept) == (after <= before)
    assert len(found.server.state[fedpt.PHASES]) == 2


def test_public_rows_that_judge_are_not_taught_and_no_client_holds_any(federate) -> None:
    found = federate("fedpt", rounds=0)
    taught, judging = found.sites.method.public_rows(found.server)
    held = [e for client in found.sites.client_ids() for e in found.sites.corpus.train_examples(client)]
    held += [e for client in found.sites.client_ids() for e in found.sites.corpus.test_examples(client)]
    parts = [{tuple(e.input_ids) for e in part} for part in (taught, judging, held)]
    assert all(parts)
    assert not parts[0] & parts[1]
    assert not (parts[0] | parts[1]) & parts[2]


def test_teaching_whole_rows_reaches_prompts_too(federate) -> None:
    some, every = (federate("fedpt", rounds=0, tokens=kind) for kind in ("answers", "all"))
    counts = [
        sum(training.collate([e]).num_targets for e in f.sites.method.public_rows(f.server)[0]) for f in (some, every)
    ]
    assert counts[1] > counts[0]


def test_clients_never_load_the_large_model(federate, tmp_path: Path) -> None:
    missing = str(tmp_path / "there-is-none")
    found = federate("fedpt", rounds=0)
    recipe = changed(found.recipe, {"method.large": missing})
    ask = Payload(found.server.state, Address("fit", "mean", 1, 0).scalars)
    # What a worker process opens is the same handler; a client that touched the large model would fail here.
    sites = Sites(recipe)
    small = sum(p.numel() for p in loading.load_model(recipe.model, recipe.adapter, 0).parameters())
    assert "train_loss" in Payload.decode(sites.handle(0, ask.encode())).scalars
    assert len(sites.store) == 1
    assert sum(p.numel() for p in sites.store.model(recipe.model).parameters()) == small
    with pytest.raises(ModelError, match="there-is-none"):
        sites.method.deliver(federate("fedpt", rounds=0, large=missing, fresh=True).server)


@pytest.mark.slow
def test_a_worker_process_works_without_the_large_model(tiny_table, tiny_large: Path, tmp_path: Path) -> None:
    table = {**tiny_table, "engine": {"name": "pool", "workers": 1}}
    table["data"] = {**table["data"], "public_share": 0.2}
    table["method"] = {"name": "fedpt", "large": str(tiny_large), "steps": 2, "lr": 1e-2, "tolerance": 9.0}
    pooled = kilofed.run(kilofed.config.tables.from_table(table), out=tmp_path / "pool")
    alone = kilofed.run(kilofed.config.tables.from_table({**table, "engine": {}}), out=tmp_path / "alone")
    assert pooled.results.state_sha256 == alone.results.state_sha256


def run(table: dict[str, Value], large: str, out: Path, **fields: Value) -> kilofed.Run:
    method = {"name": "fedpt", "large": large, "steps": 2, "batch_size": 4, "lr": 1e-2, "tolerance": 9.0, **fields}
    data = {**table["data"], "public_share": 0.2}
    whole = {
        **table,
        "data": data,
        "method": method,
        "evaluate": {"generate": 1, "max_new_tokens": 4, "baselines": []},
    }
    return kilofed.run(kilofed.config.tables.from_table(whole), out=out)


@pytest.mark.slow
def test_a_run_shows_the_parts_beside_the_whole_and_every_command_reads_it(
    tiny_table, tiny_large: Path, tmp_path: Path
) -> None:
    done = run(tiny_table, str(tiny_large), tmp_path / "run")
    assert set(done.rows) == {"federated", "small tuned", "large base"}
    titles = [chart.title for chart in done.results.charts]
    assert titles == ["Strength of the steering", "Server phases"]
    sweep = dict(done.results.charts[0].lines["steered large model"])
    assert len(sweep) == 9
    page = (tmp_path / "run" / "report.html").read_text()
    assert "small tuned" in page
    assert "Strength of the steering" in page
    model, _ = done.model()
    assert isinstance(model, ProxyModel)
    saved = tmp_path / "run" / "adapter"
    assert (saved / "adapter_model.safetensors").stat().st_size < tiny_large.joinpath(
        "model.safetensors"
    ).stat().st_size
    answers = tmp_path / "talk.txt"
    with answers.open("w") as to, (tmp_path / "lines.txt").open("w+") as source:
        source.write("add 1 and 1\n")
        source.seek(0)
        chat.converse(tmp_path / "run", max_new_tokens=3, source=source, to=to)
    assert answers.read_text().endswith("\n")


@pytest.mark.slow
def test_the_run_ends_when_the_steered_model_meets_its_target(tiny_table, tiny_large: Path, tmp_path: Path) -> None:
    early = run({**tiny_table, "rounds": 3}, str(tiny_large), tmp_path / "early", target_loss=1e9)
    lines = [json.loads(line) for line in (tmp_path / "early" / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1]
    assert lines[-1]["public_proxy_loss"] <= 1e9
    assert lines[-1]["loss"]
    (tmp_path / "early" / "results.json").unlink()
    assert resume(tmp_path / "early").results.state_sha256 == early.results.state_sha256
    late = run({**tiny_table, "rounds": 2}, str(tiny_large), tmp_path / "late", target_loss=1e-9)
    assert len((tmp_path / "late" / "metrics.jsonl").read_text().splitlines()) == 3
    assert late.rows["federated"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("distill_every", 0),
        ("steps", 0),
        ("temperature", 0.0),
        ("hard_label_weight", 1.5),
        ("validation_share", 1.0),
        ("top_k", -1),
    ],
)
def test_a_field_out_of_its_range_is_refused_before_any_work(federate, field: str, value: float) -> None:
    with pytest.raises(RecipeError, match=f"method.{field} is {value}"):
        federate("fedpt", rounds=0, **{field: value})


def test_distilling_without_public_rows_says_what_to_set(federate) -> None:
    with pytest.raises(RecipeError, match=r"set data\.public or data\.public_share, or method\.distillation=none"):
        federate("fedpt", rounds=0, overrides={"data.public_share": 0.0})
    assert federate("fedpt", rounds=0, overrides={"data.public_share": 0.0}, **NEVER).server.state


def test_a_large_model_with_another_tokeniser_is_refused_with_a_sentence(federate) -> None:
    found = federate("fedpt", rounds=0, large="builtin:large", fresh=True)
    with pytest.raises(ModelError, match="same tokeniser"):
        found.sites.method.deliver(found.server)


def test_an_api_that_tells_all_is_the_local_model(federate, tiny_large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KILOFED_API_KEY", raising=False)
    large = loading.load_base(ModelSpec(str(tiny_large)))
    local = federate("fedpt", rounds=1)
    with served(large) as there:
        api = {"path": there.url, "name": "large", "top_k": 259}
        asked = federate("fedpt", rounds=1, large=api)
        assert asked.metrics[-1]["api_requests"] > 0
        asked.server.close()
    keys = [name for name in local.server.state if not name.startswith("server.")]
    for name in keys:
        torch.testing.assert_close(asked.server.state[name], local.server.state[name], rtol=0.02, atol=2e-3)


@pytest.mark.slow
def test_a_budget_spent_in_the_middle_stops_the_run_and_another_one_resumes(
    tiny_table, tiny_large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KILOFED_API_KEY", raising=False)
    with served(loading.load_base(ModelSpec(str(tiny_large)))) as there:
        large = {"path": there.url, "name": "large", "top_k": 8, "max_requests": 6}
        with pytest.raises(BudgetSpent):
            run({**tiny_table, "rounds": 1}, large, tmp_path / "run")  # type: ignore[arg-type]
        sent = len(there.bodies)
        assert sent == 6
        with pytest.raises(BudgetSpent):
            resume(tmp_path / "run")
        assert len(there.bodies) == sent
        for number in range(20):  # Each time as much may be spent again; answers that came are not asked for twice.
            (tmp_path / "run" / "remote.jsonl").rename(tmp_path / f"{number}.jsonl")
            try:
                done = resume(tmp_path / "run")
            except BudgetSpent:
                continue
            break
        assert done.rows["federated"].loss > 0
        whole = run({**tiny_table, "rounds": 1}, {**large, "max_requests": 1000}, tmp_path / "whole")  # type: ignore[arg-type, dict-item]
        assert whole.results.state_sha256 == done.results.state_sha256


def test_the_trial_leaves_the_small_model_as_it_was(federate) -> None:
    found = federate("fedpt", rounds=0, fresh=True)
    before = loading.read_trained(found.server.model)
    rows, held_out = found.sites.corpus.train_examples(0), found.sites.corpus.test_examples(1)
    (said,) = found.sites.method.presentation().diagnose(found.server, rows, held_out)
    after = loading.read_trained(found.server.model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert ("likely to pay" in said.text and "NOT" not in said.text) == said.good


def test_the_trial_scores_as_evaluation_does(federate) -> None:
    found = federate("fedpt", rounds=0, alpha=0.5, fresh=True)
    held_out = [e for client in found.sites.client_ids() for e in found.sites.corpus.test_examples(client)]
    seen = found.sites.method.trial(found.server, found.sites.corpus.train_examples(0), held_out)
    large = found.sites.method.presentation().extra_models(found.server)["large base"]
    assert seen.large == pytest.approx(evaluation.score(large, held_out, 16).loss, rel=1e-5)
    assert seen.small == pytest.approx(evaluation.score(found.server.model, held_out, 16).loss, rel=1e-5)
    assert seen.tuned < seen.small


def test_the_method_is_found_and_its_handler_opens_from_text(tiny_recipe: Recipe, tmp_path: Path) -> None:
    assert "fedpt" in method_names()
    table = kilofed.config.tables.to_table(changed(tiny_recipe, {"method": "fedpt"}))
    assert callable(open_handler(json.dumps(table), str(tmp_path)))


def test_an_api_must_be_told_which_model(tiny_model: Path) -> None:
    with pytest.raises(ModelError, match=r"method\.large\.name is empty"):
        open_large_model(LargeSpec("http://127.0.0.1:9/v1"), ModelSpec(str(tiny_model)), None)


RULES = ("difference", "mix", "entropy_mix", "realign")


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_delivers_what_its_state_says_and_learns(federate, rule: str) -> None:
    found = federate("fedpt", rule=rule, alpha=0.5)
    method, server = found.sites.method, found.server
    proxy = method.deliver(server)
    assert proxy.rule.needs_base == (rule == "difference")
    assert logits(proxy).isfinite().all()
    fitted = {name for name in server.state if name.startswith((fedpt.SHARE, fedpt.NET))}
    assert len(fitted) == {"mix": 1, "entropy_mix": 4}.get(rule, 0)
    assert [("mix_weight" in metrics) for metrics in found.metrics] == [bool(fitted)] * 2
    assert len(server.state[fedpt.PHASES]) == 2


@pytest.mark.parametrize("rule", ["mix", "entropy_mix", "realign"])
def test_a_rule_s_run_continues_from_its_state_bit_for_bit(federate, rule: str) -> None:
    whole = federate("fedpt", rounds=2, rule=rule)
    first = federate("fedpt", rounds=1, rule=rule, fresh=True)
    state = {name: tensor.clone() for name, tensor in first.server.state.items()}
    again = federate("fedpt", rounds=2, rule=rule, done=1, state=state)
    assert again.content == whole.content


def test_strength_0_is_the_large_model_under_every_rule_and_1_the_tuned_one_where_there_is_no_base(
    federate, tiny_large: Path
) -> None:
    large = logits(loading.load_base(ModelSpec(str(tiny_large)))).log_softmax(-1)
    for rule in ("difference", "mix", "realign"):
        found = federate("fedpt", rounds=1, rule=rule, alpha=0.0, fit_share=False, **NEVER)
        torch.testing.assert_close(logits(found.sites.method.deliver(found.server)).log_softmax(-1), large)
    for rule in ("mix", "realign"):
        found = federate("fedpt", rounds=1, rule=rule, alpha=1.0, fit_share=False, **NEVER)
        tuned = logits(found.sites.method.trained(found.server)).log_softmax(-1)
        torch.testing.assert_close(logits(found.sites.method.deliver(found.server)).log_softmax(-1), tuned)


def test_a_realigned_reference_is_the_difference_over_the_small_base(federate, tiny_model: Path) -> None:
    # DeRa's case: the large model is the one that the clients start from.
    same = {"rounds": 1, "large": str(tiny_model), "alpha": 1.7, **NEVER}
    realigned, steered = (federate("fedpt", rule=rule, **same) for rule in ("realign", "difference"))
    one, other = (logits(found.sites.method.deliver(found.server)) for found in (realigned, steered))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_fitted_mix_is_no_worse_than_either_model_on_the_rows_it_was_fitted_on(federate) -> None:
    found = federate("fedpt", rounds=1, rule="mix", **NEVER)
    method, server = found.sites.method, found.server
    held_out = method.public_rows(server)[1]
    parts = method.parts(server)
    mixed = evaluation.score(method.deliver(server), held_out, 8).loss
    assert mixed <= min(evaluation.score(model, held_out, 8).loss for model in (parts.large, parts.tuned)) + 1e-4
    assert 0 <= float(server.state[fedpt.SHARE]) <= 1


@pytest.mark.parametrize("rule", ["entropy_mix", "realign"])
def test_a_rule_that_needs_all_scores_refuses_an_api_before_any_work(federate, rule: str) -> None:
    with pytest.raises(RecipeError, match=f"method.rule={rule} needs .* all tokens"):
        federate("fedpt", rounds=0, rule=rule, large={"path": "http://127.0.0.1:9/v1", "name": "large"})


def test_a_share_beyond_1_and_a_fit_without_public_rows_are_refused(federate) -> None:
    with pytest.raises(RecipeError, match=r"method.alpha is 1.5; with method.rule=mix it is a share"):
        federate("fedpt", rounds=0, rule="mix", fit_share=False, alpha=1.5)
    with pytest.raises(RecipeError, match="fitted rules need some"):
        federate("fedpt", rounds=0, rule="mix", overrides={"data.public_share": 0.0}, **NEVER)


def test_a_mix_over_an_api_that_tells_all_is_the_local_mix(
    federate, tiny_large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KILOFED_API_KEY", raising=False)
    local = federate("fedpt", rounds=1, rule="mix", **NEVER)
    with served(loading.load_base(ModelSpec(str(tiny_large)))) as there:
        api = {"path": there.url, "name": "large", "top_k": 259}
        asked = federate("fedpt", rounds=1, rule="mix", large=api, **NEVER)
        asked.server.close()
    assert float(asked.server.state[fedpt.SHARE]) == pytest.approx(float(local.server.state[fedpt.SHARE]), abs=0.011)


@pytest.mark.parametrize("rule", ["mix", "entropy_mix", "realign"])
def test_the_trial_of_a_rule_leaves_the_small_model_as_it_was(federate, rule: str) -> None:
    found = federate("fedpt", rounds=0, rule=rule, fresh=True)
    before = loading.read_trained(found.server.model)
    (diagnosis,) = found.sites.method.presentation().diagnose(
        found.server, found.sites.corpus.train_examples(0), found.sites.corpus.test_examples(1)
    )
    after = loading.read_trained(found.server.model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert "held-out loss" in diagnosis.text


@pytest.mark.parametrize(
    ("rule", "forwards_per_row"), [("difference", 0), ("realign", 0), ("mix", 2), ("entropy_mix", 2)]
)
def test_a_fit_is_foreseen_as_one_forward_of_the_large_and_the_small_model(
    federate, rule: str, forwards_per_row: int
) -> None:
    found = federate("fedpt", rounds=0, rule=rule, **NEVER)
    method, sites = found.sites.method, found.sites
    preview = RunPreview(found.recipe, found.server, sites.corpus.train_examples, sites.corpus.public_examples)
    work = method.costs().server(preview)
    held_out = method.public_rows(found.server)[1] if forwards_per_row else []
    assert sum(one.rows * one.times for one in work.passes) == forwards_per_row * len(held_out)
    assert not any(one.learns for one in work.passes)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["mix", "entropy_mix", "realign"])
def test_a_rule_runs_evaluates_resumes_and_chats(tiny_table, tiny_large: Path, tmp_path: Path, rule: str) -> None:
    done = run({**tiny_table, "rounds": 2}, str(tiny_large), tmp_path / "run", rule=rule, alpha=0.5)
    assert done.rows["federated"].loss > 0
    titles = [chart.title for chart in done.results.charts]
    assert ("Strength of the steering" in titles) == (rule != "entropy_mix")
    model, _ = done.model()
    assert isinstance(model, ProxyModel)
    assert not model.rule.needs_base
    with (tmp_path / "answers.txt").open("w") as to, (tmp_path / "lines.txt").open("w+") as source:
        source.write("add 1 and 1\n")
        source.seek(0)
        chat.converse(tmp_path / "run", max_new_tokens=3, source=source, to=to)
    assert (tmp_path / "answers.txt").read_text().endswith("\n")


def test_each_server_phase_teaches_the_next_stretch_of_rows(federate, monkeypatch: pytest.MonkeyPatch) -> None:
    taught: list[list[tuple[int, ...]]] = []
    score = fedpt.teacher_cache.score

    def noting(teacher, rows, **words):
        taught.append([tuple(row.input_ids) for row in rows])
        return score(teacher, rows, **words)

    monkeypatch.setattr(fedpt.teacher_cache, "score", noting)
    found = federate("fedpt", fresh=True, steps=1, batch_size=2, validation_share=0.2)
    rows = {tuple(row.input_ids) for row in found.sites.method.public_rows(found.server)[0]}
    assert len(rows) >= 4
    assert len(set(taught[0] + taught[1])) == 4  # No row comes twice before all have come once.


def test_defaults_and_bounds_are_those_that_runs_rely_on() -> None:
    assert stated(FedPT) == {
        "alpha": (1.0, ""),
        "fit_share": (True, ""),
        "fit_epochs": (10, "at least 1"),
        "distill_every": (1, "at least 1"),
        "temperature": (1.0, "above 0"),
        "steps": (10, "at least 1"),
        "batch_size": (8, "at least 1"),
        "lr": (5e-4, "above 0"),
        "hard_label_weight": (0.0, "from 0 to 1"),
        "top_k": (64, "at least 0"),
        "validation_share": (0.25, "above 0 and below 1"),
        "tolerance": (0.0, "at least 0"),
        "target_loss": (0.0, "at least 0"),
    }
