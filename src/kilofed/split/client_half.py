"""The client's half in split learning: forward to the cut and backward from it, resumable between any two messages."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from kilofed.errors import ClientError, NonFiniteLoss
from kilofed.federation.parties import Client
from kilofed.models import training
from kilofed.models.halves import Halves
from kilofed.models.learner import Learner, restore
from kilofed.payload import Payload
from kilofed.split import activation_codec

TURN = "turn"
"""Scalar of a request: the number of messages that the client has answered in this round."""
CACHE = "split"
GRADS, RESIDUAL, HEAD_RESIDUAL, TOTALS, PROGRESS = "grads.", "left", "left_head", "tally", "marks"
"""Names of tensors in the client's state."""


class ClientHalf:
    """One client's blocks during one round; the model, which other clients may share, is not changed.

    Args:
        cut: number of blocks at the client.
        learner: the client's trained tensors and their optimiser.
    """

    def __init__(self, client: Client, cut: int, learner: Learner) -> None:
        self.learner = learner
        self.steps = training.num_steps(client.train, len(client.data))
        """Steps per round."""
        self.residual: Tensor | None = None
        self.head_residual: Tensor | None = None
        self.totals = torch.zeros(3, dtype=torch.float64)
        """Numbers of examples and steps of this round, and the sum of the losses if the head is at the client."""
        self._halves, self._client, self._round = Halves(client.model, cut), client, client.round
        self._turn, self._number = 0, -1
        """Messages answered in this round; the step that waits for its gradient, -1 for none."""
        self._open: tuple[training.Batch, Tensor] | None = None
        """That step's batch and its hidden states with their graph."""

    @classmethod
    def resume(cls, client: Client, cut: int, ask: Payload) -> "ClientHalf":
        """The half as it was after the previous message, from memory or from the client's state.

        Raises:
            ClientError: neither has it.
        """
        turn, half = int(ask.scalars[TURN]), client.cache.get(CACHE)
        if turn == 0:
            half = cls(client, cut, Learner(client.model, ask.tensors, client.train))
        elif not isinstance(half, cls) or (half._round, half._turn) != (client.round, turn):
            if PROGRESS not in client.state or int(client.state[PROGRESS][0]) != turn:
                raise ClientError("its state of this round is lost; it takes part again in the next round")
            half = cls(client, cut, restore(client.model, client.state, client.train))
            half._restore(client.state)
        half._turn = turn + 1
        client.cache[CACHE] = half
        return half

    def receive(self, ask: Payload, dtype: activation_codec.WireDtype) -> None:
        """Apply what the request has: the open step's gradient at the cut, the mean of the clients' tensors, or both.

        Args:
            dtype: of gradients on the wire.

        Raises:
            PayloadError: the gradient does not fit the open step.
        """
        if activation_codec.has_rows(ask.tensors):
            batch, hidden = self._open_batch()
            hidden.backward(_decode_like(hidden, batch, ask, dtype))  # type: ignore[no-untyped-call]
            first, total = (self._round - 1) * self.steps, self.steps * self._client.num_rounds
            self.learner.step(training.learning_rate(self._client.train, first + self._number, total))
            self.totals += torch.tensor([len(batch.input_ids), 1, 0])
            self._number, self._open = -1, None
        if any(name in ask.tensors for name in self.learner.tensors):
            self.learner.write(ask.tensors)

    def forward(self, number: int) -> tuple[training.Batch, Tensor]:
        """Begin step `number`: its batch, and its hidden states (N, D) at the cut."""
        self._number, self._open = number, None
        batch, hidden = self._open_batch()
        return batch, activation_codec.unpad(hidden.detach(), batch.attention_mask)

    def forward_head(self, ask: Payload, dtype: activation_codec.WireDtype) -> Tensor:
        """(N, D): the gradient of the open step's loss with respect to the output of the last block.

        Args:
            dtype: of hidden states on the wire.

        Raises:
            NonFiniteLoss: the loss is no finite number. PayloadError: the hidden states do not fit the open step.
        """
        batch, hidden = self._open_batch()
        top = _decode_like(hidden, batch, ask, dtype).requires_grad_()

        def forward() -> Tensor:
            with self._halves.from_last(top):
                return training.loss(self._client.model, batch)

        with self._training_mode("head"):
            loss = self.learner.run(forward)
        if not math.isfinite(value := float(loss.detach())):
            raise NonFiniteLoss(
                f"the loss is {value} at step {self._number + 1}; lower train.lr or train.max_grad_norm"
            )
        loss.backward()  # type: ignore[no-untyped-call]
        self.totals[2] += value
        assert top.grad is not None
        return activation_codec.unpad(top.grad, batch.attention_mask)

    def save(self) -> None:
        """Write everything that the next message needs to the client's state."""
        saved = {GRADS + name: p.grad for name, p in self.learner.tensors.items()} | {RESIDUAL: self.residual}
        saved |= {HEAD_RESIDUAL: self.head_residual, TOTALS: self.totals}
        saved |= {PROGRESS: torch.tensor([self._turn, self._number])}
        state = {name: value.detach().cpu().clone() for name, value in saved.items() if value is not None}
        self._client.state = {**self.learner.save(), **state}

    def _restore(self, state: Mapping[str, Tensor]) -> None:
        self._turn, self._number = map(int, state[PROGRESS])
        self.totals = state[TOTALS].clone()
        self.residual, self.head_residual = state.get(RESIDUAL), state.get(HEAD_RESIDUAL)
        for name, parameter in self.learner.tensors.items():
            if (grad := state.get(GRADS + name)) is not None:
                parameter.grad = grad.to(parameter.device)

    def _open_batch(self) -> tuple[training.Batch, Tensor]:
        """The open step's batch and its hidden states (B, T, D) at the cut, recomputed if needed."""
        if self._open is None:  # A new step, or the process was restarted and the graph is lost.
            client, first = self._client, (self._round - 1) * self.steps
            batches = training.batches(
                client.data, client.train, first=first + self._number, count=1, order=client.order
            )
            batch = training.collate(next(batches), next(client.model.parameters()).device)
            with self._training_mode("part"):
                hidden = self.learner.run(lambda: self._halves.below(batch.input_ids, batch.attention_mask))
            self._open = batch, hidden
        return self._open

    @contextmanager
    def _training_mode(self, what: str) -> Iterator[None]:
        """Training mode with the random generator of the open step."""
        model, spec = self._client.model, self._client.train
        model.train()
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._client.rng(f"dropout {what} {self._number}").initial_seed())
                kind = next(model.parameters()).device.type
                with torch.autocast(kind, torch.bfloat16, enabled=spec.autocast == "bfloat16"):
                    yield
        finally:
            model.eval()


def _decode_like(hidden_BTD: Tensor, batch: training.Batch, ask: Payload, dtype: activation_codec.WireDtype) -> Tensor:
    """The rows in `ask`, padded to the shape, type and device of the batch's hidden states."""
    rows_ND = activation_codec.decode(ask.tensors, int(batch.attention_mask.sum()), hidden_BTD.shape[2], dtype)
    return activation_codec.pad(rows_ND.to(hidden_BTD.device), batch.attention_mask).to(hidden_BTD.dtype)
