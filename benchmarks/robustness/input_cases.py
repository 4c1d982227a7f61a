"""Broken recipes, overrides and data files, each drawn from a seed; `inputs.py` says what becomes of them."""

import gzip
import io
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet

from kilofed.config import tables
from kilofed.config.recipe import Recipe
from kilofed.federation.method import method_names

LONG = "9" * 4400
NASTY = [
    "0", "-1", "1", "5", "7.5", "1e400", "-1e400", "nan", "inf", "-inf", "-0.0", "1e-400", "5e-324", LONG,
    f"-{LONG}", f"0x{LONG}",
    "9" * 400, str(2**63), str(2**64), "0xff", "0o17", "0b1", "1_000", "true", "false", '""', '"a"', '"fedavg"',
    '"none"',
    '"\\u0000"', '"\\ud800"', '"' + "x" * 5000 + '"', "'''a\nb'''", '"../.."', '"./"', '"."', '".x"', '".."', '"a..b"',
    '"fed avg"', '"os.path"', '"kilofed..nothing"', '"kilofed.methods"', '"no.such.module"', '"FedAvg"',
    '"__init__"', "1979-05-27",
    "07:32:00", "1979-05-27T07:32:00Z", "1979-05-27T07:32:00", "[]", "[[]]", "[1]", '["a"]', '[1, "a"]', "[nan]",
    "{}", "{a = 1}",
    "{path = 1}", '{name = "kd"}', "{a = {a = {a = 1}}}", "[1979-05-27]", "{a = 07:32:00}", "[" * 40 + "]" * 40,
    "[" * 3000 + "]" * 3000,
    "{a=" * 600 + "1" + "}" * 600, "[{a = 1}, {a = 2}]", "ü", '"ü\U0001f600"', "\udcff", '"\udcff"', "\x00",
    "1\nrounds = 2", "= 1", "",
    " ", "#", "1 # 2", '"', "[", "{", "\\", "fedavg", "a=b", "inf inf", "None", "null", "1e5", "0.1", "3", "16",
    "cuda:99",
]  # fmt: skip
KEYS = [
    "", ".", "..", "a..b", ".a", "a.", "a", '""', '"a.b"', "ü", "\udcff", "\x00", "x" * 3000, ".".join("a" * 3000),
    "__class__", "method.name", "method.fields", "data.options", "data.options.a.b", "method.large",
    "method.large.path", "name.x", "rounds.x.y",
]  # fmt: skip


def recipe_texts() -> list[str]:
    """What recipes are mutated from: those that are shipped, and one of each method with all its keys."""
    full = [tables.to_toml(tables.changed(Recipe(), {"method": name})) for name in method_names()]
    return ["", *(tables.text_of(name) for name in tables.shipped()), *full]


def known_keys() -> list[str]:
    """Dotted keys of all that a recipe has."""

    def walk(table: dict[str, object], prefix: str) -> Iterator[str]:
        for key, value in table.items():
            yield prefix + key
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")

    table = tables.to_table(Recipe())
    return [*walk(dict(table), ""), "evaluate.controls", "method.mu", "method.lr", "method.large.top_k", "method.cut"]


def recipe_case(draw: random.Random, texts: list[str], keys: list[str]) -> tuple[bytes, list[str]]:
    """A recipe's file and the words laid over it."""
    text = draw.choice(texts)
    for _ in range(draw.choice((0, 0, 0, 0, 1, 1, 2, 4))):
        text = draw.choice(MUTATIONS)(draw, text, keys)
    body = text.encode("utf-8", "surrogateescape")
    if draw.random() < 0.15:
        body = mutated(draw, body)
    words = []
    for _ in range(draw.choice((0, 0, 1, 1, 2, 3))):
        key = draw.choice(keys) if draw.random() < 0.8 else draw.choice(KEYS)
        if draw.random() < 0.1:
            key = draw.choice(
                (key + ".", "." + key, key.replace(".", ".."), key[:-1], key.upper(), key + "." + draw.choice(keys))
            )
        words.append(f"{key}={draw.choice(NASTY)}")
    return body, words


