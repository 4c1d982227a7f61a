"""Two-point steps: projected gradients against autograd, w0 unchanged, float32 vectors in 16-bit models, tied weights."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from kilofed.config.recipe import AdapterSpec, ModelSpec
from kilofed.data.examples import Example
from kilofed.errors import NonFiniteLoss
from kilofed.models import loading, training
from kilofed.zeroth import two_point
from kilofed.zeroth.directions.pool import SeedPool
from kilofed.zeroth.directions.spec import DirectionsError
from kilofed.zeroth.two_point import PerturbedModel, Point, StepSettings

K = 64
POOL = SeedPool(K, 7)
BATCH = [Example(input_ids=list(range(3, 15)), labels=[-100] * 4 + list(range(7, 15)), prompt_ids=[], references=[])]


@pytest.fixture(scope="module")
def tiny(tiny_model) -> nn.Module:
    return loading.load_model(ModelSpec(str(tiny_model)), AdapterSpec(kind="full"), 0)


def perturbed_of(model: nn.Module) -> PerturbedModel:
    return PerturbedModel(model, loading.trained(model), K)


def origin(a: dict[int, float] | None = None) -> Point:
    coefficients = np.zeros(K, np.float32)
    for k, value in (a or {}).items():
        coefficients[k] = value
    return Point((POOL.at(coefficients),))


def bits(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_perturbed_forward_equals_that_of_the_merged_model(tiny: nn.Module) -> None:
    perturbed, point = perturbed_of(tiny), origin({3: 0.02, 40: -0.05})
    batch, before = training.collate(BATCH), bits(tiny)
    merged = perturbed_of(copy.deepcopy(tiny)).merge(point)
    with torch.inference_mode(), perturbed.at(point) as model:
        perturbed_loss = training.loss(model, batch)
    assert perturbed_loss == training.loss(merged, batch)
    assert perturbed_loss != training.loss(tiny, batch)
    assert same(bits(tiny), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny.modules())


def test_tied_weights_are_one_slot_and_move_together(tiny: nn.Module) -> None:
    perturbed = perturbed_of(tiny)
    assert tiny.lm_head.weight is tiny.model.embed_tokens.weight
    assert sum("embed_tokens" in slot.name or "lm_head" in slot.name for slot in perturbed.layout.slots) == 1
    with perturbed.at(origin({1: 0.5})):
        seen = []
        for module in (tiny.model.embed_tokens, tiny.lm_head):
            hook = module.register_forward_pre_hook(lambda m, _: seen.append(m.weight.clone()))
            with torch.inference_mode():
                module(torch.zeros(1, dtype=torch.long) if not seen else torch.zeros(1, 16))
            hook.remove()
    assert torch.equal(*seen)
    assert not torch.equal(seen[0], tiny.lm_head.weight)


@pytest.mark.parametrize("k", [0, 33])
def test_the_projected_gradient_tends_to_the_directional_derivative(tiny: nn.Module, k: int) -> None:
    batch = training.collate(BATCH)
    training.loss(tiny, batch).backward()
    exact = 0.0
    for slot in perturbed_of(tiny).layout.slots:
        p = loading.trained(tiny)[slot.name]
        z = POOL.direction(k, p.numel(), first_block=slot.first_block)
        exact += float((p.grad.flatten() * z).sum())
    tiny.zero_grad(set_to_none=True)
    off = [
        abs(two_point.projected_gradient(perturbed_of(tiny), origin(), k, batch, StepSettings(eps, 0.0))[0] - exact)
        for eps in (1e-2, 1e-3)
    ]
    assert off[1] < 0.1 * off[0]
    assert off[1] < 2e-3 * (1 + abs(exact))


def test_steps_with_learning_rate_zero_change_nothing(tiny: nn.Module) -> None:
    before, point = bits(tiny), origin({5: 0.01})
    found = two_point.take_steps(
        perturbed_of(tiny), point, [n % K for n in range(100)], [BATCH] * 100, StepSettings(1e-3, 0.0)
    )
    assert same(bits(tiny), before)
    assert np.array_equal(found.end.chain[-1].a, point.chain[-1].a)
    assert np.abs(found.gradients).min() > 0


def test_steps_lower_the_loss(tiny: nn.Module) -> None:
    batch, perturbed = training.collate(BATCH), perturbed_of(tiny)
    found = two_point.take_steps(perturbed, origin(), list(range(K)), [BATCH] * K, StepSettings(1e-3, 2e-3))
    with torch.inference_mode(), perturbed.at(found.end) as model:
        assert training.loss(model, batch) < training.loss(tiny, batch) or training.loss(model, batch) < found.loss


def test_a_loss_that_is_not_finite_is_skipped_and_counted(tiny: nn.Module) -> None:
    calls = []

    def broken(model: nn.Module, batch: training.Batch) -> torch.Tensor:
        calls.append(1)
        return training.loss(model, batch) * (math.nan if len(calls) == 3 else 1.0)

    found = two_point.take_steps(
        perturbed_of(tiny), origin(), [1, 2, 3], [BATCH] * 3, StepSettings(1e-3, 1e-3, objective=broken)
    )
    assert found.skipped == (1,)
    assert found.gradients[1] == 0 != found.gradients[2]
    assert found.end.chain[-1].a[2] == 0
    assert math.isfinite(found.loss)
    with pytest.raises(NonFiniteLoss, match="none of 2 steps"):
        two_point.take_steps(
            perturbed_of(tiny), origin(), [1, 2], [BATCH] * 2, StepSettings(1e-3, 1e-3, max_gradient=1e-12)
        )


class Small(nn.Module):
    """A norm and a layer with a bias: what vectors there are in language models."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(32), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(x))


