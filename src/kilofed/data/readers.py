"""Read rows from embedded sources, files, folders, saved data sets and the hub."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from kilofed import hub
from kilofed.config.fields import Value
from kilofed.config.recipe import ColumnsSpec, DataSpec
from kilofed.data import sources
from kilofed.data.formats import FORMATS, Row, first_line, read_file, reader_of
from kilofed.data.notices import Warn, log_warning
from kilofed.errors import DataError, nearest, readable, shorten

HELD_OUT = (("test",), ("valid", "val"), ("dev", "eval"))
"""Prefixes of names of held-out files and splits; the first kind that exists is used."""
HUB_OPTIONS = ("name", "revision")
"""Options of a hub id: the data set's configuration; a branch, tag or commit."""


@dataclass(frozen=True)
class Rows:
    """The rows of a source before they are partitioned over clients."""

    train: list[Row]
    test: list[Row]
    note: str
    """One line on what was read."""


def read(spec: DataSpec, seed: int, *, warn: Warn = log_warning) -> Rows:
    """The rows of `spec.source`; warns of unused columns.

    Raises:
        DataError: a missing file or column, a broken line (with its number), no rows, a hub id without network, or an
            unknown option.
    """
    train, test, note = _read(spec.source, spec.options, seed, warn)
    if not train:
        raise DataError(f"{spec.source} has no rows; expected at least one")
    if spec.test:
        first, second, _ = _read(spec.test, {}, seed, warn)
        test = second or first
        if not test:
            raise DataError(f"data.test is {spec.test}, which has no rows; expected at least one")
    needed = _needed(layout(spec.columns, train, spec.task), spec.columns)
    check_columns(needed, test, "held-out row")
    if spec.source not in sources.names() and (names := unused_columns(spec, train)):
        warn(unused_sentence(names))
    if spec.max_rows and len(train) > spec.max_rows:
        note = f"{spec.source}: {len(train)} training rows, of which data.max_rows takes {spec.max_rows}"
        train = sorted(train, key=lambda row: row_hash(row, seed))[: spec.max_rows]
    return Rows(train, test, note or f"{spec.source}: {len(train)} training rows, {len(test)} held-out rows")


def set_aside(rows: Rows, spec: DataSpec, seed: int, *, warn: Warn = log_warning) -> tuple[Rows, list[Row]]:
    """The clients' rows and the public rows: those of `spec.public`, or a share of the training rows.

    Raises:
        DataError: as `read`; or the share leaves one side without rows.
    """
    if spec.public:
        first, second, _ = _read(spec.public, {}, seed, warn)
        if not first and not second:
            raise DataError(f"data.public is {spec.public}, which has no rows; expected at least one")
        return rows, first or second
    if not spec.public_share:
        return rows, []
    number = round(spec.public_share * len(rows.train))
    if not 0 < number < len(rows.train):
        raise DataError(
            f"data.public_share={spec.public_share:g} of {len(rows.train)} rows leaves one side without rows; change it"
        )
    # Not the order of max_rows, so that the share is representative.
    order = sorted(range(len(rows.train)), key=lambda at: row_hash(rows.train[at], -1 - seed))
    taken = sorted(order[:number])
    left = set(order[number:])
    return replace(rows, train=[row for at, row in enumerate(rows.train) if at in left]), [
        rows.train[at] for at in taken
    ]