def _set_value(draw: random.Random, text: str, keys: list[str]) -> str:
    lines = text.split("\n")
    settings = [number for number, line in enumerate(lines) if "=" in line]
    if not settings:
        return f"{draw.choice(keys)} = {draw.choice(NASTY)}\n"
    at = draw.choice(settings)
    lines[at] = f"{lines[at].partition('=')[0]}= {draw.choice(NASTY)}"
    return "\n".join(lines)


def _add_line(draw: random.Random, text: str, keys: list[str]) -> str:
    lines = text.split("\n")
    key, value = draw.choice([*keys, *KEYS]), draw.choice(NASTY)
    line = draw.choice(
        (f"{key} = {value}", f"[{key}]", f"[[{key}]]", f"[{key}]\nx = {value}", f"[[{key}]]\nname = {value}")
    )
    lines.insert(draw.randrange(len(lines) + 1), line)
    return "\n".join(lines)


def _change_header(draw: random.Random, text: str, keys: list[str]) -> str:
    headers = [line for line in text.split("\n") if line.startswith("[")]
    if not headers:
        return text
    old = draw.choice(headers)
    name = old.strip("[] ")
    return text.replace(
        old, draw.choice((f"[[{name}]]", f"[{name}.{name}]", f"{name} = 3", f"[x.{name}]", f"{old}\n{old}", ""))
    )


def _move_lines(draw: random.Random, text: str, keys: list[str]) -> str:
    lines = text.split("\n")
    start = draw.randrange(len(lines))
    some = lines[start : start + draw.randrange(1, 4)]
    at = draw.randrange(len(lines))
    return "\n".join([*lines[:at], *some, *lines[at:]])


MUTATIONS: list[Callable[[random.Random, str, list[str]], str]] = [_set_value, _set_value, _set_value, _add_line, _change_header, _move_lines]  # fmt: skip # noqa: E501


def mutated(draw: random.Random, body: bytes) -> bytes:
    """Bytes with a few of them flipped, cut, repeated or put in."""
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(len(body) + 1)
        end = min(len(body), at + draw.choice((1, 2, 30, 10_000)))
        junk = draw.choice(
            (
                b"",
                bytes([draw.randrange(256)]),
                b"\x00",
                b"\xff\xfe",
                b"\xef\xbb\xbf",
                b"\r",
                b'"',
                b"\\ud800",
                body[at:end] * 2,
            )
        )
        body = body[:at] + junk + body[end if draw.random() < 0.7 else at :]
    return body


WORDS = ["How are you?", "", " ", "\n", "x" * 3000, "ü\U0001f600\u0301", "\u2028", "\x00", "\ufeff", "a\rb", '"', ",", "<s></s><|endoftext|>", "{instruction}", "{", "%s", "-1", "nan", "0"]  # fmt: skip # noqa: E501
JSON_VALUES = [
    "null", "true", "0", "-1", "1.5", "1e999", "-1e999", "NaN", "Infinity", LONG, "9" * 4299, "0." + LONG, '""',
    '"a"', '"\\ud800"', '"\\u0000"',
    "[]", "{}", "[1]", '["a", null]', '{"a": 1}', '{"a": {"b": [1]}}', '{"\\ud800": 1}', "[" * 50 + "]" * 50,
    "[" * 900 + "]" * 900,
    "[" * 100_000 + "]" * 100_000, '{"a":' * 900 + "1" + "}" * 900, "[{}]", '[{"role": "user"}]',
    '[{"role": "assistant", "content": null}]',
    '[{"role": 1, "content": "a"}]', '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]',
    '"' + "x" * 100_000 + '"',
    '[{"role": "\\ud800", "content": "a"}]', "[[[]]]", '[{"role": "assistant", "content": "b", "x": [1]}]',
]  # fmt: skip
LAYOUTS = [
    ["instruction", "response"],
    ["instruction", "context", "response", "client"],
    ["messages"],
    ["text"],
    ["text", "label", "client"],
]


