"""Cut a decoder or an encoder between two of its blocks, and run each side with the whole model's own forward.

A side is the real model's forward with other blocks in its list, so transformers computes masks and positions as in the
whole model. `trim` removes what a client must not hold; `Halves` runs the rest.
Source: split learning, Gupta and Raskar 2018, arXiv:1810.06060; the U-shape is Vepakomma et al. 2018, arXiv:1812.00564.
"""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, cast

import torch
from annotated_types import Ge
from torch import Tensor, nn

from kilofed.config.recipe import ModelSpec
from kilofed.errors import ModelError, RecipeError

_FIRST = "emb", "project_in"
"""Parts of names of modules that run before the blocks; so do all nn.Embedding."""


@dataclass(frozen=True)
class Part(ModelSpec):
    """The part of a model that a client of split learning loads: embeddings, first blocks and, if `head`, the output head."""

    num_blocks: Annotated[int, Ge(1)] = 1
    """Number of blocks, from the first on."""
    head: bool = False
    """Whether it includes the final norm and the output head."""


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the model's blocks: the one list of `config.num_hidden_layers` modules of one class.

    Raises:
        ModelError: there is none, or more than one.
    """
    lists = [(name, item) for name, item in model.named_modules() if isinstance(item, nn.ModuleList)]
    for name, item in lists:
        if isinstance(item, _TrimmedBlocks):
            return name, item
    wanted = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    found = [(name, item) for name, item in lists if len(item) == wanted and len({type(block) for block in item}) == 1]
    if len(found) == 1:
        return found[0]
    seen = ", ".join(f"{name} of {len(item)}" for name, item in lists[:8]) or "none"
    raise ModelError(
        f"cannot cut {type(model).__name__}: looked for one list of config.num_hidden_layers={wanted} modules of one "
        f"class, found {len(found)}; its lists are: {seen}\n  hint: take a decoder or an encoder, not both in one"
    )


def check_cut(cut: int, num_blocks: int) -> None:
    """Raise RecipeError if one side would have no block."""
    if not 1 <= cut < num_blocks:
        raise RecipeError(
            f"method.cut is {cut}, and the model has {num_blocks} blocks: expected 1 to {num_blocks - 1}, "
            "so that clients and server hold at least one each"
        )


def trim(model: nn.Module, num_blocks: int, *, head: bool) -> None:
    """Remove from `model` all blocks but the first `num_blocks`, and unless `head` all modules that run after the blocks.

    The names of the remaining modules are those of the whole model.

    Raises:
        ModelError, RecipeError: as `find_blocks` and `check_cut`.
    """
    above, blocks = find_blocks(model)
    if len(blocks) > num_blocks:
        check_cut(num_blocks, len(blocks))
    kept = blocks if isinstance(blocks, _TrimmedBlocks) else _TrimmedBlocks(blocks, num_whole=len(blocks))
    del kept[num_blocks:]
    model.set_submodule(above, kept)
    if head:
        return
    for name, module in list(model.named_modules()):
        if name and any(True for _ in module.parameters(recurse=False)) and not works_first(model, name):
            model.set_submodule(name, _Removed(name, kept))


def works_first(model: nn.Module, name: str) -> bool:
    """Whether the module or parameter belongs to the embeddings or a block, not to the head."""
    above = find_blocks(model)[0]
    if name.startswith(above + ".") or not any(name.startswith(n + ".") or n == name for n in _owners(model)):
        return True
    output = _output_head(model)
    if any(part is output for part in _path(model, name)):
        return False
    return any(isinstance(part, nn.Embedding) for part in _path(model, name)) or any(w in name for w in _FIRST)


def held_by_client(model: nn.Module, name: str, *, cut: int, head: bool) -> bool:
    """Whether a parameter of the whole model is held by clients with `cut` blocks (and, if `head`, the head)."""
    above = find_blocks(model)[0] + "."
    if name.startswith(above):
        return int(name.removeprefix(above).split(".")[0]) < cut
    return head or works_first(model, name)


def trains_tied_head(model: nn.Module) -> bool:
    """Whether the output head is tied to the input embedding and trained."""
    output, base = _output_head(model), _base(model)
    if output is None:
        return False
    weight, first = getattr(output, "weight", None), getattr(base, "get_input_embeddings", None)
    return first is not None and isinstance(weight, nn.Parameter) and weight is first().weight and weight.requires_grad


def width(model: nn.Module) -> int:
    """Hidden size: channels per token at the cut."""
    return int(model.config.hidden_size)  # type: ignore[union-attr,arg-type]


class Halves:
    """Forward passes of a whole or trimmed model to its cut and from it.

    The model is not changed: its list of blocks is replaced during a forward and restored afterwards.

    Args:
        cut: number of blocks below the cut.

    Raises:
        ModelError, RecipeError: as `find_blocks` and `check_cut`.
    """

    def __init__(self, model: nn.Module, cut: int) -> None:
        self.model, self.cut = model, cut
        self._name, self._list = find_blocks(model)
        check_cut(cut, _num_whole(self._list))
        self._held = list(self._list)
        self._num_out: int | None = None
        """Length of the tuple that a block returns, 0 for a bare tensor; None before any has run."""
        self._inner = _caller(model)
        taken = inspect.signature(self._inner.forward).parameters
        self._options = {"use_cache": False} if "use_cache" in taken else {}

    def below(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Hidden states (B, T, D) after the first `cut` blocks. Raises ModelError: a module that this needs was removed."""
        return self._run(input_ids, attention_mask, self._held[: self.cut])

    def between(self, hidden_BTD: Tensor, attention_mask: Tensor) -> Tensor:
        """Hidden states (B, T, D) after the last block, from those at the cut."""
        ids = torch.zeros(hidden_BTD.shape[:2], dtype=torch.long, device=hidden_BTD.device)
        blocks = self._upper()
        with _input_replaced(blocks[self.cut], hidden_BTD):
            return self._run(ids, attention_mask, blocks)

    @contextmanager
    def from_cut(self, hidden_BTD: Tensor) -> Iterator[None]:
        """Inside the block, `model(...)` starts at the cut with these hidden states and ignores the token ids."""
        blocks = self._upper()
        with self._replaced(blocks), _input_replaced(blocks[self.cut], hidden_BTD):
            yield

    @contextmanager
    def from_last(self, hidden_BTD: Tensor) -> Iterator[None]:
        """Inside the block, `model(...)` starts after the last block with these hidden states: it runs only the head."""
        if self._num_out is None:  # The type of a block's output is known once one has run.
            with torch.no_grad():
                self.below(torch.zeros(1, 1, dtype=torch.long, device=hidden_BTD.device), hidden_BTD.new_ones(1, 1))
        blocks = [self._pass_through() for _ in range(_num_whole(self._list))]
        with self._replaced(blocks), _input_replaced(blocks[-1], hidden_BTD):
            yield

    def _upper(self) -> list[nn.Module]:
        # Lower blocks are replaced by pass-throughs: a block's index may determine its mask.
        return [*(self._pass_through() for _ in range(self.cut)), *self._held[self.cut :]]

    def _pass_through(self) -> nn.Module:
        return _PassThrough(self._held[-1], self._num_out or 0)

    def _run(self, input_ids: Tensor, attention_mask: Tensor, blocks: list[nn.Module]) -> Tensor:
        outputs: list[Tensor] = []

        def take(block: nn.Module, given: tuple[Tensor, ...], out: Tensor | tuple[Tensor, ...]) -> None:
            self._mark(passed=True)
            self._num_out = len(out) if isinstance(out, tuple) else 0
            outputs.append(out[0] if isinstance(out, tuple) else out)

        self._mark(passed=False)
        handle = blocks[-1].register_forward_hook(take)
        try:
            with self._replaced(blocks):
                self._inner(input_ids=input_ids, attention_mask=attention_mask, **self._options)
        finally:
            handle.remove()
        return outputs[0]

    def _mark(self, *, passed: bool) -> None:
        """Record whether the forward has passed the blocks, after which removed modules may be reached."""
        if isinstance(self._list, _TrimmedBlocks):
            self._list.passed = passed

    @contextmanager
    def _replaced(self, blocks: list[nn.Module]) -> Iterator[None]:
        """Inside the block, a forward of the model runs `blocks` instead of its own."""
        self.model.set_submodule(self._name, nn.ModuleList(blocks))
        try:
            yield
        finally:
            self.model.set_submodule(self._name, self._list)


