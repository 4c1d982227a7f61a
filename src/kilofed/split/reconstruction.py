"""Token reconstruction attacks by an honest-but-curious server on the hidden states of split learning.

Two attacks, neither of which sees the client's text: the token whose embedding has the highest cosine similarity to the
hidden state, and the same after a linear map from hidden states to embeddings that is fitted on the server's own text.
Both use the model's weights, which the server has.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from kilofed.data.examples import Example
from kilofed.models import training
from kilofed.models.halves import Halves, find_blocks
from kilofed.records.results import Chart
from kilofed.split import activation_codec

RIDGE = 1e-3
"""Ridge penalty of the linear map, relative to the mean square of the hidden states' channels."""


@dataclass(frozen=True)
class Recovered:
    """Top-1 accuracy of each attack, 0 to 1."""

    cut: int
    """Blocks below the cut."""
    nearest: float
    inverter: float
    num_tokens: int
    """Tokens attacked."""


def recover_tokens(
    model: nn.Module,
    cut: int,
    server_rows: Sequence[Example],
    victim_rows: Sequence[Example],
    *,
    dtype: activation_codec.WireDtype = "float32",
    noise: float = 0.0,
) -> Recovered:
    """Reconstruct the tokens of `victim_rows` from their hidden states after `cut` blocks.

    Args:
        model: the whole model with its trained tensors.
        server_rows: the server's own text, on which the map is fitted.
        dtype: of the hidden states on the wire.
        noise: standard deviation of added Gaussian noise, relative to that of the hidden states.

    Raises:
        ModelError, RecipeError: the model cannot be cut there.
    """
    halves, table_VD = Halves(model, cut), _embeddings(model)
    server_ND, server_N = _states(halves, server_rows, "float32", 0.0)
    victim_MD, victim_M = _states(halves, victim_rows, dtype, noise)
    map_ED = _fit(server_ND, table_VD[server_N])
    inverted_MD = _with_intercept(victim_MD) @ map_ED
    results = {
        "nearest": _nearest_embedding(victim_MD, table_VD),
        "inverter": _nearest_embedding(inverted_MD, table_VD),
    }
    shares = {name: float((guess == victim_M).double().mean()) for name, guess in results.items()}
    return Recovered(cut, shares["nearest"], shares["inverter"], len(victim_M))


def recover_at_every_cut(
    model: nn.Module,
    server_rows: Sequence[Example],
    victim_rows: Sequence[Example],
    *,
    dtype: activation_codec.WireDtype = "float32",
) -> list[Recovered]:
    """`recover_tokens` at each possible cut."""
    num = len(find_blocks(model)[1])
    return [recover_tokens(model, cut, server_rows, victim_rows, dtype=dtype) for cut in range(1, num)]


def chart(
    model: nn.Module,
    cut: int,
    server_rows: Sequence[Example],
    victim_rows: Sequence[Example],
    dtype: activation_codec.WireDtype,
) -> Chart:
    """`recover_at_every_cut` as a chart for the report of a run that cuts after `cut` blocks."""
    results = recover_at_every_cut(model, server_rows, victim_rows, dtype=dtype)
    own = next(one for one in results if one.cut == cut)
    words = (
        f"An honest-but-curious server reconstructs {own.inverter:.0%} of a client's tokens from the activations at this "
        f"run's cut ({cut}) with a linear map fitted on {len(server_rows)} rows of its own, {own.nearest:.0%} without it. "
        "Split learning does not send rows, but activations do not hide their content."
    )
    lines = {
        "linear inverter": tuple((float(one.cut), one.inverter) for one in results),
        "nearest embedding": tuple((float(one.cut), one.nearest) for one in results),
    }
    return Chart("Tokens that the server can reconstruct", words, "blocks at the client", "share of tokens", lines)


def _states(
    halves: Halves, examples: Sequence[Example], dtype: activation_codec.WireDtype, noise: float
) -> tuple[Tensor, Tensor]:
    """Hidden states (N, D) at the cut as the server receives them, and their token ids (N,)."""
    device = next(halves.model.parameters()).device
    rows, tokens = [], []
    rng = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for start in range(0, len(examples), 16):
            batch = training.collate(examples[start : start + 16], device)
            hidden = (
                activation_codec.unpad(halves.below(batch.input_ids, batch.attention_mask), batch.attention_mask)
                .float()
                .cpu()
            )
            if noise:
                hidden = hidden + noise * hidden.std() * torch.randn(hidden.shape, generator=rng)
            sent, _ = activation_codec.encode(hidden, dtype)
            rows.append(activation_codec.decode(sent, len(hidden), hidden.shape[1], dtype))
            tokens.append(activation_codec.unpad(batch.input_ids, batch.attention_mask).cpu())
    return torch.cat(rows), torch.cat(tokens)


def _embeddings(model: nn.Module) -> Tensor:
    """(V, D): the input embeddings."""
    inner = getattr(model, "get_base_model", None)
    base = cast(nn.Module, inner() if inner else model)
    embeddings = cast(Callable[[], nn.Embedding], base.get_input_embeddings)
    return embeddings().weight.detach().float().cpu()


def _fit(states_ND: Tensor, targets_NE: Tensor) -> Tensor:
    """(D + 1, E): ridge regression with an intercept."""
    inputs_NF = _with_intercept(states_ND).double()
    gram_FF = inputs_NF.T @ inputs_NF
    penalty = RIDGE * gram_FF.diagonal()[:-1].mean() * torch.eye(len(gram_FF), dtype=torch.float64)
    results: Tensor = torch.linalg.solve(gram_FF + penalty, inputs_NF.T @ targets_NE.double())
    return results.float()


def _with_intercept(states_ND: Tensor) -> Tensor:
    return torch.cat([states_ND, states_ND.new_ones(len(states_ND), 1)], dim=1)


def _nearest_embedding(points_ND: Tensor, table_VD: Tensor) -> Tensor:
    """(N,): the row of the table with the highest cosine similarity to each point."""
    directions_VD = nn.functional.normalize(table_VD, dim=-1)
    return torch.cat([(some @ directions_VD.T).argmax(-1) for some in torch.split(points_ND, 1024)])
