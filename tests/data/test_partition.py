"""Every training row goes to exactly one client, by the same draw on every machine."""

import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kilofed.config.recipe import DataSpec, PartitionSpec
from kilofed.data.formats import Row
from kilofed.data.partition import Share, divide
from kilofed.data.readers import Rows, read
from kilofed.errors import DataError

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"
Kind = Literal["auto", "column", "iid", "dirichlet", "size", "pathological"]
DRAWN: list[Kind] = ["iid", "dirichlet", "size", "pathological"]


def made(number: int = 120, labels: int = 4) -> list[Row]:
    return [{"text": str(i), "client": f"site {i % 3}", "label": f"label {i % labels}"} for i in range(number)]


def spec(kind: Kind, **changes: object) -> DataSpec:
    part = replace(PartitionSpec(kind=kind, num_clients=6, column="label", alpha=1.0), **changes)  # type: ignore[arg-type]
    return DataSpec(partition=part, holdout=0.25)


def rows(train: list[Row], test: list[Row] | None = None) -> Rows:
    return Rows(train, test or [], "")


def held(shares: list[Share]) -> list[str]:
    return sorted(str(row["text"]) for share in shares for row in [*share.train, *share.test])


def refusal(found: Rows, wanted: DataSpec) -> str:
    with pytest.raises(DataError) as caught:
        divide(found, wanted, 0)
    return str(caught.value)


