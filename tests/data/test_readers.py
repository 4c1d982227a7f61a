"""Rows are read from wherever they lie, and what cannot be read is answered with where and why."""

import csv
import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kilofed.config.recipe import ColumnsSpec, DataSpec, PartitionSpec
from kilofed.data.formats import Row
from kilofed.data.readers import Rows, layout, read, row_hash, set_aside, unused_columns
from kilofed.errors import DataError

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"
ROWS: list[Row] = [
    {"client": "a", "instruction": "say, please", "response": "ja ✓"},
    {"client": "b", "instruction": 'two\nlines "quoted"', "response": "nein"},
]


def spec(source: Path | str, **changes: object) -> DataSpec:
    return replace(DataSpec(source=str(source)), **changes)  # type: ignore[arg-type]


def write_jsonl(path: Path, rows: list[Row]) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def write_json(path: Path, rows: list[Row]) -> Path:
    path.write_text(json.dumps(rows, indent=2), "utf-8")
    return path


def write_csv(path: Path, rows: list[Row]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: list[Row]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def write_saved(path: Path, rows: list[Row]) -> Path:
    import datasets

    datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("rows.jsonl", write_jsonl),
        ("rows.jsonl.gz", write_jsonl),
        ("rows.json", write_jsonl),
        ("rows.json", write_json),
        ("rows.csv", write_csv),
        ("rows.parquet", write_parquet),
        ("saved", write_saved),
    ],
)
def test_every_format_gives_the_same_rows(
    tmp_path: Path, name: str, write: Callable[[Path, list[Row]], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    found = read(spec(write(tmp_path / name, ROWS)), 0)
    assert found.train == ROWS
    assert found.test == []
    assert "2 training rows, 0 held-out rows" in found.note
    assert capfd.readouterr().out == ""


def test_csv_in_gzip_with_a_byte_order_mark_and_long_fields_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv.gz"
    long = "x" * 200_000
    path.write_bytes(gzip.compress(f"\ufeffinstruction,response\nsay,{long}\n\n007,yes\n".encode()))
    assert read(spec(path), 0).train == [
        {"instruction": "say", "response": long},
        {"instruction": "007", "response": "yes"},
    ]


def test_a_folder_gives_train_and_test_files_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train-0", "train-1", "test-0", "test-1", "validation", "extra"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"client": "a", "text": name}])
    found = read(spec(tmp_path), 0)
    assert [row["text"] for row in found.train] == ["train-0", "train-1"]
    assert [row["text"] for row in found.test] == ["test-0", "test-1"]
    assert "extra.jsonl, validation.jsonl" in caplog.text


def test_a_folder_without_train_files_gives_all_that_is_not_held_out(tmp_path: Path) -> None:
    for name in ("north", "south", "valid"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"client": "a", "text": name}])
    found = read(spec(tmp_path), 0)
    assert [row["text"] for row in found.train] == ["north", "south"]
    assert [row["text"] for row in found.test] == ["valid"]


