"""A broken data file is refused in one sentence that names the file and the line, and takes no more than it should."""

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from kilofed.config.recipe import DataSpec
from kilofed.data import formats
from kilofed.data.formats import read_file, reader_of
from kilofed.data.readers import read
from kilofed.errors import DataError


def test_a_reader_is_chosen_by_the_name() -> None:
    assert all(reader_of(Path(name)) for name in ("a.jsonl", "A.JSONL.GZ", "a.json", "a.csv.gz", "a.parquet"))
    assert reader_of(Path("a.txt")) is reader_of(Path("a.gz")) is reader_of(Path("jsonl")) is None


@pytest.mark.parametrize(
    ("name", "body", "said"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": ' + b"9" * 5000 + b"}", r"line 2 has a number that cannot be read \(Exceeds"),
        ("a.jsonl", b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", r"line 1 has lists or objects more than 32"),
        ("a.jsonl", b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}", r"line 1 has lists or objects more than 32 deep"),
        ("a.jsonl", b'{"a": 1}\n{"a": ["\\uD800"]}', r"line 2 has half of a surrogate pair, '\\ud800'"),
        ("a.jsonl", b'{"\\udfff": 1}', r"line 1 has half of a surrogate pair, '\\udfff'"),
        ("a.jsonl", b"\n7\n", r"line 2 is a int; expected an object with columns: correct or delete it"),
        ("a.json", b"[" * 100_000, r"line 1 has lists or objects more than 32 deep"),
        ("a.json", b'[{"a": 1}, [2]]', r"item 2 is a list; expected an object"),
        ("a.csv", "a,b\n".encode("utf-16"), r"line 1 is not UTF-8 text"),
        ("a.csv", b'a,b\n"x"y,z\n', r"line 2 is not CSV"),
        ("a.parquet", b"PAR1" + b"\xff" * 100 + b"PAR1", r"is not a complete parquet file"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}')[:-3], r"is truncated after line"),
        ("a.jsonl.gz", gzip.compress(b" " * (1 << 26)), r"unpacks to more than 200 times its size"),
        ("a.json.gz", gzip.compress(b"[" + b" " * (1 << 26)), r"unpacks to more than 200 times its size"),
        ("a.txt", b"", r"is not \.jsonl, \.jsonl\.gz, \.json, \.csv or \.parquet"),
    ],
)
def test_a_broken_file_is_refused_where_it_is_broken(tmp_path: Path, name: str, body: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(body)
    with pytest.raises(DataError, match=rf"^{tmp_path / name} .*{said}"):
        read_file(tmp_path / name)


def test_surrogate_pairs_and_escapes_that_look_like_them_are_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "\\ud83d\\ude00"}\n{"a": "\\\\ud800"}\n')
    assert read_file(tmp_path / "a.jsonl") == [{"a": "\U0001f600"}, {"a": "\\ud800"}]


def test_rows_that_repeat_are_packed_and_read(tmp_path: Path) -> None:
    text = b'{"a": "the same words"}\n' * 40_000
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text))
    assert len(read_file(tmp_path / "a.jsonl.gz")) == 40_000


def test_a_line_without_end_is_refused_before_all_of_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "LONGEST_LINE", 1000)
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n{"a": "' + b"x" * 5000 + b'"}')
    with pytest.raises(DataError, match=r"line 2 is longer than 1\.0 kB; write one row per line"):
        read_file(tmp_path / "a.jsonl")


def test_a_parquet_file_that_says_it_has_a_billion_rows_is_not_unpacked(tmp_path: Path) -> None:
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.nulls(30_000_000, pyarrow.int8()).fill_null(0), ["words"])
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 100_000
    with pytest.raises(DataError, match=r"says that it unpacks to .* and 30,000,000 rows of 1 columns, more than 200"):
        read_file(tmp_path / "a.parquet")


Column = Callable[[], pyarrow.Array]


@pytest.mark.parametrize(
    "column",
    [
        lambda: pyarrow.Array.from_buffers(pyarrow.utf8(), 1, pyarrow.array([b"\xff"]).buffers()),
        lambda: pyarrow.array([2**62]).cast(pyarrow.timestamp("us"), safe=False),
    ],
    ids=["not UTF-8", "year 146,138"],
)
def test_values_that_python_cannot_hold_are_refused(tmp_path: Path, column: Column) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": column()}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet is not a complete parquet file"):
        read_file(tmp_path / "a.parquet")


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"a\.jsonl is no regular file"):
        read_file(tmp_path / "a.jsonl")


@pytest.mark.parametrize("source", ["x" * 5000 + ".jsonl", "./a\0b.jsonl", "~nobody/rows.jsonl", "./\udcff.jsonl"])
def test_a_source_that_no_file_can_have_is_refused(source: str) -> None:
    with pytest.raises(DataError, match=r"cannot be the name of a file|does not exist") as refused:
        read(DataSpec(source=source), 0)
    assert len(str(refused.value)) < 1000
