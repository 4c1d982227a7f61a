"""Rows of one file: JSON lines, JSON, CSV or parquet, packed with gzip or not; a broken file is refused by line."""

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import cast

from kilofed.errors import DataError, shorten
from kilofed.units import size

Row = Mapping[str, object]

FORMATS = ".jsonl, .jsonl.gz, .json, .csv or .parquet"

LONGEST_LINE = 1 << 28
"""Bytes."""
MOST_EXPANSION = 200
"""Times its size that a file may unpack to; rows of text compress to a tenth or so."""
FREE = 1 << 24
"""Bytes, and values of a table, that any file may unpack to."""
DEEPEST = 32
"""Most lists and objects within one another in a row."""

_TOO_DEEP = f"has lists or objects more than {DEEPEST} deep; expected rows of columns: correct or delete it"


def reader_of(path: Path) -> Callable[[Path], list[Row]] | None:
    """What reads a file of that name; None if nothing does."""
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    name = path.name.lower().removesuffix(".gz")
    return readers.get(Path(name).suffix)


def read_file(path: Path) -> list[Row]:
    """The rows of one file.

    Raises:
        DataError: it is of no known format, broken (with the line or row), or unpacks to far more than it says.
    """
    reader = reader_of(path)
    if reader is None:
        raise DataError(f"{path} is not {FORMATS}")
    if not path.is_file():
        raise DataError(f"{path} is no regular file; expected {FORMATS}: write the rows into a file")
    try:
        return reader(path)
    except MemoryError as error:
        raise DataError(f"{path} does not fit into memory; split it, or take a share of its rows") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, decoded one by one so that an error names its line."""
    number = taken = 0
    try:
        most = _most(path)
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            while line := file.readline(LONGEST_LINE + 1):
                number, taken = number + 1, taken + len(line)
                if taken > most:
                    raise DataError(
                        f"{path} unpacks to more than {MOST_EXPANSION} times its size, which rows of text do not: "
                        "unpack it and look at it"
                    )
                if len(line) > LONGEST_LINE:
                    raise DataError(
                        f"{path} line {number} is longer than {size(LONGEST_LINE)}; write one row per line, or drop it"
                    )
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} line {number} is not UTF-8 text ({error}); save the file as UTF-8") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is truncated after line {number} ({error}); download or write it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error})") from error


def _most(path: Path) -> int:
    """Bytes, or values, that a file may unpack to."""
    return max(FREE, MOST_EXPANSION * path.stat().st_size)


def _read_jsonl(path: Path) -> list[Row]:
    return [
        _as_row(_parse(path, number, line.rstrip()), f"{path} line {number}")
        for number, line in _lines(path)
        if line.strip()
    ]


def _read_json(path: Path) -> list[Row]:
    """A list of objects, or one object per line."""
    lines = [line for _, line in _lines(path)]
    if not "".join(lines[:100]).lstrip().startswith("["):
        return _read_jsonl(path)
    rows = _parse(path, 1, "".join(lines))
    return [_as_row(row, f"{path} item {number}") for number, row in enumerate(cast(list[object], rows), 1)]


def _parse(path: Path, number: int, text: str) -> object:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        line = number + error.lineno - 1
        raise DataError(
            f"{path} line {line} is not JSON ({error.msg} at column {error.colno}); correct or delete that line"
        ) from error
    except RecursionError as error:
        raise DataError(f"{path} line {number} {_TOO_DEEP}") from error
    except ValueError as error:  # Python refuses to read a number of more than 4,300 digits.
        raise DataError(
            f"{path} line {number} has a number that cannot be read ({str(error).partition(';')[0]}); shorten it"
        ) from error
    if "\\ud" in text or "\\uD" in text:
        _refuse_surrogates(found, f"{path} line {number}")
    return found


def _refuse_surrogates(value: object, where: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} has half of a surrogate pair, {error.object[error.start]!a}, which is not text; correct it"
        ) from error
    except RecursionError as error:
        raise DataError(f"{where} {_TOO_DEEP}") from error


def _as_row(value: object, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where} is a {type(value).__name__}; expected an object with columns: correct or delete it")
    if any(_deeper(item, DEEPEST) for item in value.values()):
        raise DataError(f"{where} {_TOO_DEEP}")
    return value


def _deeper(value: object, depth: int) -> bool:
    if not isinstance(value, list | tuple | dict):
        return False
    items = value.values() if isinstance(value, dict) else value
    return not depth or any(_deeper(item, depth - 1) for item in items)


def _read_csv(path: Path) -> list[Row]:
    """Rows of text; the first line names the columns."""
    usual = csv.field_size_limit(2**31 - 1)
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    rows: list[Row] = []
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise DataError(f"{path} has a column twice: {shorten(', '.join(header))}; rename one")
        for fields in reader:
            if fields and len(fields) != len(header):
                raise DataError(
                    f"{path} line {reader.line_num} has {len(fields)} fields, the header has {len(header)}; "
                    "correct that line, or quote fields that contain commas"
                )
            if fields:
                rows.append(dict(zip(header, fields, strict=True)))
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num} is not CSV ({error}); correct that line") from error
    finally:
        csv.field_size_limit(usual)
    return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            about = file.metadata
            taken = sum(about.row_group(number).total_byte_size for number in range(about.num_row_groups))
            if max(taken, about.num_rows * about.num_columns) > _most(path):
                raise DataError(
                    f"{path} says that it unpacks to {size(taken)} and {about.num_rows:,} rows of {about.num_columns} "
                    f"columns, more than {MOST_EXPANSION} times its size: download or write it again"
                )
            rows = file.read().to_pylist()
    except DataError:
        raise
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{path} is not a complete parquet file ({first_line(error)}); download or write it again"
        ) from error
    return [_as_row(row, f"{path} row {number}") for number, row in enumerate(rows, 1)]


def first_line(error: Exception) -> str:
    """The beginning of what an exception says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