def test_files_in_a_folder_below_are_found(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", ROWS)
    (tmp_path / "README.md").write_text("card", "utf-8")
    assert read(spec(tmp_path), 0).train == ROWS


def test_a_saved_dataset_dict_gives_its_splits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import datasets

    splits = {name: datasets.Dataset.from_list([{"client": "a", "text": name}]) for name in ("train", "test", "dev")}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    found = read(spec(tmp_path / "saved"), 0)
    assert (found.train, found.test) == ([{"client": "a", "text": "train"}], [{"client": "a", "text": "test"}])
    assert "are not read: dev" in caplog.text


def test_data_test_may_be_a_file_or_a_folder_with_a_test_file(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "a.jsonl", ROWS)
    below = tmp_path / "below"
    below.mkdir()
    held = write_jsonl(below / "test.jsonl", ROWS[:1])
    write_jsonl(below / "train.jsonl", ROWS)
    assert read(spec(train, test=str(held)), 0).test == ROWS[:1]
    assert read(spec(train, test=str(below)), 0).test == ROWS[:1]


def test_data_test_replaces_the_held_out_rows_of_an_embedded_source(tmp_path: Path) -> None:
    held = write_jsonl(tmp_path / "a.jsonl", ROWS[:1])
    assert read(spec("gazetteer", test=str(held)), 0).test == ROWS[:1]


def test_max_rows_takes_the_same_rows_whatever_the_order(tmp_path: Path) -> None:
    rows: list[Row] = [{"client": "a", "text": str(number)} for number in range(50)]
    one = read(spec(write_jsonl(tmp_path / "a.jsonl", rows), max_rows=7), 0)
    other = read(spec(write_jsonl(tmp_path / "b.jsonl", rows[::-1]), max_rows=7), 0)
    assert len(one.train) == 7
    assert one.train == other.train
    assert "50 training rows, of which data.max_rows takes 7" in one.note
    assert read(spec(tmp_path / "a.jsonl", max_rows=7), 1).train != one.train


def test_max_rows_holds_for_an_embedded_source_too() -> None:
    whole, some = read(spec("gazetteer"), 0), read(spec("gazetteer", max_rows=9), 0)
    assert len(some.train) == 9
    assert all(row in whole.train for row in some.train)
    assert "takes 9" in some.note


def test_row_hash_depends_on_content_and_seed_alone() -> None:
    assert row_hash({"a": 1, "b": "x"}) == row_hash({"b": "x", "a": 1})
    assert row_hash({"a": 1}) != row_hash({"a": 2})
    assert row_hash({"a": 1}, 0) != row_hash({"a": 1}, 1)


def test_columns_that_nothing_uses_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows: list[Row] = [{**row, "id": 1, "note": "x"} for row in ROWS]
    read(spec(write_jsonl(tmp_path / "a.jsonl", rows)), 0)
    assert [record.getMessage().split(";")[0] for record in caplog.records] == ["unused columns: id, note"]


@pytest.mark.parametrize(
    ("part", "unused"),
    [
        (PartitionSpec(), ["category"]),
        (PartitionSpec(column="category"), ["client"]),
        (PartitionSpec(kind="iid"), ["category", "client"]),
        (PartitionSpec(kind="dirichlet", column="category"), ["client"]),
    ],
)
def test_the_partition_column_counts_as_used_where_it_is_used(part: PartitionSpec, unused: list[str]) -> None:
    rows: list[Row] = [{"client": "a", "category": "b", "text": "c"}]
    assert unused_columns(DataSpec(partition=part), rows) == unused


@pytest.mark.parametrize("source", ["pydocs", "gazetteer"])
def test_embedded_sources_use_all_their_columns_or_do_not_complain(
    source: str, caplog: pytest.LogCaptureFixture
) -> None:
    read(spec(source), 0)
    assert not caplog.records


def test_layout_prefers_response_then_messages_then_text() -> None:
    row = {"instruction": "", "response": "", "messages": [], "text": ""}
    assert layout(ColumnsSpec(), [row]) == "response"
    assert layout(ColumnsSpec(), [{k: v for k, v in row.items() if k != "instruction"}]) == "messages"
    assert layout(ColumnsSpec(), [{"text": ""}]) == "text"
    assert layout(ColumnsSpec(response="text"), [row]) == "response"


def refusal(found: DataSpec) -> str:
    with pytest.raises(DataError) as caught:
        read(found, 0)
    return str(caught.value)


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"\n{"text": "c"}\n', "utf-8")
    assert f"{path} line 3 is not JSON" in refusal(spec(path))


def test_a_broken_line_of_a_json_list_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[\n{"text": "a"},\n{"text" "b"}\n]', "utf-8")
    assert f"{path} line 3 is not JSON" in refusal(spec(path))


@pytest.mark.parametrize(("line", "kind"), [("[1]", "list"), ('"x"', "str"), ("null", "NoneType")])
def test_a_line_that_is_no_object_is_named(tmp_path: Path, line: str, kind: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "a"}}\n{line}\n', "utf-8")
    assert f"line 2 is a {kind}; expected an object" in refusal(spec(path))


def test_a_file_cut_in_half_is_answered_with_the_last_line_that_was_whole(tmp_path: Path) -> None:
    rows: list[Row] = [{"client": "a", "text": str(row_hash({"n": number}))} for number in range(2000)]
    path = write_jsonl(tmp_path / "a.jsonl.gz", rows)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    message = refusal(spec(path))
    assert "is truncated after line" in message
    assert 100 < int(message.split("after line ")[1].split()[0]) < 1900