def row_hash(row: Row, seed: int = 0) -> int:
    """A hash of the row's content and `seed`, the same on every machine."""
    text = json.dumps([seed, dict(row)], sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def layout(columns: ColumnsSpec, rows: Sequence[Row], task: str = "generate") -> str:
    """`response`, `messages` or `text`, by the columns that the rows have; `label` for classification.

    Raises:
        DataError: none of them, a mapped column that no row has, or a row that lacks a needed column.
    """
    have = {name for row in rows for name in row}
    usual = vars(ColumnsSpec())
    for role, name in vars(columns).items():
        if name != usual[role] and name not in have:
            raise DataError(f"data.columns.{role} is {name!r}, which no row has{nearest(name, have)}")
    for kind in ("label",) if task == "classify" else ("response", "messages", "text"):
        if (needed := _needed(kind, columns)) <= have:
            check_columns(needed, rows, "row")
            return kind
    seen = f"the rows have the columns {shorten(', '.join(sorted(have)), 1000)}"
    if task == "classify":
        raise DataError(
            f"{seen}; expected {columns.text} and {columns.label}\n"
            "  hint: data.columns.text=NAME data.columns.label=NAME"
        )
    raise DataError(
        f"{seen}; expected {columns.instruction} and {columns.response}, or {columns.messages}, or {columns.text}\n"
        "  hint: data.columns.instruction=NAME data.columns.response=NAME"
    )


def unused_columns(spec: DataSpec, rows: Sequence[Row]) -> list[str]:
    """Columns that are neither tokenised nor used for the partition."""
    kind, part = layout(spec.columns, rows, spec.task), spec.partition
    used = _needed(kind, spec.columns)
    if kind == "response":
        used |= {spec.columns.context}
    if part.kind not in ("iid", "size"):
        used |= {part.column}
    return sorted({name for row in rows for name in row} - used)


def unused_sentence(names: Sequence[str]) -> str:
    """A warning about unused columns."""
    return f"unused columns: {', '.join(names)}; map them with data.columns.* or data.partition.column"


def _needed(kind: str, columns: ColumnsSpec) -> set[str]:
    by_kind = {
        "response": {columns.instruction, columns.response},
        "messages": {columns.messages},
        "text": {columns.text},
        "label": {columns.text, columns.label},
    }
    return by_kind[kind]


def check_columns(needed: set[str], rows: Sequence[Row], what: str) -> None:
    """Raise DataError where a row lacks a needed column; `what` is what one row is called."""
    for number, row in enumerate(rows, 1):
        if missing := needed - row.keys():
            has = shorten(", ".join(sorted(row))) or "none"
            raise DataError(
                f"{what} {number} has no column {', '.join(sorted(missing))}; it has {has}: fill it in or drop the row"
            )


def _read(source: str, options: Mapping[str, Value], seed: int, warn: Warn) -> tuple[list[Row], list[Row], str]:
    """Training rows, held-out rows and the note of an embedded source."""
    if source in sources.names():
        try:
            found = sources.load(source, seed=seed, **options)
        except (ValueError, TypeError) as error:
            raise DataError(f"data.source={source}: {error}") from error
        return list(found.train), list(found.test), found.note
    path = _path(source)
    if not path.exists() and not _looks_local(source, path):
        return *_read_hub(source, options, warn), ""
    if options:
        raise DataError(
            f"data.options has {', '.join(options)}, but {source} is a file, which has no options; remove them"
        )
    if path.is_dir():
        return *_read_folder(path, warn), ""
    if path.exists():
        return read_file(path), [], ""
    raise DataError(f"file or folder {source} does not exist in {Path.cwd()}; check data.source and data.test")


def _path(source: str) -> Path:
    try:
        path = Path(source).expanduser()
        path.exists()
    except (OSError, ValueError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(
            f"{shorten(readable(source))} cannot be the name of a file ({why}); check data.source, data.test and data.public"
        ) from error
    return path


def _looks_local(source: str, path: Path) -> bool:
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or reader_of(path) is not None


def _read_folder(path: Path, warn: Warn) -> tuple[list[Row], list[Row]]:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _read_saved(path, warn)
    files = sorted(f for f in path.iterdir() if reader_of(f)) or sorted(f for f in path.rglob("*") if reader_of(f))
    train = [file for file in files if file.name.lower().startswith("train")]
    kinds = [[file for file in files if file.name.lower().startswith(prefix)] for prefix in HELD_OUT]
    test = next((kind for kind in kinds if kind), [])
    train = train or [file for file in files if not any(file in kind for kind in kinds)]
    if not train:
        names = ", ".join(sorted(item.name for item in path.iterdir())) or "nothing"
        raise DataError(f"{path} has no {FORMATS} file of training rows; it has {names}")
    if unread := [file.name for file in files if file not in train and file not in test]:
        warn(f"{path}: files whose names begin with neither train nor test are not read: {', '.join(unread)}")
    return [row for file in train for row in read_file(file)], [row for file in test for row in read_file(file)]


def _read_saved(path: Path, warn: Warn) -> tuple[list[Row], list[Row]]:
    import datasets

    try:
        return _splits(datasets.load_from_disk(str(path)), warn)
    except DataError:
        raise
    except Exception as error:  # The library reads whatever the folder's files say.
        raise DataError(f"{path} is not a complete data set of save_to_disk ({first_line(error)})") from error


def _read_hub(source: str, options: Mapping[str, Value], warn: Warn) -> tuple[list[Row], list[Row]]:
    import datasets

    if unknown := sorted(set(options) - set(HUB_OPTIONS)):
        raise DataError(f"data.options.{unknown[0]} is not an option of a hub id{nearest(unknown[0], HUB_OPTIONS)}")
    hub.settle()
    try:
        return _splits(datasets.load_dataset(source, **options), warn)
    except Exception as error:  # Every library below has its own exceptions for network failures.
        raise DataError(
            f"{source} is not an embedded source ({', '.join(sources.names())}), file or folder, and loading it from the hub "
            f"failed ({type(error).__name__}: {first_line(error)}); check the name and the network"
        ) from error


def _splits(found: object, warn: Warn) -> tuple[list[Row], list[Row]]:
    import datasets

    if not isinstance(found, datasets.DatasetDict):
        return list(cast(Iterable[Row], found)), []
    names = list(found)
    train = next((name for name in names if name.startswith("train")), names[0] if len(names) == 1 else "")
    if not train:
        raise DataError(f"the data set has the splits {', '.join(names) or 'nothing'}; expected one called train")
    test = next((name for prefix in HELD_OUT for name in names if name.startswith(prefix)), "")
    if unread := [name for name in names if name not in (train, test)]:
        warn(f"splits that are not read: {', '.join(unread)}")
    return list(found[train]), list(found[test]) if test and test != train else []
