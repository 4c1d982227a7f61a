"""How trained tensors travel: values as they are, or differences in a narrower dtype."""

import torch

from kilofed.federation import wire


def two_states() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    stream = torch.Generator().manual_seed(5)
    start = {"a": torch.randn(3, 4, generator=stream), "b": torch.randn(2, generator=stream)}
    end = {name: tensor + 0.01 * torch.randn(tensor.shape, generator=stream) for name, tensor in start.items()}
    return start, end


def test_what_the_server_keeps_for_itself_does_not_travel() -> None:
    start, _ = two_states()
    state = {**start, "server.momentum.a": torch.ones(3, 4)}
    assert set(wire.shared(state)) == {"a", "b"}
    assert set(wire.down(state, "float32")) == {"a", "b"}


def test_float32_travels_bit_for_bit() -> None:
    start, end = two_states()
    sent = wire.down(start, "float32")
    back = wire.arrive(start, wire.up(end, sent, "float32"))
    assert all(torch.equal(sent[name], start[name]) and torch.equal(back[name], end[name]) for name in start)


def test_bfloat16_travels_as_differences_named_so() -> None:
    start, end = two_states()
    sent = wire.down(start, "bfloat16")
    reply = wire.up(end, sent, "bfloat16")
    assert {tensor.dtype for tensor in [*sent.values(), *reply.values()]} == {torch.bfloat16}
    assert set(reply) == {"delta.a", "delta.b"}
    for name in start:
        assert torch.equal(reply["delta." + name], (end[name] - sent[name].float()).to(torch.bfloat16))


def test_a_difference_loses_less_than_a_value() -> None:
    start, _ = two_states()
    start = {name: tensor.to(torch.bfloat16).float() for name, tensor in start.items()}
    end = {name: tensor + 1e-4 for name, tensor in start.items()}
    back = wire.arrive(start, wire.up(end, wire.down(start, "bfloat16"), "bfloat16"))
    for name in start:
        off = (back[name] - end[name]).abs().max()
        assert off < (end[name].to(torch.bfloat16).float() - end[name]).abs().max()
        assert off < 1e-6


def test_what_arrives_is_float32() -> None:
    start, end = two_states()
    back = wire.arrive(start, wire.up(end, wire.down(start, "bfloat16"), "bfloat16"))
    assert {tensor.dtype for tensor in back.values()} == {torch.float32}
