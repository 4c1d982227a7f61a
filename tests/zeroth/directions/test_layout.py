import pytest
import torch
from torch import nn

from kilofed.zeroth.directions.layout import layout_of
from kilofed.zeroth.directions.pool import SeedPool
from kilofed.zeroth.directions.spec import DirectionsError


def _model():
    model = nn.Module()
    model.out = nn.Linear(40, 60, bias=True)
    model.embed = nn.Embedding(60, 40)
    model.norm = nn.LayerNorm(40)
    model.out.weight = model.embed.weight
    return model


def _named(model):
    return model.named_parameters(remove_duplicate=False)


def test_tensors_start_at_blocks_in_name_order_and_ties_come_once():
    layout = layout_of(_named(_model()), 1024)
    assert [slot.names for slot in layout.slots] == [
        ("embed.weight", "out.weight"),
        ("norm.bias",),
        ("norm.weight",),
        ("out.bias",),
    ]
    assert [slot.first_block for slot in layout.slots] == [0, 3, 4, 5]
    assert layout.num_blocks == 6
    assert layout.by_name["out.weight"] is layout.by_name["embed.weight"]


def test_order_of_registration_does_not_matter():
    named = list(_named(_model()))
    assert layout_of(named, 1024).digest == layout_of(named[::-1], 1024).digest


def test_a_state_dict_shows_the_same_ties():
    model = _model()
    assert layout_of(model.state_dict().items(), 1024) == layout_of(_named(model), 1024)


def test_vectors_are_rebuilt_in_float32():
    layout = layout_of(_named(_model().to(torch.bfloat16)), 1024)
    assert layout.by_name["norm.weight"].dtype == torch.float32
    assert layout.by_name["embed.weight"].dtype == torch.bfloat16


def test_models_without_memory_have_a_layout_too():
    with torch.device("meta"):
        model = _model()
    assert layout_of(_named(model), 1024) == layout_of(_named(_model()), 1024)


def test_digest_sees_names_ties_shapes_dtypes_and_pool_size():
    tied = torch.zeros(3, 4)
    digests = {
        layout_of(tensors, num_seeds).digest
        for num_seeds in (64, 1024)
        for tensors in (
            [("a", torch.zeros(3, 4)), ("b", torch.zeros(3, 4))],
            [("a", torch.zeros(3, 4)), ("c", torch.zeros(3, 4))],
            [("a", torch.zeros(4, 3)), ("b", torch.zeros(3, 4))],
            [("a", torch.zeros(3, 4, dtype=torch.float16)), ("b", torch.zeros(3, 4))],
            [("a", tied), ("b", tied)],
        )
    }
    assert len(digests) == 10


def test_a_shard_rebuilds_the_same_bits_as_the_whole():
    tensors = {"a": torch.randn(30, 50), "b": torch.randn(7), "c": torch.randn(2000)}
    layout, pool = layout_of(tensors.items(), 1024), SeedPool(1024, 5)
    a = torch.randn(1024) * 1e-2
    flat = torch.zeros(layout.num_blocks * 1024)
    for name, tensor in tensors.items():
        start = layout.by_name[name].first_block * 1024
        flat[start : start + tensor.numel()] = tensor.flatten()
    whole = pool.rebuild(flat, a)
    for name, tensor in tensors.items():
        slot = layout.by_name[name]
        part = whole[slot.first_block * 1024 :][: tensor.numel()].view_as(tensor)
        assert torch.equal(pool.rebuild(tensor, a, first_block=slot.first_block), part)


def test_no_tensors_is_an_empty_layout():
    assert layout_of([], 64).num_blocks == 0


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("a", torch.zeros(2)), ("a", torch.zeros(2))], "two tensors are named a"),
        ([("a", torch.zeros(2, dtype=torch.int64))], "a is torch.int64"),
        ([("b", (whole := torch.zeros(8))), ("a", whole[2:])], "b and a share part of their memory"),
    ],
)
def test_tensors_without_a_place_are_refused(tensors, message):
    with pytest.raises(DirectionsError, match=message):
        layout_of(tensors, 64)


def test_neighbours_in_one_buffer_are_not_tied():
    buffer = torch.zeros(8)
    assert len(layout_of([("a", buffer[:4]), ("b", buffer[4:])], 64).slots) == 2