class _TrimmedBlocks(nn.ModuleList):
    """The remaining blocks of a trimmed model, with their indices in the whole model.

    Args:
        num_whole: number of blocks of the whole model.
    """

    def __init__(self, blocks: Iterable[nn.Module], num_whole: int = 0) -> None:
        super().__init__(blocks)
        self.num_whole = num_whole
        self.passed = False
        """Whether the last block of the current forward has run."""


class _PassThrough(nn.Module):
    """Replaces a block and returns its input; other attributes are those of that block."""

    def __init__(self, block: nn.Module, num_out: int) -> None:
        super().__init__()
        self._like, self._num_out = [block], num_out  # In a list: it is not a part of this module.

    def forward(self, hidden_states: Tensor, *rest: object, **named: object) -> Tensor | tuple[Tensor | None, ...]:
        return (hidden_states, *[None] * (self._num_out - 1)) if self._num_out else hidden_states

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        return cast(Tensor | nn.Module, getattr(self.__dict__["_like"][0], name))


class _Removed(nn.Module):
    """Replaces a module that another party holds; it may only be reached after the cut."""

    def __init__(self, name: str, blocks: _TrimmedBlocks) -> None:
        super().__init__()
        self._name, self._list = name, [blocks]  # In a list: it is not a part of this module.

    def forward(self, given: Tensor, *rest: object, **named: object) -> Tensor:
        if not self._list[0].passed:
            raise ModelError(
                f"{self._name} runs before the cut, but this part of the model was loaded without it; "
                "this architecture cannot be cut, use another method"
            )
        return given


