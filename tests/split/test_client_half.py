"""The client's half: steps equal to training on the whole model, and resuming from the state that a process left."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kilofed.config.recipe import AdapterSpec, ModelSpec, TrainSpec
from kilofed.data.examples import IGNORED, Example
from kilofed.errors import ClientError
from kilofed.federation.parties import Client
from kilofed.models import loading, training
from kilofed.models.halves import Halves
from kilofed.payload import Payload
from kilofed.split import activation_codec
from kilofed.split.client_half import TURN, ClientHalf

TRAIN = TrainSpec(steps=2, batch_size=3, lr=0.1, schedule="constant")


def rows(lengths: list[int]) -> list[Example]:
    """Rows of random tokens; the first two of each are not targets."""
    source = torch.Generator().manual_seed(0)
    tokens = [torch.randint(3, 259, (length,), generator=source).tolist() for length in lengths]
    return [Example(row, [IGNORED] * 2 + row[2:], [], []) for row in tokens]


@pytest.fixture
def client(tiny_model: Path) -> Client:
    """A client of ten rows of unequal lengths, in round 2 of 3; the whole model, cut after its first block."""
    model = loading.load_model(ModelSpec(str(tiny_model)), AdapterSpec(rank=2, dropout=0.3), 0)
    with torch.no_grad():
        for name, parameter in loading.trained(model).items():
            # B is zero at the start, which would hide dropout and leave A without a gradient.
            parameter.add_(0.1 * (".0." in name))
    return Client(5, rows([9, 4, 6, 5, 11, 3, 7, 8, 4, 10]), TRAIN, num_rounds=3, seed=1, model=model, round=2)


def ask(turn: int, tensors: dict[str, torch.Tensor] | None = None) -> Payload:
    return Payload(tensors or {}, {TURN: turn})


def own_tensors(client: Client) -> dict[str, torch.Tensor]:
    return {name: value for name, value in loading.read_trained(client.model).items() if ".0." in name}


def gradient(num_rows: int) -> dict[str, torch.Tensor]:
    """An encoded gradient at the cut."""
    source = torch.Generator().manual_seed(num_rows)
    return activation_codec.encode(torch.randn(num_rows, 16, generator=source), "float32")[0]


def run_round(client: Client, restart: Callable[[Client], None]) -> ClientHalf:
    """Two steps, then a message that has the second step's gradient; `restart` is called between messages."""
    sent: dict[str, torch.Tensor] = own_tensors(client)
    for turn in range(2):
        half = ClientHalf.resume(client, 1, ask(turn, sent))
        half.receive(ask(turn, sent), "float32")
        batch, rows_ND = half.forward(turn)
        assert rows_ND.shape == (int(batch.attention_mask.sum()), 16)
        sent = gradient(len(rows_ND))
        half.save()
        restart(client)
    half = ClientHalf.resume(client, 1, ask(2))
    half.receive(ask(2, sent), "float32")
    return half


def test_hidden_states_are_those_of_the_batch_at_the_cut(client: Client) -> None:
    client.model.eval()
    half = ClientHalf.resume(client, 1, ask(0, own_tensors(client)))
    batch, rows_ND = half.forward(1)
    again = training.batches(client.data, TRAIN, first=3, count=1, order=client.order)  # Step 1 of round 2.
    assert torch.equal(batch.input_ids, training.collate(next(again)).input_ids)
    without = Client(5, client.data, TRAIN, num_rounds=3, seed=1, model=client.model, round=2)
    assert torch.equal(rows_ND, ClientHalf.resume(without, 1, ask(0, own_tensors(client))).forward(1)[1])
    hidden = Halves(client.model.eval(), 1).below(batch.input_ids, batch.attention_mask)
    assert not torch.equal(rows_ND, activation_codec.unpad(hidden, batch.attention_mask))  # Dropout is on in training.


def test_a_restarted_process_continues_with_equal_bits(client: Client, tiny_model: Path) -> None:
    before = own_tensors(client)
    kept = run_round(client, lambda client: None)
    client.state, client.cache = {}, {}

    def restart(client: Client) -> None:
        client.cache = {}

    restarted = run_round(client, restart)
    for name, tensor in kept.learner.read().items():
        assert torch.equal(restarted.learner.read()[name], tensor)
        assert not torch.equal(before[name], tensor)
    assert (
        restarted.totals.tolist() == kept.totals.tolist() == [4, 2, 0]
    )  # Of ten rows, the epoch's last batch has one.
    assert all(torch.equal(before[name], tensor) for name, tensor in own_tensors(client).items())


@pytest.mark.parametrize("lost", ["state of an earlier message", "no state", "memory of another round"])
def test_a_lost_state_is_an_error_that_says_so(client: Client, lost: str) -> None:
    half = ClientHalf.resume(client, 1, ask(0, own_tensors(client)))
    half.forward(0)
    half.save()
    if lost != "memory of another round":
        client.cache = {}
    if lost == "no state":
        client.state = {}
    client.round += lost == "memory of another round"
    client.state = {} if lost == "memory of another round" else client.state
    with pytest.raises(ClientError, match="its state of this round is lost"):
        ClientHalf.resume(client, 1, ask(2 if lost == "state of an earlier message" else 1))


def test_the_loss_at_the_head_is_that_of_the_model(client: Client) -> None:
    """From the hidden states after the last block, the head's loss and gradient are autograd's own."""
    half = ClientHalf.resume(client, 1, ask(0, own_tensors(client)))
    batch, _ = half.forward(0)
    sent = gradient(int(batch.attention_mask.sum()))
    top = activation_codec.pad(activation_codec.decode(sent, len(sent["rows"]), 16, "float32"), batch.attention_mask)
    top.requires_grad_()
    with Halves(client.model.eval(), 1).from_last(top):
        loss = training.loss(client.model, batch)
    loss.backward()
    found = half.forward_head(ask(1, sent), "float32")
    assert half.totals.tolist() == [0, 0, float(loss.detach())]
    assert torch.equal(found, activation_codec.unpad(top.grad, batch.attention_mask))