def rows_of(draw: random.Random, columns: list[str]) -> list[dict[str, str]]:
    """Rows whose values are JSON texts; in half of the cases, one strange value stands in a column of some of them."""
    name, value, share = (
        draw.choice([*columns, *columns, "extra", "", "\ud800"]),
        draw.choice(JSON_VALUES),
        draw.random(),
    )
    strange, lacking = draw.random() < 0.5, draw.random() < 0.03
    rows = []
    for number in range(draw.choice((0, 1, 3, 10, 41, 41))):
        row = {name: json.dumps(_sound(draw, name, number)) for name in columns}
        if strange and draw.random() < share:
            row[name] = value
        if lacking and draw.random() < 0.1:
            row.pop(draw.choice(columns), None)
        rows.append(row)
    return rows


def _sound(draw: random.Random, name: str, number: int) -> object:
    if name == "messages":
        return [{"role": "user", "content": draw.choice(WORDS)}, {"role": "assistant", "content": "b"}]
    if name in ("client", "label"):
        return f"{name}{number % 3}"
    return draw.choice(WORDS) if draw.random() < 0.2 else f"some words of {name} {number}"


def json_text(rows: list[dict[str, str]], draw: random.Random, *, as_list: bool) -> bytes:
    """Rows as JSON lines or as one list, perhaps in another encoding."""
    texts = ["{" + ", ".join(f"{json.dumps(k)}: {v}" for k, v in row.items()) + "}" for row in rows]
    if texts and draw.random() < 0.1:
        texts.insert(draw.randrange(len(texts)), draw.choice([*JSON_VALUES, "", "{", "}", '{"a": 1, "a": 2}']))
    text = "[" + ", ".join(texts) + "]" if as_list else "\n".join(texts)
    return text.encode(draw.choice(["utf-8"] * 8 + ["utf-16", "utf-8-sig", "utf-32"]), "surrogatepass")


def csv_text(rows: list[dict[str, str]], draw: random.Random) -> bytes:
    """Rows as CSV whose fields are quoted or not."""
    names = list(rows[0]) if rows else ["text"]
    quote = draw.choice((lambda text: '"' + text.replace('"', '""') + '"', lambda text: text[:200]))
    lines = [draw.choice((",", ",", ",", ";", "\t")).join(names)]
    lines += [",".join(quote(str(row.get(name, "")).strip('"')) for name in names) for row in rows]
    end = draw.choice(("\n", "\n", "\r\n", "\r"))
    return end.join(lines).encode(draw.choice(["utf-8", "utf-8", "latin-1", "utf-16"]), "replace")


