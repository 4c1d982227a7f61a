"""Rows to tokenised examples: map columns, fill the prompt template, mask the prompt, truncate."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

from jinja2 import TemplateError

from kilofed.config.recipe import DataSpec
from kilofed.data.formats import Row
from kilofed.data.notices import Warn, log_warning
from kilofed.data.readers import Rows, layout, read, row_hash, set_aside
from kilofed.errors import DataError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "IGNORED",
    "TEMPLATES",
    "Example",
    "Renderer",
    "Row",
    "Rows",
    "class_names",
    "layout",
    "read",
    "row_hash",
    "set_aside",
]

IGNORED = -100
"""Label of a token that is not a target."""

TEMPLATES: dict[str, tuple[str, str]] = {
    # name: (prompt with a context, prompt without one); the response follows directly, after a space if the prompt does
    # not end in white space, since many tokenisers have tokens of a word with its leading space
    "plain": ("{instruction}\n{context}\n", "{instruction}\n"),
    "alpaca": (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n",
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:\n",
    ),
    "bare": ("{instruction}\n{context}", "{instruction}"),
    "qa": ("{context}\nQ: {instruction}\nA:", "Q: {instruction}\nA:"),
    "question": ("{context}\nQuestion: {instruction}\nAnswer: ", "Question: {instruction}\nAnswer: "),
}

Turn = Mapping[str, object]
"""`role` and `content`, both text."""
Piece = tuple[str, bool]
"""A span of text and whether its tokens are targets."""


class Example(NamedTuple):
    """One tokenised row."""

    input_ids: list[int]
    labels: list[int]
    """input_ids at targets, IGNORED elsewhere; same length."""
    prompt_ids: list[int]
    """The prompt for generation; a prefix of input_ids unless the row was truncated."""
    references: list[str]
    """Reference answers; empty for plain text."""
    label: int | None = None
    """Index of the row's class, IGNORED if unknown; None for a language model. With a class, labels and prompt_ids are
    empty."""

    @property
    def has_targets(self) -> bool:
        """Whether the row has a target token or a class."""
        if self.label is not None:
            return self.label != IGNORED
        return any(label != IGNORED for label in self.labels[1:])


class Renderer:
    """Converts rows to examples for one tokeniser, template and set of columns.

    Args:
        kind: result of `layout` for the rows.
        classes: names of the classes in the order of their indices, for classification.
        warn: is told of the first rows that have nothing to learn.

    Raises:
        DataError: the template does not exist or does not fit the rows, a conversation is malformed, or the chat template
            refuses it or rewrites earlier turns.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        spec: DataSpec,
        kind: str,
        classes: Sequence[str] = (),
        *,
        warn: Warn = log_warning,
    ) -> None:
        self.tokenizer, self.spec, self.kind, self._warn = tokenizer, spec, kind, warn
        self._classes = {name: number for number, name in enumerate(classes)}
        self.template = _template(tokenizer, spec, kind)
        self.num_cut = 0
        """Number of examples so far that were longer than max_length."""
        self.num_empty = 0
        """Number of rows so far that had no target and were skipped."""
        self._special = {token for token, word in tokenizer.added_tokens_decoder.items() if word.special}
        self._special |= set(tokenizer.all_special_ids)

    def __call__(self, rows: Iterable[Row]) -> list[Example]:
        """Examples of all rows that have a target, in order; warns once of rows that have none."""
        examples = [self._example(row) for row in rows]
        usable = [e for e in examples if e.has_targets]
        if (num_empty := len(examples) - len(usable)) and not self.num_empty:
            what, column = ("label", "label") if self.kind == "label" else ("answer", "response")
            self._warn(
                f"{num_empty} of {len(examples)} rows have no {what} and are skipped; fill in data.columns.{column}, "
                "or drop them"
            )
        self.num_empty += num_empty
        return usable

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of the prompt for the next answer; templates for single questions use the last message only."""
        if self.kind == "messages" or self.template == "chat":
            pieces, _ = self._conversation([*messages, {"role": "assistant", "content": "-"}])
        elif self.kind == "text":
            pieces = [(messages[-1]["content"], False), ("-", True)]
        else:
            columns = self.spec.columns
            pieces, _ = self._pieces({columns.instruction: messages[-1]["content"], columns.response: "-"})
        return self._cut(*self._tokens(pieces), []).prompt_ids

    def key(self, row: Row, *, answer: bool = True) -> str:
        """What a model sees of a row, to find duplicates; without its answer if `answer` is false."""
        columns = self.spec.columns
        if self.kind == "label":
            return json.dumps([_text(row[columns.text]), _text(row[columns.label]) if answer else ""])
        if self.kind == "text":
            return _text(row[columns.text])
        if self.kind == "messages":
            turns = _turns(row[columns.messages])
            last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
            return json.dumps([[turn["role"], turn["content"]] for turn in turns[: last + answer]])
        asked = [_text(row[columns.instruction]), self._context(row)]
        return json.dumps([asked, _references(row[columns.response]) if answer else []])

    def classed(self, text: str, name: str) -> Example:
        """A text with the index of its class; IGNORED if `name` is empty. Raises DataError: not one of the classes."""
        if name and name not in self._classes:
            raise DataError(_unknown_label(name, self._classes))
        ids = self.tokenizer.encode(text, verbose=False)
        if len(ids) > self.spec.max_length:
            self.num_cut += 1
            ids = self.tokenizer.encode(text, truncation=True, max_length=self.spec.max_length)
        ids = ids or [self.tokenizer.pad_token_id]  # A row with empty text still counts.
        return Example(list(ids), [], [], [name] if name else [], self._classes.get(name, IGNORED))

    def _example(self, row: Row) -> Example:
        if self.kind == "label":
            columns = self.spec.columns
            return self.classed(_text(row[columns.text]), _text(row[columns.label]))
        pieces, references = self._pieces(row)
        ids, labels, prompt_end = self._tokens(pieces)
        self.num_cut += len(ids) > self.spec.max_length
        return self._cut(ids, labels, prompt_end, references)

    def _pieces(self, row: Row) -> tuple[list[Piece], list[str]]:
        """Spans of text, and the reference answers."""
        columns = self.spec.columns
        if self.kind == "text":
            return [(_text(row[columns.text]), True)], []
        if self.kind == "messages":
            return self._conversation(_turns(row[columns.messages]))
        references = _references(row[columns.response])
        first = next(iter(references), "")
        instruction, context = _text(row[columns.instruction]), self._context(row)
        if self.template == "chat":
            asked = f"{instruction}\n\n{context}" if context else instruction
            pieces, _ = self._conversation(
                [{"role": "user", "content": asked}, {"role": "assistant", "content": first}]
            )
            return (pieces if first else [(text, False) for text, _ in pieces]), references
        with_context, without = TEMPLATES[self.template]
        prompt = (with_context if context else without).format(instruction=instruction, context=context)
        space = " " if first and not prompt[-1:].isspace() else ""
        return [(prompt, False), (space + first, True)], references

    def _context(self, row: Row) -> str:
        columns = self.spec.columns
        return "" if columns.context == columns.instruction else _text(row.get(columns.context))

    def _conversation(self, turns: Sequence[Turn]) -> tuple[list[Piece], list[str]]:
        """A conversation whose targets are the assistant's turns; turns after the last of them are dropped."""
        answers = [str(turn["content"]) for turn in turns if turn["role"] == "assistant"]
        return (self._chat(turns) if self.template == "chat" else self._plain(turns)), answers[-1:]

    def _chat(self, turns: Sequence[Turn]) -> list[Piece]:
        pieces: list[Piece] = []
        rendered = ""
        for number, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            before, after = self._rendered(turns[:number], ask=True), self._rendered(turns[: number + 1], ask=False)
            if not before.startswith(rendered) or not after.startswith(before):
                raise DataError("the chat template rewrites earlier turns, so that answers cannot be told from prompts; "
                                "use data.template=plain")  # fmt: skip
            pieces += [(before[len(rendered) :], False), (after[len(before) :], True)]
            rendered = after
        return pieces

    def _rendered(self, turns: Sequence[Turn], *, ask: bool) -> str:
        try:
            conversation = [{name: str(text) for name, text in turn.items()} for turn in turns]
            return cast(
                str, self.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=ask)
            )
        except TemplateError as error:
            roles = ", ".join(str(turn["role"]) for turn in turns) or "nobody"
            raise DataError(
                f"the chat template refuses a conversation of {roles} ({error}); correct the rows, or use data.template=plain"
            ) from error

    def _plain(self, turns: Sequence[Turn]) -> list[Piece]:
        # Without an end token, a line break marks the end of an answer.
        end = "\n" if self.tokenizer.eos_token_id is None else ""
        pieces: list[Piece] = []
        asked = ""
        for turn in turns:
            if turn["role"] == "assistant":
                pieces += [(asked + "Assistant: ", False), (f"{turn['content']}{end}", True)]
                asked = "" if end else "\n"
            else:
                asked += f"{str(turn['role']).capitalize()}: {turn['content']}\n"
        return pieces

    def _tokens(self, pieces: Sequence[Piece]) -> tuple[list[int], list[int], int]:
        """Token ids, labels, and the position at which the last target span begins."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        ids: list[int] = []
        labels: list[int] = []
        prompt_end = 0
        if self.template != "chat" and bos is not None:
            ids, labels = [bos], [IGNORED]
        for text, is_target in pieces:
            piece = self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
            num_targets = len(piece) if is_target else 0
            if is_target and self.template == "chat":
                # The template may continue after the end token, for instance with a line break, which is not a target.
                num_targets = 1 + max(
                    (i for i, token in enumerate(piece) if token in self._special), default=len(piece) - 1
                )
            elif is_target and piece and eos is not None:
                piece, num_targets = [*piece, eos], len(piece) + 1
            if is_target:
                prompt_end = len(ids)
            ids += piece
            labels += piece[:num_targets] + [IGNORED] * (len(piece) - num_targets)
        return ids, labels, prompt_end

    def _cut(self, ids: list[int], labels: list[int], prompt_end: int, references: list[str]) -> Example:
        """Truncate to max_length tokens: the prompt from the left down to a quarter, then the answer from the right."""
        bos, most = self.tokenizer.bos_token_id, self.spec.max_length
        lead = 1 if bos is not None and ids[:1] == [bos] else 0  # The start token is kept.
        room = most - lead
        prompt = ids[lead:prompt_end]
        prompt_ids = ids[:lead] + prompt[max(len(prompt) - room, 0) :]
        if len(ids) > most:
            left = lead + min(len(ids) - most, max(len(prompt) - room // 4, 0))
            ids, labels = ids[:lead] + ids[left : left + room], labels[:lead] + labels[left : left + room]
        return Example(ids, labels, prompt_ids, references)


def class_names(spec: DataSpec, rows: Rows) -> tuple[str, ...]:
    """Names of the classes in the order of their indices: data.labels, else those of the training rows, sorted.

    Empty for language models.

    Raises:
        DataError: fewer than two classes, one named twice, or a row with a label that is not among them.
    """
    if spec.task != "classify":
        if spec.labels:
            raise DataError("data.labels needs data.task=classify; set that too, or remove data.labels")
        return ()
    column = spec.columns.label
    found = {_text(row[column]) for row in rows.train} - {""}
    names = spec.labels or tuple(sorted(found))
    if len(set(names)) < len(names):
        raise DataError("data.labels has a label twice; remove one")
    if len(names) < 2:
        seen = f"all rows have the label {names[0]!r}" if names else "no row has a label"
        raise DataError(f"{seen}; expected at least two labels in column {column}; check data.columns.label")
    for what, some in (("row", rows.train), ("held-out row", rows.test)):
        for number, row in enumerate(some, 1):
            if (name := _text(row[column])) and name not in names:
                raise DataError(f"{what} {number}: {_unknown_label(name, names)}")
    return names


def _unknown_label(name: str, names: Iterable[str]) -> str:
    names = list(names)
    return (
        f"the label {name!r} is not one of the {len(names)} labels{nearest(name, names)}; correct or drop the row, "
        "or list all labels in data.labels"
    )


def _template(tokenizer: "PreTrainedTokenizerBase", spec: DataSpec, kind: str) -> str:
    """The template's name; empty for plain text and classification."""
    name = spec.template
    if kind == "label":
        return ""
    if name and name != "chat" and name not in TEMPLATES:
        raise DataError(f"data.template is {name!r}{nearest(name, [*TEMPLATES, 'chat'])}")
    if name == "chat" and not tokenizer.chat_template:
        raise DataError(f"data.template is 'chat' but the tokeniser has none; use one of {', '.join(TEMPLATES)}")
    if kind == "text" and name:
        raise DataError(
            f"data.template is {name!r} but the rows are plain text, which has no prompt; remove data.template"
        )
    if kind == "messages" and name not in ("", "chat", "plain"):
        raise DataError(f"data.template is {name!r}, which is for single questions; use chat or plain for messages")
    if kind == "text":
        return ""
    return name or ("chat" if tokenizer.chat_template else "plain")


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _references(value: object) -> list[str]:
    """Reference answers; the first is the target."""
    return [_text(one) for one in value] if isinstance(value, list | tuple) else [_text(value)]


def _turns(value: object) -> Sequence[Turn]:
    if isinstance(value, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in value
    ):
        return value
    raise DataError(f"messages are {str(value)[:100]!r}; expected a list of {{role, content}}, both text")
