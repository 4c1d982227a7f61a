"""How many tokens an honest-but-curious server reads off the hidden states that split learning sends it.

Two readers, neither of whom sees the client's text: the token whose embedding points the same way as a hidden state,
and a linear map from hidden states to token embeddings, fitted on text of the server's own. Both know the weights of
the model, as the server does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from kilofed.data.examples import Example
from kilofed.federation.presentation import Chart
from kilofed.models import training
from kilofed.models.halves import Halves, find_blocks
from kilofed.split import activation_codec

RIDGE = 1e-3
"""Pull of the fitted map to zero, as a share of the mean variance of a hidden state's numbers."""


@dataclass(frozen=True)
class Recovered:
    """Shares, 0 to 1, of tokens that are the reader's first guess."""

    cut: int
    """Blocks below the cut."""
    nearest: float
    inverter: float
    num_tokens: int
    """Tokens that were read."""


def recover(
    model: nn.Module,
    cut: int,
    known: Sequence[Example],
    secret: Sequence[Example],
    *,
    width: activation_codec.Width = "float32",
    noise: float = 0.0,
) -> Recovered:
    """Read the tokens of `secret` off its hidden states after `cut` blocks.

    Args:
        model: the whole model, with what was trained.
        known: text that the server has, to fit its map on.
        width: numbers on the wire.
        noise: standard deviation of Gaussian noise on each number, in units of the hidden states' own deviation.

    Raises:
        ModelError, RecipeError: the model cannot be cut there.
    """
    halves, table_VD = Halves(model, cut), _embeddings(model)
    known_ND, known_N = _states(halves, known, "float32", 0.0)
    secret_MD, secret_M = _states(halves, secret, width, noise)
    map_ED = _fit(known_ND, table_VD[known_N])
    inverted_MD = _with_one(secret_MD) @ map_ED
    found = {
        "nearest": _closest(secret_MD, table_VD),
        "inverter": _closest(inverted_MD, table_VD),
    }
    shares = {name: float((guess == secret_M).double().mean()) for name, guess in found.items()}
    return Recovered(cut, shares["nearest"], shares["inverter"], len(secret_M))


def every_cut(
    model: nn.Module, known: Sequence[Example], secret: Sequence[Example], *, width: activation_codec.Width = "float32"
) -> list[Recovered]:
    """`recover` at each cut that the model allows."""
    num = len(find_blocks(model)[1])
    return [recover(model, cut, known, secret, width=width) for cut in range(1, num)]


def chart(
    model: nn.Module, cut: int, known: Sequence[Example], secret: Sequence[Example], width: activation_codec.Width
) -> Chart:
    """`every_cut` as a drawing for the report of a run that cuts after `cut` blocks."""
    found = every_cut(model, known, secret, width=width)
    here = next(one for one in found if one.cut == cut)
    words = (
        f"A server that only looks reads {here.inverter:.0%} of a client's tokens off the activations at this run's cut "
        f"({cut}), with a linear map fitted on {len(known)} rows of its own; {here.nearest:.0%} without any. Split "
        "learning keeps rows and blocks apart; it does not hide what is written in the rows."
    )
    lines = {
        "linear inverter": [(float(one.cut), one.inverter) for one in found],
        "nearest embedding": [(float(one.cut), one.nearest) for one in found],
    }
    return Chart("Tokens that the server can read", words, "blocks at the client", "share of tokens", lines)


def _states(
    halves: Halves, examples: Sequence[Example], width: activation_codec.Width, noise: float
) -> tuple[Tensor, Tensor]:
    """Hidden states (N, D) at the cut as the server gets them, and their tokens (N,)."""
    device = next(halves.model.parameters()).device
    rows, tokens = [], []
    draws = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for start in range(0, len(examples), 16):
            batch = training.collate(examples[start : start + 16], device)
            hidden = (
                activation_codec.pack(halves.below(batch.input_ids, batch.attention_mask), batch.attention_mask)
                .float()
                .cpu()
            )
            if noise:
                hidden = hidden + noise * hidden.std() * torch.randn(hidden.shape, generator=draws)
            sent, _ = activation_codec.shrink(hidden, width)
            rows.append(activation_codec.grow(sent, *hidden.shape))
            tokens.append(activation_codec.pack(batch.input_ids, batch.attention_mask).cpu())
    return torch.cat(rows), torch.cat(tokens)


def _embeddings(model: nn.Module) -> Tensor:
    """(V, D): the table of input embeddings."""
    inner = getattr(model, "get_base_model", None)
    base = cast(nn.Module, inner() if inner else model)
    find = cast(Callable[[], nn.Embedding], base.get_input_embeddings)
    return find().weight.detach().float().cpu()


def _fit(states_ND: Tensor, wanted_NE: Tensor) -> Tensor:
    """(D + 1, E): least squares with a small pull to zero, and an offset."""
    given = _with_one(states_ND).double()
    square = given.T @ given
    pull = RIDGE * square.diagonal()[:-1].mean() * torch.eye(len(square), dtype=torch.float64)
    found: Tensor = torch.linalg.solve(square + pull, given.T @ wanted_NE.double())
    return found.float()


def _with_one(states_ND: Tensor) -> Tensor:
    return torch.cat([states_ND, states_ND.new_ones(len(states_ND), 1)], dim=1)


def _closest(points_ND: Tensor, table_VD: Tensor) -> Tensor:
    """(N,): the row of the table in whose direction each point lies."""
    directions_VD = nn.functional.normalize(table_VD, dim=-1)
    return torch.cat([(some @ directions_VD.T).argmax(-1) for some in torch.split(points_ND, 1024)])
