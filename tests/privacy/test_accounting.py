"""Epsilon against the definition in 60 digits, against accountants of others, and at the ends of its range."""

import math
import sys

import mpmath
import pytest
from dp_accounting import GaussianDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from kilofed.errors import PrivacyError
from kilofed.privacy.accounting import check_delta, check_noise, gaussian_epsilon

NOISE = (1e-3, 0.1, 0.7, 1.0, 2.5, 100.0, 1e7)
COUNTS = (1, 2, 30, 10**4, 10**15)
DELTAS = (0.9999, 0.5, 0.1, 1e-2, 1e-5, 1e-9, 1e-100, 5e-324)


def delta_of(epsilon: float, multiplier: float, count: int) -> mpmath.mpf:
    """Balle and Wang's theorem 8 as it is printed."""
    mu = mpmath.sqrt(count) / mpmath.mpf(multiplier)
    first, second = mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu
    return mpmath.ncdf(first) - mpmath.exp(epsilon) * mpmath.ncdf(second)


@pytest.mark.parametrize("multiplier", NOISE)
def test_epsilon_is_never_below_the_definition_and_hardly_above(multiplier: float) -> None:
    with mpmath.workdps(60):
        for count in COUNTS:
            for delta in DELTAS:
                found = gaussian_epsilon(multiplier, count, delta)
                assert delta_of(mpmath.mpf(found), multiplier, count) <= delta, (count, delta)
                if found:
                    assert delta_of(mpmath.mpf(found) * (1 - 3e-8), multiplier, count) > delta, (count, delta)


@pytest.mark.parametrize(("multiplier", "count"), [(1.0, 1), (1.0, 2), (0.7, 30), (5.0, 100), (20.0, 1000)])
def test_epsilon_is_that_of_a_numerical_accountant_and_below_renyis_bound(multiplier: float, count: int) -> None:
    numerical, renyi = PLDAccountant(), RdpAccountant()
    for accountant in (numerical, renyi):
        accountant.compose(GaussianDpEvent(multiplier), count)
    found = gaussian_epsilon(multiplier, count, 1e-5)
    assert found == pytest.approx(numerical.get_epsilon(1e-5), rel=2e-3)
    assert 0.7 * renyi.get_epsilon(1e-5) < found < renyi.get_epsilon(1e-5)


def test_four_means_cost_what_one_costs_with_half_the_noise() -> None:
    assert gaussian_epsilon(3.0, 4, 1e-6) == gaussian_epsilon(1.5, 1, 1e-6)


def test_more_means_less_noise_and_smaller_deltas_cost_more() -> None:
    assert [gaussian_epsilon(s, 10, 1e-5) for s in (9.0, 3.0, 1.0)] == sorted(
        gaussian_epsilon(s, 10, 1e-5) for s in (9.0, 3.0, 1.0)
    )
    assert gaussian_epsilon(1.0, 2, 1e-5) < gaussian_epsilon(1.0, 3, 1e-5) < gaussian_epsilon(1.0, 3, 1e-6)


def test_nothing_released_costs_nothing_and_no_noise_costs_everything() -> None:
    assert gaussian_epsilon(1.0, 0, 1e-5) == gaussian_epsilon(0.0, 0, 1e-5) == 0.0
    assert gaussian_epsilon(0.0, 1, 1e-5) == math.inf


def test_so_much_noise_that_delta_alone_covers_it_costs_nothing() -> None:
    assert gaussian_epsilon(1e9, 1, 1e-5) == 0.0


@pytest.mark.parametrize(
    ("multiplier", "count"), [(1e-200, 1), (1.0, 10**400), (5e-324, 1), (1e-155, 10), (1.0, 10**308)]
)
def test_what_no_number_can_hold_is_infinite_or_vast_never_an_error(multiplier: float, count: int) -> None:
    assert gaussian_epsilon(multiplier, count, 1e-5) >= 1e306


def test_the_most_noise_there_is_costs_nothing_at_the_least_delta_there_is_or_a_little() -> None:
    assert 0.0 <= gaussian_epsilon(sys.float_info.max, 1, 5e-324) < 1e-300


@pytest.mark.parametrize("count", [-1, 2.0, 2.5, math.nan, math.inf, True, "3"])
def test_means_that_cannot_be_counted_are_refused(count: object) -> None:
    with pytest.raises(PrivacyError, match="expected a whole number from 0"):
        gaussian_epsilon(1.0, count, 1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("delta", [0.0, 1.0, 7.0, -1e-5, math.nan, math.inf])
def test_a_delta_at_which_nothing_is_promised_is_refused(delta: float) -> None:
    for refused in (lambda: check_delta(delta), lambda: gaussian_epsilon(1.0, 0, delta)):
        with pytest.raises(PrivacyError, match=r"privacy\.delta is .*; expected a number above 0 and below 1"):
            refused()


@pytest.mark.parametrize("multiplier", [-1.0, math.nan, math.inf])
def test_noise_that_cannot_be_drawn_is_refused(multiplier: float) -> None:
    for refused in (lambda: check_noise(multiplier), lambda: gaussian_epsilon(multiplier, 0, 1e-5)):
        with pytest.raises(PrivacyError, match=r"privacy\.noise_multiplier is .*; expected a finite number from 0"):
            refused()