def test_vectors_of_a_16_bit_model_move_in_float32() -> None:
    torch.manual_seed(0)
    model = Small().to(torch.bfloat16)
    perturbed, x = perturbed_of(model), torch.randn(4, 32).to(torch.bfloat16)
    # bfloat16 has no number between 1 and 1.0078, so this step would vanish from the norm.
    near = {name: tensor.clone() for name, tensor in perturbed.weights(origin({0: 1e-4}))}["norm.weight"]
    assert near.dtype == torch.float32
    assert not torch.equal(near, torch.ones(32))
    point = origin({2: 0.03})
    weights = {name: tensor.double() for name, tensor in perturbed.weights(point)}
    with torch.inference_mode(), perturbed.at(point):
        found = model(x)
    wide = nn.functional.layer_norm(x.double(), (32,), weights["norm.weight"], weights["norm.bias"]).to(torch.bfloat16)
    exact = wide.double() @ weights["linear.weight"].T + weights["linear.bias"]
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).abs().max() < 0.02


def test_an_eps_that_vanishes_in_16_bits_is_refused() -> None:
    model = Small().to(torch.bfloat16)
    with pytest.raises(
        DirectionsError, match=r"eps is 1e-08, which changes only .* linear\.weight in bfloat16: raise eps"
    ):
        perturbed_of(model).check_eps(POOL, 1e-8)
    perturbed_of(model).check_eps(POOL, 1e-2)
    perturbed_of(Small()).check_eps(POOL, 1e-8)


def test_a_chain_of_positions_is_one_rebuild_after_the_other() -> None:
    model, other = Small(), SeedPool(K, 8)
    perturbed = perturbed_of(model)
    first, second = POOL.at(np.full(K, 0.01, np.float32)), other.at(np.full(K, -0.02, np.float32))
    folded = perturbed_of(copy.deepcopy(model))
    folded.merge(Point((first,)))
    both = {name: tensor.clone() for name, tensor in perturbed.weights(Point((first, second)))}
    for name, tensor in folded.weights(Point((second,))):
        assert torch.equal(tensor, both[name])


def test_the_digest_tells_any_weight_or_name_apart() -> None:
    torch.manual_seed(1)
    model = Small()
    perturbed, digest = perturbed_of(model), perturbed_of(model).digest(origin())
    assert perturbed_of(copy.deepcopy(model)).digest(origin()) == digest
    assert perturbed.digest(origin({0: 1e-3})) != digest
    model.linear.bias.data[0] += 1e-6
    assert perturbed.digest(origin()) != digest


def test_a_seed_that_is_drawn_twice_moves_by_both_of_its_gradients(tiny: nn.Module) -> None:
    lr = 1e-3
    found = two_point.take_steps(perturbed_of(tiny), origin({9: 0.01}), [9, 4, 9], [BATCH] * 3, StepSettings(1e-3, lr))
    first, other, second = found.gradients.tolist()
    assert min(abs(first), abs(other), abs(second)) > 0
    assert found.end.chain[-1].a[9] == pytest.approx(0.01 - lr * (first + second), rel=1e-5)
    assert found.end.chain[-1].a[4] == pytest.approx(-lr * other, rel=1e-5)


def test_in_a_chain_of_pools_only_the_last_one_moves() -> None:
    folded, current = SeedPool(K, 1).at(np.full(K, 0.25, np.float32)), SeedPool(K, 2).at(np.zeros(K, np.float32))
    point = Point((folded, current))
    assert point.pool is current.pool
    moved, placed = point.moved(5, 0.5), point.at(np.full(K, 0.125, np.float32))
    for other in (moved, placed):
        assert other.chain[0] is folded
        assert other.pool is current.pool
        assert len(other.chain) == 2
    assert moved.chain[1].a.tolist() == [0.5 * (k == 5) for k in range(K)]
    assert placed.chain[1].a.tolist() == [0.125] * K


def test_weights_can_be_read_after_a_forward_without_gradients(tiny: nn.Module) -> None:
    perturbed, point, batch = perturbed_of(tiny), origin({3: 0.02}), training.collate(BATCH)
    before = perturbed_of(tiny).digest(point)
    with torch.inference_mode(), perturbed.at(point) as model:
        training.loss(model, batch)
    assert perturbed.digest(point) == before
    assert len(before) == 8