def parquet_bytes(rows: list[dict[str, str]], draw: random.Random) -> bytes:
    """Rows as parquet with columns of a type of their own."""
    number = len(rows)
    late = pyarrow.array([2**62] * number, pyarrow.int64())
    no_text = pyarrow.array([b"\xff"] * number, pyarrow.binary())
    kinds: list[Callable[[], pyarrow.Array]] = [
        lambda: pyarrow.array([f"words {n}" for n in range(number)]),
        lambda: pyarrow.array([[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]] * number),
        lambda: pyarrow.array([b"\xff\xfe"] * number),
        lambda: pyarrow.Array.from_buffers(pyarrow.utf8(), number, no_text.buffers()),
        lambda: late.cast(pyarrow.timestamp(draw.choice(("ms", "us", "ns"))), safe=False),
        lambda: late.view(pyarrow.duration(draw.choice(("s", "us", "ns")))),
        lambda: pyarrow.array([2**31 - 1] * number, pyarrow.int32()).view(pyarrow.date32()),
        lambda: pyarrow.array([2**40] * number, pyarrow.int64()).view(pyarrow.time64("ns")),
        lambda: pyarrow.array([1.5, None] * number)[:number],
        lambda: pyarrow.array([float("nan")] * number),
        lambda: pyarrow.nulls(number),
        lambda: pyarrow.array([[("a", 1), ("a", 2)]] * number, pyarrow.map_(pyarrow.utf8(), pyarrow.int64())),
        lambda: pyarrow.array(["a"] * number).dictionary_encode(),
        lambda: pyarrow.array([{"a": {"b": 1}}] * number),
        lambda: pyarrow.array([True] * number),
    ]  # fmt: skip
    names = list(dict.fromkeys(name for row in rows for name in row if name != "\ud800")) or ["text"]
    if draw.random() < 0.05:
        names.append(names[0])
    columns = [(kinds[0] if draw.random() < 0.6 else draw.choice(kinds))() for _ in names]
    file = io.BytesIO()
    pyarrow.parquet.write_table(
        pyarrow.Table.from_arrays(columns, names), file, compression=draw.choice(("none", "zstd", "snappy"))
    )
    return file.getvalue()


def write_file(draw: random.Random, folder: Path, name: str, columns: list[str]) -> Path:
    """One data file, perhaps broken."""
    rows, kind = (
        rows_of(draw, columns),
        draw.choice((".jsonl", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".parquet")),
    )
    if kind == ".csv":
        body = csv_text(rows, draw)
    elif kind == ".parquet":
        body = parquet_bytes(rows, draw)
    else:
        body = json_text(rows, draw, as_list=".json." in f"{kind}.")
    bomb = draw.random() < 0.01
    if draw.random() < 0.15:
        body = mutated(draw, body)
    if kind.endswith(".gz"):
        body = gzip.compress(draw.choice((b'{"text": "', b"[", b"")) + b" " * (1 << 26) if bomb else body, 1)
        if draw.random() < 0.1:
            body = mutated(draw, body)
    path = folder / f"{name}{kind}"
    path.write_bytes(body)
    return path


def data_case(draw: random.Random, folder: Path) -> Recipe:
    """A recipe on broken files."""
    where = folder / "data"
    where.mkdir()
    columns = draw.choice(LAYOUTS)
    path = write_file(draw, where, draw.choice(("train", "rows")), columns)
    others = [
        str(write_file(draw, folder, name, columns)) if draw.random() < 0.1 else "" for name in ("test", "public")
    ]
    if draw.random() < 0.1:
        write_file(draw, where, draw.choice(("test", "val", "other")), draw.choice(LAYOUTS))
    source = str(where) if draw.random() < 0.1 else str(path)
    if draw.random() < 0.01:
        odd = ["x" * 5000 + ".jsonl", "./a\0b.jsonl", "~nobody/x.jsonl", "/dev/null", "/", "./none.csv"]
        source = draw.choice(odd)
    table = tables.to_table(Recipe())
    fits = draw.random() < 0.95
    words = {
        "data.source": source, "data.test": others[0], "data.public": others[1],
        "data.public_share": draw.choice((0.0, 0.0, 0.0, 0.1)), "data.holdout": draw.choice((0.1, 0.1, 0.5, 0.0)),
        "data.task": "classify" if ("label" in columns) == fits else "generate",
        "data.max_rows": draw.choice((0, 0, 0, 2)),
        "data.template": draw.choice(("", "", "", "", "", "plain", "chat")),
        "data.partition.kind": draw.choice(("auto", "auto", "iid", "column", "dirichlet", "size", "pathological")),
        "data.partition.num_clients": draw.choice((1, 2, 5)), "data.partition.column": draw.choice(columns),
        "data.max_length": draw.choice((8, 64, 256)),
    }  # fmt: skip
    tables.lay_over(table, words)
    return tables.from_table(table)
