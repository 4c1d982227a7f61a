"""Documentation rows: clean, disjoint, the same split everywhere."""

import random
import time
from collections import Counter
from pathlib import Path

import pytest

from kilofed.data.sources import Rows, pydocs

STDLIB = list(pydocs.STDLIB_FAMILIES)


@pytest.fixture(scope="module")
def rows() -> Rows:
    return pydocs.load(seed=0, families=STDLIB)


def test_the_standard_library_alone_fills_five_clients(rows: Rows) -> None:
    assert Counter(row["client"] for row in rows.train) == dict.fromkeys(STDLIB, 200)
    assert Counter(row["client"] for row in rows.test) == dict.fromkeys(STDLIB, 40)


def test_no_summary_comes_twice_within_or_across_splits(rows: Rows) -> None:
    summaries = Counter(pydocs.normalise(row["response"]) for row in rows.train + rows.test)
    assert max(summaries.values()) == 1


def test_no_function_is_in_both_splits(rows: Rows) -> None:
    assert not {row["name"] for row in rows.train} & {row["name"] for row in rows.test}


def test_split_follows_the_summary_alone(rows: Rows) -> None:
    assert all(pydocs.held_out(row["response"]) for row in rows.test)
    assert not any(pydocs.held_out(row["response"]) for row in rows.train)


def test_splits_of_two_seeds_do_not_meet(rows: Rows) -> None:
    other = pydocs.load(seed=1, families=STDLIB[:2], train_rows=50, test_rows=40)
    assert other.train[:50] != rows.train[:50]
    held = {row["response"] for row in other.test}
    assert not held & {row["response"] for row in rows.train}


@pytest.mark.parametrize(
    ("summary", "held"),
    [
        # Pinned by hand from sha256: a change here moves functions into the corpus of the shipped models.
        ("Return a copy of the string with leading whitespace removed.", True),
        ("Compute the inverse of a matrix.", True),
        ("Open the file in text mode.", False),
        ("Add a child module to the current module.", False),
        ("Parse a document from a string.", False),
        ("Close the connection.", True),
    ],
)
def test_held_out_is_pinned(summary: str, held: bool) -> None:
    assert pydocs.held_out(summary) is held


def test_held_out_does_not_see_case_spaces_or_stops() -> None:
    for text in ("Parse a document.", "Close the connection.", "Return x + y."):
        assert pydocs.held_out(text) == pydocs.held_out(f"  {text.upper().rstrip('.')}\n")


def test_about_a_fifth_is_held_out() -> None:
    held = sum(pydocs.held_out(f"Return item {number}.") for number in range(5000))
    assert held == pytest.approx(1000, abs=120)


def test_rows_are_clean(rows: Rows) -> None:
    for row in rows.train + rows.test:
        assert list(row) == ["client", "instruction", "context", "response", "name"]
        assert 15 <= len(row["response"]) <= 120
        assert "\n" not in row["response"]
        assert "see base class" not in row["response"].lower()
        assert row["context"].startswith(f"{row['name']}(")
        assert row["instruction"] == pydocs.INSTRUCTION


@pytest.mark.parametrize(
    "text",
    [
        "See base class.",
        "Short.",
        "lower case start of it",
        "x" * 121,
        "Deprecated since version 3.",
        "Foo -> bar baz qux",
        "The :class:`Foo` that is used",
    ],
)
def test_unclean_summaries_are_refused(text: str) -> None:
    assert not pydocs.clean(text)


def test_summary_is_the_first_paragraph_in_one_line() -> None:
    assert pydocs.summary("\n  Join two\n  lines.\n\n  More.") == "Join two lines."


def test_functions_are_parsed_not_imported(tmp_path: Path) -> None:
    path = tmp_path / "trap.py"
    path.write_text(
        "raise SystemExit\n"
        "class Box:\n"
        "    async def put(self, item: int, *, wait=True) -> None:\n"
        '        """Put an item into the box.\n\n        At once.\n        """\n'
        "        self.items.append(item)\n"
        "    def plain(self): pass\n"
    )
    found = list(pydocs.functions(path, "shop.trap"))
    assert found == [
        pydocs.Function(
            "shop.trap.Box.put",
            "(self, item: int, *, wait=True) -> None",
            "self.items.append(item)",
            "Put an item into the box.\n\nAt once.",
        )
    ]


@pytest.mark.parametrize("content", [b"def broken(:\n", b"\xff\xfe\x00", b"x = '\\d'\n", b""])
def test_files_that_fail_give_nothing_and_no_warning(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.py"
    path.write_bytes(content)
    assert list(pydocs.functions(path, "bad")) == []


def test_source_files_leave_out_tests_and_keep_order(tmp_path: Path) -> None:
    for name in ("pkg/__init__.py", "pkg/b.py", "pkg/a.py", "pkg/tests/test_a.py", "pkg/_vendor/x.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert [module for _, module in pydocs.source_files([tmp_path / "pkg"])] == ["pkg", "pkg.a", "pkg.b"]


def test_choice_of_families_depends_on_the_seed_and_mixes_kinds() -> None:
    notes = [pydocs.load(seed=seed, num_clients=2, train_rows=3, test_rows=1).note for seed in range(4)]
    assert len(set(notes)) > 1
    assert all("stdlib-" in note for note in notes)
    assert notes[0] == pydocs.load(seed=0, num_clients=2, train_rows=3, test_rows=1).note


def test_a_family_with_too_few_rows_is_taken_only_for_want_of_others() -> None:
    small = pydocs.load(seed=0, train_rows=10**6, test_rows=10**6, families=["stdlib-text"])
    assert 300 < len(small.train) < 2000
    assert "stdlib-text" in small.note


def test_unknown_family_is_refused() -> None:
    with pytest.raises(ValueError, match="the family tensorflow is not installed; installed: stdlib-text"):
        pydocs.load(seed=0, families=["tensorflow"])


@pytest.mark.parametrize("option", ["num_clients", "train_rows", "test_rows"])
def test_counts_below_one_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} is 0, expected 1 or more"):
        pydocs.load(seed=0, **{option: 0})


def test_more_clients_than_families_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pydocs, "PACKAGE_FAMILIES", [])
    with pytest.raises(ValueError, match="only 5 of 6 package families have documentation; ask for fewer clients"):
        pydocs.load(seed=0, num_clients=6, train_rows=5, test_rows=1)


def test_packages_can_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pydocs, "PACKAGE_FAMILIES", ["no_such_package_here"])
    rows = pydocs.load(seed=0, train_rows=5, test_rows=1)
    assert sorted({row["client"] for row in rows.train}) == sorted(STDLIB)


def test_reading_is_fast() -> None:
    """3 processor-seconds on an idle core; three times that leaves room for a busy one."""
    began = time.process_time()
    pydocs.load(seed=random.Random(0).randrange(10))
    assert time.process_time() - began < 9