def test_a_corrupted_gzip_is_answered_in_a_sentence(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl.gz", [{"client": "a", "text": "b" * 1000}])
    content = bytearray(path.read_bytes())
    content[14:20] = b"\xff" * 6
    path.write_bytes(content)
    assert "is truncated" in refusal(spec(path))
    path.write_text("not gzip at all", "utf-8")
    assert "is truncated after line 0" in refusal(spec(path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_text_that_is_not_utf8_is_named_by_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    start = b"text\n" if name == "a.csv" else b'{"text": "a"}\n'
    path.write_bytes(start + b'{"text": "caf\xe9"}\n')
    assert f"{path} line 2 is not UTF-8 text" in refusal(spec(path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(b"") if name.endswith(".gz") else b"")
    assert "has no rows" in refusal(spec(path))


def test_an_empty_test_file_is_refused(tmp_path: Path) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text("\n", "utf-8")
    assert "data.test" in refusal(spec(write_jsonl(tmp_path / "a.jsonl", ROWS), test=str(held)))


def test_a_csv_line_with_too_few_fields_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('instruction,response\nsay,"ja\nja"\nsay\n', "utf-8")
    assert f"{path} line 4 has 1 fields, the header has 2" in refusal(spec(path))


@pytest.mark.parametrize(
    ("text", "said"),
    [('instruction,response\nsay,"ja', "is not CSV"), ("text,text\na,b\n", "has a column twice: text, text")],
)
def test_a_csv_that_is_none_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text, "utf-8")
    assert said in refusal(spec(path))


def test_a_csv_without_the_response_column_lists_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("question,answer\nsay,ja\n", "utf-8")
    message = refusal(spec(path))
    assert "the rows have the columns answer, question; expected instruction and response" in message
    assert "data.columns.instruction=NAME" in message


def test_a_mapped_column_that_no_row_has_is_refused_with_the_nearest(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"client": "a", "instruction": "", "input": "", "response": "x"}])
    message = refusal(spec(path, columns=ColumnsSpec(context="inptu")))
    assert "data.columns.context is 'inptu', which no row has (did you mean input?)" in message


@pytest.mark.parametrize("which", ["row", "held-out row"])
def test_a_row_without_its_response_is_named(tmp_path: Path, which: str) -> None:
    broken: list[Row] = [*ROWS, {"client": "a", "instruction": "say"}]
    good, bad = write_jsonl(tmp_path / "good.jsonl", ROWS), write_jsonl(tmp_path / "bad.jsonl", broken)
    message = refusal(spec(bad) if which == "row" else spec(good, test=str(bad)))
    assert message.startswith(f"{which} 3 has no column response; it has client, instruction")


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_a_file_that_cannot_be_read_is_answered_in_a_sentence(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.parquet":
        path.write_bytes(b"PAR1 and then nothing")
    else:
        path.write_bytes(b"\x00\xff\xfe")
    assert refusal(spec(path)).startswith(str(path))


@pytest.mark.parametrize("source", ["no/such/file.jsonl", "./nothing", "missing.csv", "~/nothing-here", "a/b/c"])
def test_a_missing_file_is_refused_without_asking_the_hub(source: str) -> None:
    assert refusal(spec(source)).startswith(f"file or folder {source} does not exist")


def test_a_file_of_an_unknown_kind_says_what_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.xlsx"
    path.write_bytes(b"x")
    assert "is not .jsonl, .jsonl.gz, .json, .csv or .parquet" in refusal(spec(path))


def test_a_folder_without_rows_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x", "utf-8")
    assert "it has notes.txt" in refusal(spec(tmp_path))


def test_a_saved_data_set_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    path = write_saved(tmp_path / "saved", ROWS)
    next(path.glob("*.arrow")).unlink()
    assert "is not a complete data set" in refusal(spec(path))


def test_a_hub_id_without_network_says_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    message = refusal(spec("nobody/nothing-v1.5"))
    assert "nobody/nothing-v1.5 is not an embedded source (families, gazetteer, pydocs), file or folder" in message
    assert "check the name and the network" in message


def test_options_are_for_those_who_take_them(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    assert "which has no options" in refusal(spec(path, options={"train_rows": 3}))
    assert "did you mean name?" in refusal(spec("nobody/nothing", options={"nam": "x"}))
    assert "did you mean num_clients?" in refusal(spec("gazetteer", options={"num_client": 3}))
    assert "data.source=gazetteer" in refusal(spec("gazetteer", options={"num_clients": "three"}))


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
@pytest.mark.parametrize(
    ("folder", "columns", "kind", "sizes"),
    [
        ("dolly", ColumnsSpec(), "response", (6848, 750)),
        ("sgd_response", ColumnsSpec(instruction="context"), "response", (8000, 750)),
        ("banking77", ColumnsSpec(instruction="text", response="label_name"), "response", (10003, 3080)),
        ("banking77", ColumnsSpec(), "text", (10003, 3080)),
        (
            "natural_instructions",
            ColumnsSpec(instruction="definition", context="input", response="output"),
            "response",
            (11000, 1100),
        ),
        ("self_instruct_seed_tasks", ColumnsSpec(context="input", response="output"), "response", (175, 0)),
    ],
)
def test_real_data_is_read_whole(folder: str, columns: ColumnsSpec, kind: str, sizes: tuple[int, int]) -> None:
    found = read(spec(SHARED / folder, columns=columns), 0)
    assert (len(found.train), len(found.test)) == sizes
    assert layout(columns, found.train) == kind


def test_public_rows_are_taken_from_the_clients_and_no_row_is_lost() -> None:
    rows = Rows([{"text": f"row {n}"} for n in range(20)], [], "")
    left, public = set_aside(rows, DataSpec(public_share=0.25), 3)
    assert len(public) == 5
    assert sorted(row["text"] for row in [*left.train, *public]) == sorted(row["text"] for row in rows.train)
    assert set_aside(rows, DataSpec(public_share=0.25), 3)[1] == public
    assert set_aside(rows, DataSpec(public_share=0.25), 4)[1] != public
    assert set_aside(rows, DataSpec(), 3) == (rows, [])


def test_public_rows_of_a_file_leave_the_clients_theirs(tmp_path: Path) -> None:
    rows = Rows([{"text": "a"}, {"text": "b"}], [], "")
    path = write_jsonl(tmp_path / "public.jsonl", [{"text": "c"}])
    assert set_aside(rows, DataSpec(public=str(path), public_share=0.5), 0) == (rows, [{"text": "c"}])


def test_a_public_share_that_leaves_one_side_none_is_refused() -> None:
    with pytest.raises(DataError, match="leaves one side without rows"):
        set_aside(Rows([{"text": "a"}, {"text": "b"}], [], ""), DataSpec(public_share=0.1), 0)
