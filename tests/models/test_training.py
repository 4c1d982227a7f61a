"""Local learning against closed forms and a bare transformers/torch loop."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from kilofed.config.recipe import AdapterSpec, ModelSpec, Recipe, TrainSpec
from kilofed.config.tables import changed
from kilofed.data.examples import IGNORED, Example
from kilofed.engines.inprocess import InProcess
from kilofed.errors import NonFiniteLoss
from kilofed.federation.cohort import Cohort
from kilofed.federation.ledger import Ledger
from kilofed.federation.parties import generator
from kilofed.models import loading, training
from kilofed.models.loading import load_base, load_model, read_trained
from kilofed.runs.sites import Sites

LORA = AdapterSpec(rank=2, alpha=4.0)
SGD = TrainSpec(optimizer="sgd", lr=0.1, batch_size=4)


def examples(count: int, seed: int = 0, longest: int = 20) -> list[Example]:
    """Rows of random bytes of unequal lengths; the first third of each is its prompt."""
    stream = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(6, longest, (1,), generator=stream))
        ids = torch.randint(3, 259, (length,), generator=stream).tolist()
        cut = length // 3
        rows.append(Example(ids, [IGNORED] * cut + ids[cut:], ids[:cut], ["x"]))
    return rows


def order(purpose: str) -> torch.Generator:
    return generator(0, 0, 0, purpose)


def fit(
    model: nn.Module, stretch: Sequence[list[Example]], spec: TrainSpec, objective: training.Loss = training.loss
) -> training.Fit:
    dropout = generator(0, 1, 0, "dropout")
    return training.fit(model, iter(stretch), spec, first=0, total=len(stretch), dropout=dropout, objective=objective)


def moved_from(model: nn.Module, start: Sequence[torch.Tensor]) -> float:
    return math.sqrt(training.distance_sq(model, start).item())


@pytest.fixture
def model(tiny_model: Path) -> nn.Module:
    return load_model(ModelSpec(str(tiny_model)), LORA, 0)


# Batches.


def test_padding_is_masked_and_has_no_target() -> None:
    rows = [Example([5, 6, 7], [IGNORED, 6, 7], [5], []), Example([8], [8], [], [])]
    batch = training.collate(rows)
    assert isinstance(batch, training.TokenBatch)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert batch.num_targets == 2  # The 8 has nothing before it that could predict it.
    assert batch.targets_N.tolist() == [6, 7]
    assert batch.positions_K.tolist() == [0, 1]


def test_one_row_is_a_batch_of_its_own_kind() -> None:
    # A single row of one class and one of one token have tensors that look alike.
    token, row = Example([5], [5], [], []), Example([5], [], [], [], 1)
    assert isinstance(training.collate([token]), training.TokenBatch)
    classes = training.collate([row])
    assert isinstance(classes, training.ClassBatch)
    assert classes.classes.tolist() == [1]
    with pytest.raises(AssertionError):
        training.collate([row, token])
    with pytest.raises(AssertionError):
        training.collate([token, row])


@pytest.mark.parametrize(("rows", "size"), [(10, 4), (9, 3), (3, 8), (1, 1)])
def test_every_example_is_met_once_per_epoch(rows: int, size: int) -> None:
    data, spec = examples(rows), TrainSpec(batch_size=size)
    per_epoch = training.num_steps(replace(spec, epochs=1), rows)
    met = [list(training.batches(data, spec, first=e * per_epoch, count=per_epoch, order=order)) for e in range(3)]
    for epoch in met:
        flat = [row for batch in epoch for row in batch]
        assert sorted(flat) == sorted(data)
        assert all(len(batch) <= size for batch in epoch)
    if rows > 3:
        assert met[0] != met[1] != met[2]


def test_any_part_of_the_sequence_of_batches_can_be_repeated() -> None:
    data, spec = examples(10), TrainSpec(batch_size=4)
    whole = list(training.batches(data, spec, first=0, count=20, order=order))
    for first, count in ((0, 1), (2, 5), (7, 13), (19, 1)):
        assert (
            list(training.batches(data, spec, first=first, count=count, order=order)) == whole[first : first + count]
        )


@pytest.mark.parametrize(("epochs", "rows", "expected"), [(0, 10, 5), (1, 10, 3), (2, 10, 6), (2, 8, 4), (3, 1, 3)])
def test_steps_per_round_are_as_the_recipe_says(epochs: int, rows: int, expected: int) -> None:
    assert training.num_steps(TrainSpec(steps=5, epochs=epochs, batch_size=4), rows) == expected


# Schedules.


def rates(spec: TrainSpec, total: int) -> list[float]:
    return [training.learning_rate(spec, step, total) for step in range(total)]


def test_a_constant_rate_stays() -> None:
    assert rates(TrainSpec(lr=0.5), 4) == [0.5] * 4


def test_a_linear_rate_falls_evenly_to_zero() -> None:
    assert rates(TrainSpec(lr=1.0, schedule="linear"), 4) == [1.0, 0.75, 0.5, 0.25]
    assert training.learning_rate(TrainSpec(lr=1.0, schedule="linear"), 4, 4) == 0.0


def test_a_cosine_rate_is_half_way_down_in_the_middle() -> None:
    found = rates(TrainSpec(lr=1.0, schedule="cosine"), 4)
    assert found == pytest.approx([1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)])


def test_a_warm_up_rises_to_the_peak_before_the_schedule_begins() -> None:
    assert rates(TrainSpec(lr=1.0, warmup=0.5), 8) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert rates(TrainSpec(lr=1.0, warmup=0.5, schedule="linear"), 8)[4:] == [1.0, 0.75, 0.5, 0.25]


def test_the_schedule_goes_on_across_rounds(model: nn.Module) -> None:
    spec = TrainSpec(lr=0.1, steps=2, schedule="linear", optimizer="sgd", batch_size=8)
    data = examples(8)

    def moved(round: int) -> float:
        start = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        training.fit_round(
            model, data, spec, round=round, num_rounds=100, order=order, dropout=generator(0, 0, 0, "dropout")
        )
        return moved_from(model, start)

    assert moved(100) < 0.05 * moved(1)


# Losses and gradients.


def test_the_loss_is_transformers_own(tiny_model: Path) -> None:
    base = load_base(ModelSpec(str(tiny_model)))
    batch = training.collate(examples(5))
    theirs = base(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    torch.testing.assert_close(training.loss(base, batch), theirs, rtol=1e-6, atol=1e-6)


def test_a_prompt_has_no_targets(model: nn.Module) -> None:
    def gradient(row: Example) -> torch.Tensor:
        """Of the loss with respect to the last layer's output, position by position."""
        kept: list[torch.Tensor] = []

        def keep(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
            output.retain_grad()
            kept.append(output)

        hook = model.get_submodule("base_model.model.model.norm").register_forward_hook(keep)
        training.loss(model, training.collate([row])).backward()  # type: ignore[no-untyped-call]
        hook.remove()
        assert kept[0].grad is not None
        return kept[0].grad[0]

    row = Example(list(range(10, 22)), [IGNORED] * 5 + list(range(15, 22)), [], [])
    size = gradient(row).abs().sum(-1)
    assert (size[:4] == 0).all()  # They predict prompt tokens.
    assert (size[4:11] > 0).all()  # They predict the answer.
    assert size[11] == 0  # It predicts nothing.


def test_accumulation_is_the_whole_batch(tiny_model: Path) -> None:
    data = examples(8)
    ends = []
    for parts in (1, 2, 3, 8):
        model = load_model(ModelSpec(str(tiny_model)), LORA, 0)
        found = fit(model, [data, data[:5]], replace(SGD, accumulation=parts))
        ends.append((found.loss, read_trained(model)))
        assert (found.num_steps, found.num_examples) == (2, 13)
    for loss, end in ends[1:]:
        assert loss == pytest.approx(ends[0][0], rel=1e-5)
        for name, tensor in end.items():
            torch.testing.assert_close(tensor, ends[0][1][name], rtol=1e-4, atol=1e-7)


def test_gradients_are_scaled_down_to_the_largest_norm(model: nn.Module) -> None:
    start = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    fit(model, [examples(4)], replace(SGD, lr=1.0, max_grad_norm=1e-3))
    assert moved_from(model, start) == pytest.approx(1e-3, rel=1e-3)


def test_distance_is_the_sum_of_squares(model: nn.Module) -> None:
    own = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach() - 0.5 for p in own]
    assert training.distance_sq(model, start).item() == pytest.approx(0.25 * sum(p.numel() for p in own), rel=1e-5)


