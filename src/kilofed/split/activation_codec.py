"""Hidden states and their gradients on the wire: rows of non-padding tokens as float32, bfloat16 or int8 with row scales.

Rounding to int8 is deterministic. Its error is summed per channel and added to the rows of the next message in equal
parts (error feedback; Seide et al. 2014). Differs from it: the rows of two batches correspond by channel only.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from kilofed.errors import PayloadError
from kilofed.federation.expected import Expected, TensorLike
from kilofed.payload import Payload
from kilofed.privacy.mechanisms import ROWS

WireDtype = Literal["float32", "bfloat16", "int8"]

SCALES = "scales"
_MAX_LEVEL = 127.0
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


def unpad(hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """The rows (N, D) of the N tokens that are not padding."""
    return hidden_BTD[mask_BT.bool()]


def pad(rows_ND: Tensor, mask_BT: Tensor) -> Tensor:
    """The inverse of `unpad`: (B, T, D) with zeros at the padding."""
    padded_BTD = rows_ND.new_zeros(*mask_BT.shape, rows_ND.shape[1])
    padded_BTD[mask_BT.bool()] = rows_ND
    return padded_BTD


def mask_of(lengths_B: Tensor) -> Tensor:
    """Attention mask (B, T) of rows padded on the right to the longest."""
    return (torch.arange(int(lengths_B.max()))[None] < lengths_B[:, None]).long()


def encode(rows_ND: Tensor, dtype: WireDtype, residual_D: Tensor | None = None) -> tuple[dict[str, Tensor], Tensor]:
    """Encode rows as tensors of a payload, with error feedback for int8.

    Args:
        rows_ND: finite or not; a row with NaN decodes to NaN.
        residual_D: rounding error of the previous message, summed over its rows; None at the start.

    Returns:
        (N, D) in `dtype`, with int8 also (N,) scales in bfloat16; and the new residual, (D,) float32, 0 unless int8.
    """
    rows_ND = rows_ND.detach().float().cpu()
    zero_D = rows_ND.new_zeros(rows_ND.shape[1])
    if dtype != "int8":
        return {ROWS: rows_ND.to(_DTYPES[dtype])}, zero_D
    corrected_ND = rows_ND if residual_D is None else rows_ND + residual_D / len(rows_ND)
    scales_N = (corrected_ND.abs().amax(1) / _MAX_LEVEL).bfloat16()
    steps_N1 = torch.where(scales_N == 0, 1.0, scales_N.float())[:, None]
    levels_ND = (corrected_ND / steps_N1).round().clamp(-_MAX_LEVEL, _MAX_LEVEL)
    residual_D = (corrected_ND - levels_ND * scales_N.float()[:, None]).sum(0)
    return {ROWS: levels_ND.nan_to_num().to(torch.int8), SCALES: scales_N}, residual_D


def expected(most: int, width: int, dtype: WireDtype) -> Expected:
    """What a message with 1 to `most` encoded rows of `width` channels is like."""
    one_row = Expected.like(Payload(encode(torch.zeros(1, width), dtype)[0]))
    sizes = range(1, most + 1)
    return Expected({name: TensorLike(one.dtype, (sizes, *one.shape[1:])) for name, one in one_row.tensors.items()})


def has_rows(tensors: Mapping[str, Tensor]) -> bool:
    """Whether `tensors` contain rows of `encode`."""
    return ROWS in tensors


def decode(tensors: Mapping[str, Tensor], num_rows: int, width: int, dtype: WireDtype) -> Tensor:
    """Decode the rows of `encode` to float32, (num_rows, width).

    Raises:
        PayloadError: they are missing, of another dtype or shape, or not as `encode` writes them.
    """
    rows = _one(tensors, ROWS, _DTYPES[dtype], (num_rows, width))
    if dtype != "int8":
        if SCALES in tensors:
            raise PayloadError(f"the message has scales beside {dtype} rows; expected none")
        return rows.float()
    scales = _one(tensors, SCALES, torch.bfloat16, (num_rows,))
    # A minimum, not a comparison: that would take as much memory again.
    if rows.numel() and int(rows.min()) < -_MAX_LEVEL:
        raise PayloadError("an int8 level of -128 in the message; expected -127 to 127")
    if bool((scales < 0).any()):
        raise PayloadError("a negative scale in the message; expected scales from 0")
    return rows.float() * scales.float()[:, None]


def _one(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Tensor `name`. Raises PayloadError: it is missing, or of another dtype or shape."""
    found = tensors.get(name)
    if found is None or found.dtype != dtype or found.shape != shape:
        got = f"no {name}" if found is None else f"{name} of {found.dtype} {tuple(found.shape)}"
        raise PayloadError(f"the message has {got}; expected {dtype} {shape}")
    return found
