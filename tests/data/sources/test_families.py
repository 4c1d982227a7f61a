"""Families: each row is a summary line with the family it comes from as its label; no line is on both sides."""

import pytest

from kilofed.data.sources import families, pydocs


def test_labels_are_the_families_and_texts_the_documentation_of_pydocs() -> None:
    rows = families.load(seed=3, num_clients=3, train_rows=7, test_rows=2)
    source = pydocs.load(seed=3, num_clients=3, train_rows=7, test_rows=2)
    assert [row["label"] for row in rows.train] == [row["client"] for row in source.train]
    assert [row["text"] for row in rows.test] == [row["response"] for row in source.test]
    assert {frozenset(row) for row in rows.train + rows.test} == {frozenset({"text", "label"})}
    assert rows.note == "families: 21 training rows, 6 held-out rows"


def test_every_label_is_learnt_before_it_is_asked_for() -> None:
    rows = families.load(seed=0, num_clients=4, train_rows=11, test_rows=3)
    assert {row["label"] for row in rows.test} == {row["label"] for row in rows.train}
    assert len({row["label"] for row in rows.train}) == 4


def test_equal_seeds_give_equal_rows_and_others_do_not() -> None:
    once, again, other = (families.load(seed=seed, num_clients=2, train_rows=5, test_rows=1) for seed in (1, 1, 2))
    assert once == again
    assert once != other


def test_more_families_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="of 10000 package families have documentation"):
        families.load(seed=0, num_clients=10_000)