def test_a_fit_counts_its_targets(model: nn.Module) -> None:
    data = examples(6)
    found = fit(model, [data[:4], data[4:]], SGD)
    assert (found.num_steps, found.num_examples) == (2, 6)
    assert found.num_tokens == sum(len(row.input_ids) - len(row.prompt_ids) for row in data)


def test_a_fit_leaves_no_gradients_and_global_randomness_as_it_was(model: nn.Module) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    fit(model, [examples(4)], SGD)
    assert torch.equal(torch.rand(1), expected)
    assert all(p.grad is None for p in model.parameters())
    assert not model.training


def test_dropout_is_a_function_of_its_stream(tiny_model: Path) -> None:
    def end(round: int) -> dict[str, torch.Tensor]:
        model = load_model(ModelSpec(str(tiny_model)), replace(LORA, dropout=0.5), 0)
        dropout = generator(0, round, 0, "dropout")
        training.fit(model, iter([examples(4)] * 2), SGD, first=0, total=2, dropout=dropout)
        return read_trained(model)

    one, again, other = end(1), end(1), end(2)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_keeps_the_weights_of_the_step_before(tiny_model: Path, bad: float) -> None:
    def breaking(at: int) -> training.Loss:
        calls: Iterator[int] = iter(range(100))
        return lambda model, batch: training.loss(model, batch) * (bad if next(calls) == at else 1.0)

    data = [examples(4, seed) for seed in range(3)]
    broken, sound = (load_model(ModelSpec(str(tiny_model)), LORA, 0) for _ in range(2))
    with pytest.raises(NonFiniteLoss, match=r"the loss is (nan|inf) at step 3"):
        fit(broken, data, SGD, breaking(2))
    fit(sound, data[:2], SGD)
    ends = read_trained(broken), read_trained(sound)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_weights_that_the_last_step_made_infinite_are_a_failure(model: nn.Module) -> None:
    steep = replace(SGD, lr=1e30, max_grad_norm=0.0)
    with pytest.raises(NonFiniteLoss, match="not finite after step 1"):
        fit(model, [examples(4)], steep, lambda model, batch: 1e30 * training.loss(model, batch))