@pytest.mark.parametrize("kind", DRAWN)
def test_every_row_goes_to_exactly_one_client(kind: Kind, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shares = divide(rows(made()), spec(kind), 0)
    assert held(shares) == sorted(str(i) for i in range(120))
    assert [share.name for share in shares] == [f"client {i}" for i in range(6)]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", DRAWN)
def test_equal_seeds_give_equal_clients_and_others_others(kind: Kind) -> None:
    first, second, other = (divide(rows(made()), spec(kind), seed) for seed in (3, 3, 4))
    assert first == second
    assert first != other


@settings(max_examples=25, deadline=None)
@given(
    number=st.integers(20, 90), clients=st.integers(1, 9), labels=st.integers(2, 5), kind=st.sampled_from(DRAWN),
    seed=st.integers(0, 5),
)  # fmt: skip
def test_no_draw_loses_or_doubles_a_row(number: int, clients: int, labels: int, kind: Kind, seed: int) -> None:
    try:
        shares = divide(rows(made(number, labels)), spec(kind, num_clients=clients, classes=2), seed)
    except DataError as error:
        shares, said = [], str(error)
    if not shares:
        assert "use fewer clients" in said
        return
    counts = Counter(held(shares))
    assert set(counts.values()) == {1}
    covered = kind != "pathological" or clients >= labels
    assert not covered or len(counts) == number


def test_iid_sizes_differ_by_one_at_most() -> None:
    sizes = [len(share.train) + len(share.test) for share in divide(rows(made(124)), spec("iid"), 0)]
    assert sorted(sizes) == [20, 20, 21, 21, 21, 21]


def test_size_gives_linearly_growing_clients() -> None:
    sizes = [len(share.train) + len(share.test) for share in divide(rows(made(210)), spec("size"), 0)]
    assert sizes == [10, 20, 30, 40, 50, 60]


def test_pathological_gives_each_client_its_number_of_labels() -> None:
    shares = divide(rows(made()), spec("pathological", classes=2), 0)
    assert [len({row["label"] for row in [*s.train, *s.test]}) for s in shares] == [2] * 6


def test_labels_that_no_client_gets_are_counted_aloud(caplog: pytest.LogCaptureFixture) -> None:
    shares = divide(rows(made(100, 10)), spec("pathological", classes=2, num_clients=3), 0)
    missing = 100 - len(held(shares))
    assert missing >= 40
    assert f"{missing} of 100 training rows are assigned to no client: 3 clients with 2 labels each" in caplog.text


def test_a_small_alpha_skews_labels_more_than_a_large_one() -> None:
    def most(alpha: float) -> float:
        shares = divide(rows(made(400)), spec("dirichlet", alpha=alpha), 0)
        tops = [Counter(row["label"] for row in s.train).most_common(1)[0][1] / len(s.train) for s in shares]
        return sum(tops) / len(tops)

    assert most(0.2) > 0.6 > 0.35 > most(1000.0)


def test_dirichlet_draws_again_until_every_client_has_its_fewest_rows() -> None:
    shares = divide(rows(made()), spec("dirichlet", alpha=0.7, min_rows=8), 0)
    assert min(len(share.train) + len(share.test) for share in shares) >= 8


def test_a_column_gives_a_client_per_value_in_order_of_name() -> None:
    shares = divide(rows(made(), made(30)), spec("column", column="client"), 0)
    assert [share.name for share in shares] == ["site 0", "site 1", "site 2"]
    for share in shares:
        assert {row["client"] for row in [*share.train, *share.test]} == {share.name}
    assert [(len(share.train), len(share.test)) for share in shares] == [(40, 10)] * 3


def test_auto_takes_the_column_where_the_rows_have_it() -> None:
    assert len(divide(rows(made()), spec("auto", column="client"), 0)) == 3
    without = [{key: value for key, value in row.items() if key != "client"} for row in made()]
    assert len(divide(rows(without), spec("auto", column="client"), 0)) == 6


def test_auto_does_not_fall_back_from_a_column_that_was_asked_for() -> None:
    message = refusal(rows(made()), spec("auto", column="lable"))
    assert "data.partition.column is 'lable', which row 1 does not have (did you mean label?)" in message


def test_a_list_of_owners_is_an_owner_of_its_own() -> None:
    train: list[Row] = [{"text": str(i), "client": ["a", "b"] if i % 2 else ["a"]} for i in range(8)]
    assert [share.name for share in divide(rows(train), spec("column", column="client"), 0)] == ["a", "a+b"]


@pytest.mark.parametrize("owner", [None, ""])
def test_a_row_without_owner_is_named(owner: str | None) -> None:
    train: list[Row] = [*made(6), {"text": "x", "client": owner}]
    assert refusal(rows(train), spec("column", column="client")).startswith(
        "row 7 has no value in data.partition.column"
    )


def test_held_out_rows_without_the_column_are_refused() -> None:
    test: list[Row] = [{"text": "x"}]
    message = refusal(rows(made(), test), spec("column", column="client"))
    assert "which held-out row 1 does not have" in message


def test_held_out_rows_of_no_client_are_skipped_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    test: list[Row] = [*made(6), *({"text": str(i), "client": f"far {i}"} for i in range(9))]
    shares = divide(rows(made(), test), spec("column", column="client"), 0)
    assert sum(len(share.test) for share in shares) == 6
    assert "9 held-out rows are skipped" in caplog.text
    assert "far 0, far 1, far 2, far 3, far 4 and 4 more" in caplog.text


@pytest.mark.parametrize("kind", DRAWN)
def test_given_held_out_rows_are_dealt_evenly_and_once(kind: Kind) -> None:
    test: list[Row] = [{"text": f"test {i}", "label": "x"} for i in range(20)]
    shares = divide(rows(made(), test), spec(kind), 0)
    assert sorted(str(row["text"]) for share in shares for row in share.test) == sorted(f"test {i}" for i in range(20))
    assert sorted(len(share.test) for share in shares) == [3, 3, 3, 3, 4, 4]


def test_each_client_holds_out_its_share_whatever_the_order() -> None:
    found = divide(rows(made()), spec("column", column="client"), 0)
    turned = divide(rows(made()[::-1]), spec("column", column="client"), 0)
    for share, other in zip(found, turned, strict=True):
        assert (len(share.train), len(share.test)) == (30, 10)
        assert sorted(str(row) for row in share.test) == sorted(str(row) for row in other.test)


def test_equal_rows_stay_on_one_side_of_the_hold_out() -> None:
    train: list[Row] = [{"text": str(i % 10), "client": "a"} for i in range(40)]
    (share,) = divide(rows(train), spec("column", column="client"), 0)
    assert share.test
    assert not {str(row) for row in share.train} & {str(row) for row in share.test}


def test_two_rows_are_one_to_learn_and_one_to_test() -> None:
    (share,) = divide(rows(made(2)[:1] + made(4)[3:]), spec("column", column="client"), 0)
    assert (len(share.train), len(share.test)) == (1, 1)


def test_clients_without_held_out_rows_are_named_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    train: list[Row] = [{"text": str(i), "client": f"c{i}"} for i in range(8)]
    assert len(divide(rows(train), spec("column", column="client"), 0)) == 8
    assert [record.getMessage() for record in caplog.records] == [
        "clients without held-out rows are trained but not evaluated: c0, c1, c2, c3, c4 and 3 more"
    ]


def test_max_test_rows_holds_for_each_client() -> None:
    shares = divide(rows(made(), made(60)), replace(spec("iid"), max_test_rows=4), 0)
    assert [len(share.test) for share in shares] == [4] * 6


def test_more_clients_than_rows_are_refused_with_both_numbers() -> None:
    message = refusal(rows(made(5)), spec("iid"))
    assert "data.partition.num_clients is 6, but there are 5 training rows" in message


def test_a_client_without_enough_rows_is_named() -> None:
    train: list[Row] = [*made(6), {"text": "x", "client": "small"}]
    message = refusal(rows(train), spec("column", column="client", min_rows=2))
    assert message.startswith("client small has 1 training rows; expected at least 2")
    train[-1] = {"text": "x", "client": "x" * 100_000}
    assert len(refusal(rows(train), spec("column", column="client", min_rows=2))) < 300


def test_a_client_with_equal_rows_only_cannot_hold_any_out() -> None:
    train: list[Row] = [{"text": "same", "client": "a"}] * 6
    assert refusal(rows(train), spec("column", column="client")).startswith("client a has 0 training rows")


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("dirichlet", {"alpha": 0.001, "min_rows": 15}, "dirichlet cannot give each of 6 clients 15 of 120 rows"),
        ("dirichlet", {"column": "lable"}, "'lable', which row 1 does not have (did you mean label?)"),
        ("pathological", {"classes": 5}, "data.partition.classes is 5; expected at most 4"),
        ("column", {"column": "lable"}, "data.partition.kind=iid"),
    ],
)
def test_impossible_partitions_are_refused(kind: Kind, changes: dict[str, object], said: str) -> None:
    assert said in refusal(rows(made()), spec(kind, **changes))


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
@pytest.mark.parametrize(
    ("folder", "column", "clients"), [("dolly", "category", 8), ("natural_instructions", "task", 11)]
)
def test_real_columns_make_natural_clients(folder: str, column: str, clients: int) -> None:
    found = DataSpec(source=str(SHARED / folder), partition=PartitionSpec(column=column))
    if folder == "natural_instructions":
        columns = replace(found.columns, instruction="definition", context="input", response="output")
        found = replace(found, columns=columns)
    whole = read(found, 0)
    shares = divide(whole, found, 0)
    assert len(shares) == clients
    assert sum(len(share.train) for share in shares) == len(whole.train)
    assert sum(len(share.test) for share in shares) == len(whole.test)
    assert all({row[column] for row in share.train} == {share.name} for share in shares)


def test_a_skew_without_a_column_is_over_the_label_where_rows_are_classified() -> None:
    rows = Rows([{"text": str(n), "label": str(n % 2)} for n in range(40)], [], "")
    spec = DataSpec(task="classify", partition=PartitionSpec(kind="pathological", num_clients=2, classes=1))
    assert [len({row["label"] for row in share.train}) for share in divide(rows, spec, 0)] == [1, 1]


@pytest.mark.parametrize("kind", ["dirichlet", "pathological"])
def test_labels_with_a_nul_at_their_end_are_labels(kind: Kind) -> None:
    train: list[Row] = [{"text": str(i), "label": ("\0", "b\0", "b", "")[i % 4]} for i in range(60)]
    assert sum(len(share.train) + len(share.test) for share in divide(rows(train), spec(kind), 0)) == 60
