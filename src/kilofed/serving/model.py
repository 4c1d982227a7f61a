"""What is served: a run's model or a model directory, as a generator with its tokeniser and its prompt template."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from kilofed.config.recipe import DataSpec, ModelSpec
from kilofed.data.examples import Renderer
from kilofed.errors import DataError, RunError
from kilofed.generation.decoding import ModelGenerator, TokenGenerator, end_ids_of
from kilofed.generation.detokenizer import TextCodec
from kilofed.models import loading
from kilofed.records import facts
from kilofed.runs.folder import first_seed, recipe_of
from kilofed.runs.restore import restored

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEVER_CUT = 1 << 40
"""data.max_length of prompts that are refused, not cut, where they are too long."""


@dataclass(frozen=True)
class ServedModel:
    """A model that generates text, and how texts and conversations become its tokens."""

    name: str
    """What clients call it."""
    generator: TokenGenerator
    codec: TextCodec
    renderer: Renderer
    """The template of the run's training, or the one that was named."""

    @property
    def takes_conversations(self) -> bool:
        """Whether the template shows the model a whole conversation, not its last question only."""
        return self.renderer.template == "chat" or self.renderer.kind == "messages"

    @property
    def prompt_note(self) -> str:
        """One sentence on what becomes of a conversation's messages."""
        if self.renderer.template == "chat":
            return "conversations go through the tokeniser's chat template"
        if self.renderer.kind == "messages":
            return "conversations are written out as lines of System, User and Assistant, as in training"
        if self.renderer.kind == "text":
            return "the model goes on with the last user message; it was trained on running text and sees nothing else"
        return (
            f"the last user message is put into the template {self.renderer.template!r}, with the system text as its "
            "context; earlier turns are not seen"
        )

    def conversation_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Tokens that ask for the next answer in a conversation of system, user and assistant turns; the last is the user's.

        Raises:
            DataError: the chat template refuses the conversation, or there is no place for a system text.
        """
        if self.takes_conversations:
            return self.renderer.prompt(messages)
        system = "\n".join(turn["content"] for turn in messages if turn["role"] == "system")
        columns = self.renderer.spec.columns
        if not system:
            return self.renderer.prompt(messages)
        if self.renderer.kind == "text" or columns.context == columns.instruction:
            raise DataError("this model's template has no place for a system text: put it into the user message")
        row = {columns.instruction: messages[-1]["content"], columns.context: system, columns.response: "-"}
        return self.renderer([row])[0].prompt_ids


def open_served_model(path: str, *, name: str = "", template: str = "", device: str = "") -> ServedModel:
    """The model at `path`, ready to generate.

    Args:
        path: a run folder, `builtin:small` or `builtin:large`, a model directory, or a hub id.
        name: what clients call it; by default the folder's name.
        template: named prompt template instead of the run's own, or of `plain` for a model without a chat template.
        device: where it runs; by default the recipe's device, or cpu.

    Raises:
        RunError, ModelError, DataError: there is no such model, or it does not generate text.
    """
    if (Path(path) / "run.json").exists() or (Path(path) / "recipe.toml").exists():
        return _of_run(Path(path), name, template, device)
    _refuse_neither(path)
    spec = ModelSpec(path, device=device or "cpu")
    tokenizer = loading.load_tokenizer(spec)
    data = DataSpec(template=template)
    kind = "messages" if tokenizer.chat_template and template in ("", "chat") else "response"
    return _served(name or _last(path), loading.load_base(spec), tokenizer, (data, kind))


def _of_run(folder: Path, name: str, template: str, device: str) -> ServedModel:
    first = first_seed(folder)
    recipe = recipe_of(first)
    if recipe.data.task == "classify":
        raise RunError(f"{folder} classifies rows and writes no answers: score rows with `kilofed eval`, or export it")
    server, sites = restored(first)
    model = sites.method.deliver(server).eval()
    if device:
        model = model.to(loading.find_device(device))
    data = replace(recipe.data, template=template or recipe.data.template)
    takes_conversations = bool(sites.corpus.tokenizer.chat_template) and data.template in ("", "chat")
    kind = facts.read(first).layout or ("messages" if takes_conversations else "response")
    if template and kind == "text":
        kind = "response"
    return _served(name or folder.resolve().name, model, sites.corpus.tokenizer, (data, kind))


def _served(
    name: str, model: nn.Module, tokenizer: "PreTrainedTokenizerBase", prompts: tuple[DataSpec, str]
) -> ServedModel:
    data, kind = prompts
    ends = end_ids_of(model, tokenizer.eos_token_id)
    generator = model if isinstance(model, TokenGenerator) else ModelGenerator(model, ends)
    renderer = Renderer(tokenizer, replace(data, max_length=NEVER_CUT), kind)
    return ServedModel(name, generator, TextCodec(tokenizer), renderer)


def _last(path: str) -> str:
    """`models/llama/` is llama, `builtin:small` and `org/name` are themselves."""
    return Path(path).resolve().name if Path(path).is_dir() else path


def _refuse_neither(path: str) -> None:
    """Raise RunError for a local path that is neither a run folder nor a model directory."""
    folder = Path(path)
    if folder.is_dir() and (folder / "config.json").exists():
        return
    if (folder / "adapter_config.json").exists():
        raise RunError(
            f"{path} is an adapter without its base model: name the run folder, or write a whole model with "
            "`kilofed export RUN --merged DIR`"
        )
    if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise RunError(f"{path} is neither a run folder (with run.json) nor a model directory (with config.json)")
