"""Rows into tokens: map columns, fill the prompt template, mask what is not learnt, cut to length."""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

from jinja2 import TemplateError

from kilofed.config.recipe import DataSpec
from kilofed.data.readers import Row, Rows, layout, read, row_hash, set_aside
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

log = logging.getLogger("kilofed")

IGNORED = -100
"""Label of a token that is not learnt."""

TEMPLATES: dict[str, tuple[str, str]] = {
    # name: (prompt with a context, prompt without one); the response follows at once, after a space where the prompt
    # does not end in one: such tokenisers as have words with their space in front then see the words that they know
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
"""A stretch of text and whether it is learnt."""


class Example(NamedTuple):
    """One tokenised row."""

    input_ids: list[int]
    labels: list[int]
    """input_ids where learnt, IGNORED elsewhere; same length."""
    prompt_ids: list[int]
    """What a model is given when it is asked to answer; begins input_ids unless the row was cut."""
    references: list[str]
    """Right answers; empty for running text."""
    label: int | None = None
    """Number of the row's class, IGNORED where it is not known; None where tokens are learnt. With a class, labels and
    prompt_ids are empty."""

    @property
    def is_learnt(self) -> bool:
        """Whether there is anything to learn from it."""
        if self.label is not None:
            return self.label != IGNORED
        return any(label != IGNORED for label in self.labels[1:])


class Renderer:
    """Rows to examples for one tokeniser, template and set of columns.

    Args:
        kind: what `layout` said of the rows.
        classes: names of the classes, in the order of their numbers, for rows to classify.

    Raises:
        DataError: a template that does not exist or does not fit, a malformed talk, a chat template that refuses a
            talk or rewrites earlier turns.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", spec: DataSpec, kind: str, classes: Sequence[str] = ()
    ) -> None:
        self.tokenizer, self.spec, self.kind = tokenizer, spec, kind
        self._classes = {name: number for number, name in enumerate(classes)}
        self.template = _template(tokenizer, spec, kind)
        self.num_cut = 0
        """Examples so far that were longer than max_length."""
        self.num_empty = 0
        """Rows so far that had nothing to learn and were left out."""
        self._special = {token for token, word in tokenizer.added_tokens_decoder.items() if word.special}
        self._special |= set(tokenizer.all_special_ids)

    def __call__(self, rows: Iterable[Row]) -> list[Example]:
        """Examples of all rows that have something to learn, in order; warns of the first that have not."""
        examples = [self._example(row) for row in rows]
        learnt = [e for e in examples if e.is_learnt]
        if (num_empty := len(examples) - len(learnt)) and not self.num_empty:
            what, column = ("label", "label") if self.kind == "label" else ("answer", "response")
            log.warning(
                "%d of %d rows have no %s and are left out: fill in data.columns.%s, or drop them",
                num_empty,
                len(examples),
                what,
                column,
            )
        self.num_empty += num_empty
        return learnt

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids that ask for the next answer of a talk; a template for single questions sees the last one only."""
        if self.kind == "messages" or self.template == "chat":
            pieces, _ = self._talk([*messages, {"role": "assistant", "content": "-"}])
        elif self.kind == "text":
            pieces = [(messages[-1]["content"], False), ("-", True)]
        else:
            columns = self.spec.columns
            pieces, _ = self._pieces({columns.instruction: messages[-1]["content"], columns.response: "-"})
        return self._cut(*self._tokens(pieces), []).prompt_ids

    def key(self, row: Row, *, answer: bool = True) -> str:
        """What a model sees of a row, to tell whether two rows are one; without its answer if so asked."""
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
        """A text with the number of its class; IGNORED for no name. Raises DataError: not one of the classes."""
        if name and name not in self._classes:
            raise DataError(_unknown(name, self._classes))
        ids = self.tokenizer.encode(text, verbose=False)
        if len(ids) > self.spec.max_length:
            self.num_cut += 1
            ids = self.tokenizer.encode(text, truncation=True, max_length=self.spec.max_length)
        ids = ids or [self.tokenizer.pad_token_id]  # No text at all is still a row.
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
        """Stretches of text, and the right answers."""
        columns = self.spec.columns
        if self.kind == "text":
            return [(_text(row[columns.text]), True)], []
        if self.kind == "messages":
            return self._talk(_turns(row[columns.messages]))
        references = _references(row[columns.response])
        first = next(iter(references), "")
        instruction, context = _text(row[columns.instruction]), self._context(row)
        if self.template == "chat":
            asked = f"{instruction}\n\n{context}" if context else instruction
            pieces, _ = self._talk([{"role": "user", "content": asked}, {"role": "assistant", "content": first}])
            return (pieces if first else [(text, False) for text, _ in pieces]), references
        with_context, without = TEMPLATES[self.template]
        prompt = (with_context if context else without).format(instruction=instruction, context=context)
        space = " " if first and not prompt[-1:].isspace() else ""
        return [(prompt, False), (space + first, True)], references

    def _context(self, row: Row) -> str:
        columns = self.spec.columns
        return "" if columns.context == columns.instruction else _text(row.get(columns.context))

    def _talk(self, turns: Sequence[Turn]) -> tuple[list[Piece], list[str]]:
        """A talk in which the assistant's turns are learnt; what follows the last of them is left out."""
        answers = [str(turn["content"]) for turn in turns if turn["role"] == "assistant"]
        return (self._chat(turns) if self.template == "chat" else self._plain(turns)), answers[-1:]

    def _chat(self, turns: Sequence[Turn]) -> list[Piece]:
        pieces: list[Piece] = []
        done = ""
        for number, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            before, after = self._rendered(turns[:number], ask=True), self._rendered(turns[: number + 1], ask=False)
            if not before.startswith(done) or not after.startswith(before):
                raise DataError("the chat template rewrites earlier turns, so that answers cannot be told from prompts: "
                                "use data.template=plain")  # fmt: skip
            pieces += [(before[len(done) :], False), (after[len(before) :], True)]
            done = after
        return pieces

    def _rendered(self, turns: Sequence[Turn], *, ask: bool) -> str:
        try:
            talk = [{name: str(text) for name, text in turn.items()} for turn in turns]
            return cast(str, self.tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=ask))
        except TemplateError as error:
            roles = ", ".join(str(turn["role"]) for turn in turns) or "nobody"
            raise DataError(
                f"the chat template refuses a talk of {roles} ({error}): mend the rows, or use data.template=plain"
            ) from error

    def _plain(self, turns: Sequence[Turn]) -> list[Piece]:
        # Without an end token, the line's end is what says that an answer is over.
        closing = "\n" if self.tokenizer.eos_token_id is None else ""
        pieces: list[Piece] = []
        asked = ""
        for turn in turns:
            if turn["role"] == "assistant":
                pieces += [(asked + "Assistant: ", False), (f"{turn['content']}{closing}", True)]
                asked = "" if closing else "\n"
            else:
                asked += f"{str(turn['role']).capitalize()}: {turn['content']}\n"
        return pieces

    def _tokens(self, pieces: Sequence[Piece]) -> tuple[list[int], list[int], int]:
        """Tokens, labels, and where the last learnt stretch begins."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        ids: list[int] = []
        labels: list[int] = []
        prompt_end = 0
        if self.template != "chat" and bos is not None:
            ids, labels = [bos], [IGNORED]
        for text, learnt in pieces:
            piece = self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
            num_learnt = len(piece) if learnt else 0
            if learnt and self.template == "chat":
                # The template may go on behind the end token, with a line break for instance; no model needs to say that.
                num_learnt = 1 + max(
                    (i for i, token in enumerate(piece) if token in self._special), default=len(piece) - 1
                )
            elif learnt and piece and eos is not None:
                piece, num_learnt = [*piece, eos], len(piece) + 1
            if learnt:
                prompt_end = len(ids)
            ids += piece
            labels += piece[:num_learnt] + [IGNORED] * (len(piece) - num_learnt)
        return ids, labels, prompt_end

    def _cut(self, ids: list[int], labels: list[int], prompt_end: int, references: list[str]) -> Example:
        """At most max_length tokens: the prompt loses its left down to a quarter, then the answer its right."""
        bos, most = self.tokenizer.bos_token_id, self.spec.max_length
        lead = 1 if bos is not None and ids[:1] == [bos] else 0  # It stays in front.
        room = most - lead
        prompt = ids[lead:prompt_end]
        prompt_ids = ids[:lead] + prompt[max(len(prompt) - room, 0) :]
        if len(ids) > most:
            left = lead + min(len(ids) - most, max(len(prompt) - room // 4, 0))
            ids, labels = ids[:lead] + ids[left : left + room], labels[:lead] + labels[left : left + room]
        return Example(ids, labels, prompt_ids, references)


def class_names(spec: DataSpec, rows: Rows) -> tuple[str, ...]:
    """Names of the classes in the order of their numbers: data.labels, else those of the training rows sorted as text.

    Empty where nothing is classified.

    Raises:
        DataError: fewer than two classes, one named twice, or a row with a label that is not among them.
    """
    if spec.task != "classify":
        if spec.labels:
            raise DataError("data.labels is for data.task=classify: set that too, or leave it out")
        return ()
    column = spec.columns.label
    found = {_text(row[column]) for row in rows.train} - {""}
    names = spec.labels or tuple(sorted(found))
    if len(set(names)) < len(names):
        raise DataError("data.labels names a label twice: drop one")
    if len(names) < 2:
        seen = f"all rows have the label {names[0]!r}" if names else "no row has a label"
        raise DataError(f"{seen}; expected at least two labels in column {column}: check data.columns.label")
    for what, some in (("row", rows.train), ("held-out row", rows.test)):
        for number, row in enumerate(some, 1):
            if (name := _text(row[column])) and name not in names:
                raise DataError(f"{what} {number}: {_unknown(name, names)}")
    return names


def _unknown(name: str, names: Iterable[str]) -> str:
    names = list(names)
    return (
        f"the label {name!r} is not one of the {len(names)} agreed ones{nearest(name, names)}: mend the row, drop it, "
        "or name all labels in data.labels"
    )


def _template(tokenizer: "PreTrainedTokenizerBase", spec: DataSpec, kind: str) -> str:
    """The template's name; empty for running text and for rows to classify."""
    name = spec.template
    if kind == "label":
        return ""
    if name and name != "chat" and name not in TEMPLATES:
        raise DataError(f"data.template is {name!r}{nearest(name, [*TEMPLATES, 'chat'])}")
    if name == "chat" and not tokenizer.chat_template:
        raise DataError(f"data.template is 'chat' but the tokeniser has none; use one of {', '.join(TEMPLATES)}")
    if kind == "text" and name:
        raise DataError(f"data.template is {name!r} but the rows are running text, which has no prompt: leave it out")
    if kind == "messages" and name not in ("", "chat", "plain"):
        raise DataError(f"data.template is {name!r}, which is for single questions; messages take chat or plain")
    if kind == "text":
        return ""
    return name or ("chat" if tokenizer.chat_template else "plain")


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _references(value: object) -> list[str]:
    """Right answers; the first is learnt."""
    return [_text(one) for one in value] if isinstance(value, list | tuple) else [_text(value)]


def _turns(value: object) -> Sequence[Turn]:
    if isinstance(value, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in value
    ):
        return value
    raise DataError(f"messages are {str(value)[:100]!r}; expected a list of {{role, content}}, both text")
