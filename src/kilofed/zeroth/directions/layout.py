"""Layout of a model's tensors over the blocks of a direction: in name order, each from the start of a block.

Any tensor can therefore be rebuilt alone, and sites that shard or stream the model differently get the same bits.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from kilofed.zeroth.directions import spec
from kilofed.zeroth.directions.spec import DirectionsError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Slot:
    """One tensor with all its names."""

    names: tuple[str, ...]
    """The first in alphabetical order is the slot's name; the others are tied to it."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    """Of the rebuilt weights: float32 for vectors and scalars whatever the model stores, so that eps is not lost."""
    first_block: int

    @property
    def name(self) -> str:
        return self.names[0]


@dataclass(frozen=True)
class Layout:
    """The slots of a model under pools of `num_seeds` directions."""

    num_seeds: int
    slots: tuple[Slot, ...]
    num_blocks: int

    @cached_property
    def by_name(self) -> dict[str, Slot]:
        """The slot of every name, tied names too."""
        return {name: slot for slot in self.slots for name in slot.names}

    @cached_property
    def digest(self) -> str:
        """SHA-256 in hex of names, ties, shapes, dtypes and first blocks."""
        lines = [f"{s.first_block} {s.dtype} {list(s.shape)} {list(s.names)}" for s in self.slots]
        return hashlib.sha256("\n".join([spec.VERSION, str(self.num_seeds), *lines]).encode()).hexdigest()


def layout_of(tensors: Iterable[tuple[str, Tensor]], num_seeds: int) -> Layout:
    """Assign blocks to the tensors that are to be perturbed.

    Args:
        tensors: every name with its tensor, in any order, e.g. `model.named_parameters(remove_duplicate=False)`;
            tensors that share their memory element for element are tied and get one slot.
        num_seeds: K, the size of a block.

    Raises:
        DirectionsError: a name occurs twice, a dtype is not float32, bfloat16 or float16, or memory is shared in part.
    """
    spec.check_num_seeds(num_seeds)
    named = sorted(tensors, key=lambda pair: pair[0])
    tied: dict[tuple[object, ...], list[tuple[str, Tensor]]] = {}
    for i, (name, tensor) in enumerate(named):
        if i and name == named[i - 1][0]:
            raise DirectionsError(f"two tensors are named {name}")
        if tensor.dtype not in DTYPES:
            raise DirectionsError(f"{name} is {tensor.dtype}; directions support float32, bfloat16 and float16")
        tied.setdefault(_memory(tensor), []).append((name, tensor))
    _check_overlaps([group[0] for group in tied.values()])
    slots, block = [], 0
    for group in tied.values():
        tensor = group[0][1]
        dtype = tensor.dtype if tensor.dim() > 1 else torch.float32
        slots.append(Slot(tuple(name for name, _ in group), tuple(tensor.shape), dtype, block))
        block += -(-tensor.numel() // num_seeds)
    return Layout(num_seeds, tuple(slots), block)


def _memory(tensor: Tensor) -> tuple[object, ...]:
    if tensor.is_meta or not tensor.numel():
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())


def _check_overlaps(tensors: list[tuple[str, Tensor]]) -> None:
    extents = sorted(
        (str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + _extent(tensor), name)
        for name, tensor in tensors
        if not tensor.is_meta and tensor.numel()
    )
    for (device, _, end, name), (next_device, start, _, next_name) in pairwise(extents):
        if device == next_device and start < end:
            raise DirectionsError(
                f"{name} and {next_name} share part of their memory; tie them completely or not at all"
            )


def _extent(tensor: Tensor) -> int:
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
