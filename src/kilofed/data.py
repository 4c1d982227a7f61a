"""Rows into tokens: read files and data sets, map columns, fill the prompt template, mask the prompt."""

import gzip
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from kilofed.errors import DataError, nearest
from kilofed.recipe import ColumnsSpec, DataSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("kilofed")

IGNORED = -100
"""Label of a token that is not learnt."""

EMBEDDED = ("pydocs", "gazetteer")

TEMPLATES: dict[str, tuple[str, str]] = {
    # name: (prompt with a context, prompt without one); the response follows at once
    "plain": ("{instruction}\n{context}\n", "{instruction}\n"),
    "alpaca": (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n",
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:\n",
    ),
    "question": ("{context}\nQuestion: {instruction}\nAnswer: ", "Question: {instruction}\nAnswer: "),
}

Row = Mapping[str, object]


class Example(NamedTuple):
    """One tokenised row."""

    input_ids: list[int]
    labels: list[int]
    """input_ids where learnt, IGNORED elsewhere; same length."""
    prompt_ids: list[int]
    """What a model is given when it is asked to answer."""
    references: list[str]
    """Right answers; empty for running text."""


@dataclass(frozen=True)
class Rows:
    """What a source holds before it is divided among clients."""

    train: list[Row]
    test: list[Row]
    note: str
    """What was read, in one line."""


def read(spec: DataSpec, seed: int) -> Rows:
    """The rows that `spec.source` names.

    Raises:
        DataError: missing file, broken line (by number), no rows, a hub id without network.
    """
    if spec.source in EMBEDDED:
        from kilofed import sources

        found = sources.load(spec.source, seed=seed, **spec.options)
        return Rows(list(found.train), list(found.test), found.note)
    train, test = _read_any(spec.source)
    if spec.test:
        test = _read_file(Path(spec.test)) if Path(spec.test).exists() else _read_any(spec.test)[0]
    if not train:
        raise DataError(f"{spec.source} holds no rows; expected at least one")
    if spec.max_rows and len(train) > spec.max_rows:
        train = sorted(train, key=lambda row: row_hash(row, seed))[: spec.max_rows]
    return Rows(train, test, f"{spec.source}: {len(train)} training rows, {len(test)} held-out rows")


