"""Numbers have units; what is no number is a dash."""

import pytest

from kilofed.units import count, fixed, percent, quantity, size


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.7, "1.0 kB"),
        (1_000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_951, "1.0 MB"),
        (1_234_567, "1.2 MB"),
        (2.5e9, "2.5 GB"),
        (5e15, "5000.0 TB"),
    ],
)
def test_size_has_a_unit(num_bytes: float, text: str) -> None:
    assert size(num_bytes) == text


def test_what_is_no_number_is_a_dash() -> None:
    assert {show(value) for show in (count, fixed, percent, size) for value in (None, "3", True, [3])} == {"-"}


def test_numbers_are_cut_to_what_is_read() -> None:
    assert [fixed(2), fixed(-1234.5678, 2), fixed(1.5e9)] == ["2.000", "-1,234.57", "1.5e+09"]
    assert [percent(0.8286), percent(-0.5), count(1_234_567)] == ["82.9 %", "-50.0 %", "1,234,567"]


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [("8GB", "B", 8e9), ("30ms", "s", 0.03), ("20 Mbit/s", "bit", 2e7), ("2e12", "FLOP", 2e12), (".5k", "B", 500.0)],
)
def test_quantities_are_read_with_and_without_a_unit(text: str, unit: str, value: float) -> None:
    assert quantity(text, unit) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "apples", "1.2.3GB", "-1GB", "0", "8Gbit", ".", "1e999"])
def test_what_is_no_quantity_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no number of B"):
        quantity(text, "B")
