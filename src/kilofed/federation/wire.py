"""How trained tensors travel: as their values in float32, as differences in a narrower dtype, which lose less so."""

from collections.abc import Mapping

import torch
from torch import Tensor

DELTA = "delta."
"""Prefix of a tensor that is a difference."""

SERVER = "server."
"""Prefix of what a server keeps for itself in its state."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def shared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trained tensors in a server's state, without what it keeps for itself."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(SERVER)}


def down(state: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """What a client is sent of `state`, in `dtype` (float32 or bfloat16)."""
    return {name: tensor.to(_DTYPES[dtype]) for name, tensor in shared(state).items()}


def up(end: Mapping[str, Tensor], start: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """What a client replies: values of `end` in float32, else differences from `start` under DELTA names."""
    if dtype == "float32":
        return dict(end)
    return {DELTA + name: (end[name] - start[name].float()).to(_DTYPES[dtype]) for name in end}


def arrive(state: Mapping[str, Tensor], mean: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trained tensors that the mean of the replies stands for, float32."""
    return {
        name: mean[name] if name in mean else tensor + mean[DELTA + name].float()
        for name, tensor in shared(state).items()
    }