@contextmanager
def _input_replaced(block: nn.Module, hidden_BTD: Tensor) -> Iterator[None]:
    """Inside the block, `block` gets `hidden_BTD` as its input."""

    def swap(
        module: nn.Module, given: tuple[object, ...], named: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        if "hidden_states" in named:
            return given, {**named, "hidden_states": hidden_BTD}
        return (hidden_BTD, *given[1:]), named

    handle = block.register_forward_pre_hook(swap, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _num_whole(blocks: nn.ModuleList) -> int:
    """Number of blocks of the whole model, of which `blocks` may be a part."""
    return blocks.num_whole if isinstance(blocks, _TrimmedBlocks) else len(blocks)


def _owners(model: nn.Module) -> list[str]:
    """Names of modules that hold parameters themselves, without the model itself."""
    return [n for n, m in model.named_modules() if n and any(True for _ in m.parameters(recurse=False))]


def _path(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The modules from the model down to the module, or the owner of the parameter, of that name."""
    module: nn.Module | None = model
    for part in name.split("."):
        module = module._modules.get(part) if module else None
        if module is None:
            return
        yield module


def _caller(model: nn.Module) -> nn.Module:
    """The innermost module around the blocks that takes token ids."""
    above = find_blocks(model)[0]
    candidates = [m for m in [model, *_path(model, above)] if "input_ids" in inspect.signature(m.forward).parameters]
    return candidates[-1]


def _base(model: nn.Module) -> nn.Module:
    """The model below an adapter."""
    inner = getattr(model, "get_base_model", None)
    return cast(nn.Module, inner() if inner else model)


def _output_head(model: nn.Module) -> nn.Module | None:
    find = getattr(_base(model), "get_output_embeddings", None)
    return cast(nn.Module | None, find() if find else None)