def row_hash(row: Row, seed: int = 0) -> int:
    """A number that depends on the row's content and `seed` alone, the same on every machine."""
    text = json.dumps([seed, dict(row)], sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def layout(columns: ColumnsSpec, rows: Sequence[Row]) -> str:
    """`response`, `messages` or `text`: which of the mapped columns these rows have.

    Raises:
        DataError: none of them, with the columns that exist.
    """
    have = set(rows[0])
    for kind, needed in (
        ("response", {columns.instruction, columns.response}),
        ("messages", {columns.messages}),
        ("text", {columns.text}),
    ):
        if needed <= have:
            return kind
    raise DataError(
        f"the rows have the columns {', '.join(sorted(have))}; expected {columns.instruction} and {columns.response}, "
        f"or {columns.messages}, or {columns.text}\n  hint: data.columns.instruction=NAME data.columns.response=NAME"
    )


class Renderer:
    """Rows to examples for one tokeniser, template and set of columns.

    Args:
        kind: what `layout` said of the rows.

    Raises:
        DataError: unknown template, a row without its column, a chat template that rewrites earlier turns.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", spec: DataSpec, kind: str) -> None:
        self.tokenizer, self.spec, self.kind = tokenizer, spec, kind
        self.template = spec.template or ("chat" if tokenizer.chat_template else "plain")
        if self.template != "chat" and self.template not in TEMPLATES:
            raise DataError(f"data.template is {self.template!r}{nearest(self.template, [*TEMPLATES, 'chat'])}")
        if self.template == "chat" and not tokenizer.chat_template:
            raise DataError(f"data.template is 'chat' but the tokeniser has none; use one of {', '.join(TEMPLATES)}")
        self.num_cut = 0
        """Examples so far that were longer than max_length."""

    def __call__(self, rows: Iterable[Row]) -> list[Example]:
        """Examples of all rows that have something to learn, in order."""
        examples = (self._example(number, row) for number, row in enumerate(rows, 1))
        return [example for example in examples if any(label != IGNORED for label in example.labels)]

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids that ask for the next answer of a talk; a template for single questions sees the last one only."""
        if self.kind == "messages" or self.template == "chat":
            pieces, _ = self._chat([*messages, {"role": "assistant", "content": "-"}])
        else:
            columns, last = self.spec.columns, messages[-1]["content"]
            pieces, _ = self._pieces({columns.instruction: last, columns.response: "-", columns.text: last})
        if self.kind == "text":
            pieces = [*pieces, ("-", True)]
        return self._cut([*((text, False) for text, _ in pieces[:-1]), pieces[-1]], []).prompt_ids

    def _example(self, number: int, row: Row) -> Example:
        try:
            pieces, references = self._pieces(row)
        except KeyError as error:
            raise DataError(f"row {number} has no column {error}; it has {', '.join(sorted(row))}") from error
        return self._cut(pieces, references)

    def _pieces(self, row: Row) -> tuple[list[tuple[str, bool]], list[str]]:
        """Stretches of text with whether they are learnt, and the right answers."""
        columns = self.spec.columns
        if self.kind == "text":
            return [(str(row[columns.text]), True)], []
        if self.kind == "messages":
            return self._chat(cast(Sequence[Mapping[str, str]], row[columns.messages]))
        answer = row[columns.response]
        references = [str(one) for one in answer] if isinstance(answer, list | tuple) else [str(answer)]
        instruction, context = str(row[columns.instruction]), str(row.get(columns.context) or "")
        if self.template == "chat":
            asked = f"{instruction}\n\n{context}" if context else instruction
            return self._chat([{"role": "user", "content": asked}, {"role": "assistant", "content": references[0]}])
        with_context, without = TEMPLATES[self.template]
        prompt = (with_context if context else without).format(instruction=instruction, context=context)
        return [(prompt, False), (references[0], True)], references

    def _chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[list[tuple[str, bool]], list[str]]:
        render = self._render_chat if self.template == "chat" else self._render_turns
        pieces: list[tuple[str, bool]] = []
        done = ""
        references: list[str] = []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = render(messages[:turn], True), render(messages[: turn + 1], False)
            if not before.startswith(done) or not after.startswith(before):
                raise DataError("the chat template rewrites earlier turns, so that answers cannot be told from prompts: "
                                "use data.template=plain")  # fmt: skip
            pieces += [(before[len(done) :], False), (after[len(before) :], True)]
            done, references = after, [message["content"]]
        return pieces, references

    def _render_chat(self, messages: Sequence[Mapping[str, str]], ask: bool) -> str:
        text = self.tokenizer.apply_chat_template(
            [dict(m) for m in messages], tokenize=False, add_generation_prompt=ask
        )
        return cast(str, text)

    def _render_turns(self, messages: Sequence[Mapping[str, str]], ask: bool) -> str:
        text = "".join(f"{m['role'].capitalize()}: {m['content']}\n" for m in messages)
        return text + "Assistant: " if ask else text

    def _cut(self, pieces: Sequence[tuple[str, bool]], references: list[str]) -> Example:
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        ids: list[int] = []
        labels: list[int] = []
        prompt_end = 0
        for text, learnt in pieces:
            piece = self.tokenizer.encode(text, add_special_tokens=False)
            if learnt:
                prompt_end = len(ids)
            ids += piece
            labels += piece if learnt else [IGNORED] * len(piece)
        if eos is not None and self.template != "chat" and labels and labels[-1] != IGNORED:
            ids, labels = [*ids, eos], [*labels, eos]
        room = self.spec.max_length - (bos is not None)
        if len(ids) > room:
            self.num_cut += 1
            # Keep the answer: cut the prompt from the left first, the answer from the right last.
            left = min(len(ids) - room, max(prompt_end - room // 4, 0))
            ids, labels, prompt_end = ids[left : left + room], labels[left : left + room], prompt_end - left
        if bos is not None and self.template != "chat":
            ids, labels, prompt_end = [bos, *ids], [IGNORED, *labels], prompt_end + 1
        return Example(ids, labels, ids[:prompt_end], references)


def _read_any(source: str) -> tuple[list[Row], list[Row]]:
    path = Path(source)
    if path.is_dir():
        return _read_folder(path)
    if path.is_file():
        return _read_file(path), []
    if path.suffix or source.startswith((".", "/", "~")):
        raise DataError(f"there is no file {source}; check data.source (paths are relative to {Path.cwd()})")
    return _read_hub(source)


def _read_folder(path: Path) -> tuple[list[Row], list[Row]]:
    if (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
        import datasets

        return _splits(datasets.load_from_disk(str(path)))
    files = sorted(file for file in path.iterdir() if _reader(file))
    held = [file for file in files if file.name.split(".")[0].startswith(("test", "validation", "eval", "dev"))]
    train = [file for file in files if file.name.split(".")[0].startswith("train")] or [
        f for f in files if f not in held
    ]
    if not train:
        names = ", ".join(sorted(item.name for item in path.iterdir())) or "nothing"
        raise DataError(f"{path} has no .jsonl, .jsonl.gz, .csv or .parquet file to train on; it holds {names}")
    return [row for file in train for row in _read_file(file)], [row for file in held[:1] for row in _read_file(file)]


def _read_hub(source: str) -> tuple[list[Row], list[Row]]:
    import datasets

    try:
        return _splits(datasets.load_dataset(source))
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{source} is no embedded source ({', '.join(EMBEDDED)}), no local file, and the hub did not give it "
            f"({type(error).__name__}: {str(error).splitlines()[0][:200]}): check the name and the network"
        ) from error


def _splits(found: object) -> tuple[list[Row], list[Row]]:
    import datasets

    if not isinstance(found, datasets.DatasetDict):
        return list(cast(Iterable[Row], found)), []
    train = "train" if "train" in found else next(iter(found))
    test = next((name for name in ("test", "validation") if name in found and name != train), "")
    return list(found[train]), list(found[test]) if test else []


def _reader(path: Path) -> Callable[[Path], list[Row]] | None:
    readers = {".jsonl": _read_jsonl, ".json": _read_jsonl, ".csv": _read_table, ".parquet": _read_table}
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    return readers.get(suffixes[-1]) if suffixes else None


def _read_file(path: Path) -> list[Row]:
    reader = _reader(path)
    if reader is None:
        raise DataError(f"{path} is not .jsonl, .jsonl.gz, .csv or .parquet")
    return reader(path)


def _read_jsonl(path: Path) -> list[Row]:
    rows: list[Row] = []
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    rows.append(_json_row(path, number, line))
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path} cannot be read after line {len(rows)} ({error}): it is cut off or no UTF-8 text"
        ) from error
    return rows


def _json_row(path: Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path} line {number} is not JSON ({error}); mend or delete that line") from error
    if not isinstance(row, dict):
        raise DataError(f"{path} line {number} is a {type(row).__name__}; expected an object with columns")
    return row


def _read_table(path: Path) -> list[Row]:
    import datasets

    kind = "csv" if ".csv" in path.suffixes else "parquet"
    try:
        found = datasets.load_dataset(kind, data_files=str(path), split="train")
    except (OSError, ValueError, RuntimeError) as error:
        cause = str(error.__cause__ or error).splitlines()[0]
        raise DataError(f"{path} is not a readable {kind} file ({cause})") from error
    return list(cast(Iterable[Row], found))