def test_rows_without_targets_are_refused(model: nn.Module) -> None:
    with pytest.raises(NonFiniteLoss, match="the loss is nan"):
        fit(model, [[Example([5], [5], [], [])]], SGD)


# One client, one round of FedAvg is a bare loop.


def bare_loop(model: nn.Module, batches: Sequence[list[Example]], lr: float) -> None:
    """What anybody would write with transformers and torch alone."""
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=lr, weight_decay=0.0)
    model.train()
    for rows in batches:
        width = max(len(row.input_ids) for row in rows)
        ids = torch.tensor([row.input_ids + [0] * (width - len(row.input_ids)) for row in rows])
        mask = torch.tensor([[1] * len(row.input_ids) + [0] * (width - len(row.input_ids)) for row in rows])
        labels = torch.tensor([row.labels + [-100] * (width - len(row.labels)) for row in rows])
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        learnt = labels[:, 1:] != -100
        nn.functional.cross_entropy(logits[learnt], labels[:, 1:][learnt]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_one_client_and_one_round_of_fedavg_is_a_bare_loop_bit_for_bit(tiny_recipe: Recipe, kind: str) -> None:
    words = {"adapter.kind": kind, "data.partition.kind": "iid", "data.partition.num_clients": 1}
    recipe = changed(tiny_recipe, {**words, "rounds": 1, "train.steps": 9})
    sites = Sites(recipe)
    server = replace(sites.server(), round=1)
    sites.method.setup(server)
    engine = InProcess([0], sites.handle)
    sites.method.round(server, Cohort([0], engine, Ledger(), sites.policy, round=1))

    plain: nn.Module = AutoModelForCausalLM.from_pretrained(recipe.model.path, dtype=torch.float32)
    if kind == "lora":
        plain = loading.add_adapter(plain, recipe.adapter, recipe.seed)  # type: ignore[arg-type]
    data, spec = sites.corpus.train_examples(0), recipe.train
    batches = training.batches(
        data, spec, first=0, count=9, order=lambda purpose: generator(recipe.seed, 0, 0, purpose)
    )
    bare_loop(plain, list(batches), spec.lr)
    expected = read_trained(plain)
    assert set(server.state) == set(expected)
    assert all(torch.equal(server.state[name], expected[name]) for name in expected)


def test_the_loss_over_classes_is_that_of_transformers(tiny_encoder: Path) -> None:
    model = loading.load_classifier(ModelSpec(str(tiny_encoder)), "stock", 0, ("a", "b", "c"))
    rows = [Example([5, 6, 7], [], [], [], 2), Example([8], [], [], [], 0)]
    batch = training.collate(rows)
    assert isinstance(batch, training.ClassBatch)
    theirs = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.classes).loss
    torch.testing.assert_close(training.loss(model, batch), theirs)
    assert batch.num_targets == 2


