"""Hidden states and their gradients in few bytes: the rows of real tokens, as float32, bfloat16 or int8 with a scale per row.

Rounding to int8 is deterministic; what it leaves over is added up per channel and spread over the rows of the next
message (error feedback; Seide et al. 2014). Differs from it: rows of two batches have nothing in common but channels.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from kilofed.errors import PayloadError
from kilofed.privacy.mechanisms import ROWS

Width = Literal["float32", "bfloat16", "int8"]

SCALES = "scales"
_TOP = 127.0


def pack(hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """The rows (N, D) of the N tokens that are no padding."""
    return hidden_BTD[mask_BT.bool()]


def unpack(rows_ND: Tensor, mask_BT: Tensor) -> Tensor:
    """(B, T, D) with zeros at the padding: what `pack` was given, as far as anything depends on it."""
    whole_BTD = rows_ND.new_zeros(*mask_BT.shape, rows_ND.shape[1])
    whole_BTD[mask_BT.bool()] = rows_ND
    return whole_BTD


def mask_of(lengths_B: Tensor) -> Tensor:
    """The mask (B, T) of rows padded on the right to the longest."""
    return (torch.arange(int(lengths_B.max()))[None] < lengths_B[:, None]).long()


def shrink(rows_ND: Tensor, width: Width, left_D: Tensor | None = None) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors for a payload, and what rounding left over.

    Args:
        rows_ND: finite or not; NaN stays NaN.
        left_D: what the message before left over, summed over its rows; None at the start.

    Returns:
        (N, D) in `width`, and with int8 (N,) scales in bfloat16; (D,) float32, zeros unless int8.
    """
    rows_ND = rows_ND.detach().float().cpu()
    none_D = rows_ND.new_zeros(rows_ND.shape[1])
    if width != "int8":
        return {ROWS: rows_ND.to(torch.float32 if width == "float32" else torch.bfloat16)}, none_D
    wanted_ND = rows_ND if left_D is None else rows_ND + left_D / len(rows_ND)
    scales_N = (wanted_ND.abs().amax(1) / _TOP).bfloat16()
    steps_N1 = torch.where(scales_N == 0, 1.0, scales_N.float())[:, None]
    levels_ND = (wanted_ND / steps_N1).round().clamp(-_TOP, _TOP)
    left_D = (wanted_ND - levels_ND * scales_N.float()[:, None]).sum(0)
    return {ROWS: levels_ND.nan_to_num().to(torch.int8), SCALES: scales_N}, left_D


def has_rows(tensors: Mapping[str, Tensor]) -> bool:
    """Whether `shrink` wrote rows among `tensors`."""
    return ROWS in tensors


def grow(tensors: Mapping[str, Tensor], num_rows: int, width: int) -> Tensor:
    """The rows (N, D) in float32 that `shrink` wrote.

    Raises:
        PayloadError: they are not there, or of another shape.
    """
    rows, scales = tensors.get(ROWS), tensors.get(SCALES)
    if rows is None or rows.shape != (num_rows, width):
        seen = "none" if rows is None else f"shape {tuple(rows.shape)}"
        raise PayloadError(f"it sent hidden states of {seen}; expected {(num_rows, width)}")
    if rows.dtype != torch.int8:
        return rows.float()
    if scales is None or scales.shape != (num_rows,):
        raise PayloadError(f"it sent int8 hidden states without {num_rows} scales")
    return rows.float() * scales.float()[:, None]