def test_a_row_without_a_class_does_not_count(tiny_encoder: Path) -> None:
    model = loading.load_classifier(ModelSpec(str(tiny_encoder)), "mean", 0, ("a", "b", "c"))
    known = [Example([5, 6, 7], [], [], [], 2)]
    batch = training.collate([*known, Example([8, 9, 10], [], [], [], IGNORED)])
    assert batch.num_targets == 1
    torch.testing.assert_close(training.loss(model, batch), training.loss(model, training.collate(known)))


def test_each_round_goes_on_where_the_one_before_it_ended(model: nn.Module) -> None:
    data, spec = examples(10), replace(SGD, steps=3)
    met: list[list[list[int]]] = []

    def noting(model: nn.Module, batch: training.Batch) -> torch.Tensor:
        met.append(batch.input_ids.tolist())
        return training.loss(model, batch)

    for round in (1, 2):
        dropout = generator(0, round, 0, "dropout")
        training.fit_round(
            model, data, spec, round=round, num_rounds=2, order=order, dropout=dropout, objective=noting
        )
    whole = training.batches(data, spec, first=0, count=6, order=order)
    assert met == [training.collate(rows).input_ids.tolist() for rows in whole]
    assert met[:3] != met[3:]


def test_a_schedule_falls_from_round_to_round(tiny_model: Path) -> None:
    data, spec = examples(10), replace(SGD, steps=3, schedule="linear", max_grad_norm=1.0)

    def moved(round: int) -> float:
        model = load_model(ModelSpec(str(tiny_model)), LORA, 0)
        start = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        dropout = generator(0, round, 0, "dropout")
        training.fit_round(model, data, spec, round=round, num_rounds=3, order=order, dropout=dropout)
        return moved_from(model, start)

    assert moved(1) > 1.5 * moved(2) > 2 * moved(3) > 0


@pytest.mark.parametrize(("parts", "sizes"), [(1, [8]), (2, [4, 4]), (3, [3, 3, 2])])
def test_a_batch_is_computed_in_as_many_parts_as_the_recipe_says(
    model: nn.Module, parts: int, sizes: list[int]
) -> None:
    seen: list[int] = []

    def noting(model: nn.Module, batch: training.Batch) -> torch.Tensor:
        seen.append(len(batch.input_ids))
        return training.loss(model, batch)

    fit(model, [examples(8)], replace(SGD, accumulation=parts), noting)
    assert seen == sizes
