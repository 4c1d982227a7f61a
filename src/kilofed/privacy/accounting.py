"""Epsilon of Gaussian means, exactly (Balle and Wang 2018, arXiv:1805.06530, theorem 8).

n means of one sensitivity, each with noise of s sensitivities, tell as much as one mean with s / sqrt(n), also where each
ask depends on the means before it (Dong, Roth and Su 2019, arXiv:1905.02383). With mu = sqrt(n) / s,

    delta(epsilon) = Phi(mu / 2 - epsilon / mu) - exp(epsilon) Phi(-mu / 2 - epsilon / mu)

and x = epsilon / mu - mu / 2 makes this phi(x) (M(x) - M(x + mu)), M being Mills' ratio: no two large numbers are
subtracted, whatever n, s and delta are. Nothing is gained from sampling of clients.
"""

import math

from kilofed.errors import PrivacyError

_ROUND_UP = 1e-9
"""Relative; float64 is off by less, so that what is reported is never below what is true."""
_SMALL = 1e-6
"""Below this mu the difference of Mills' ratios is bounded by its slope."""


def gaussian_epsilon(noise_multiplier: float, num_means: int, delta: float) -> float:
    """Epsilon at `delta` after `num_means` means: never below the exact one, and at most 3 parts in 10^8 above it.

    Args:
        noise_multiplier: standard deviation of the noise in units of the sensitivity, finite, from 0; at 0 epsilon is
            infinite.
        num_means: whole number from 0; at 0 epsilon is 0.
        delta: above 0 and below 1.

    Raises:
        PrivacyError: one of them is not.
    """
    if isinstance(num_means, bool) or not isinstance(num_means, int) or num_means < 0:
        raise PrivacyError(f"epsilon of {num_means} means does not exist; expected a whole number from 0")
    check_noise(noise_multiplier)
    check_delta(delta)
    if num_means == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    try:
        mu = math.sqrt(num_means) / noise_multiplier
    except OverflowError:
        mu = math.inf
    if not math.isfinite(mu * mu):
        return math.inf
    low, high = -mu / 2, 40.0  # There epsilon is 0, and delta below all that float64 holds.
    target = math.log(delta)
    if _log_delta(low, mu) <= target:
        return 0.0
    while low < (middle := (low + high) / 2) < high:
        if _log_delta(middle, mu) > target:
            low = middle
        else:
            high = middle
    return mu * (high + mu / 2) * (1 + _ROUND_UP)


def check_noise(multiplier: float) -> None:
    """Raise PrivacyError unless it is finite and from 0."""
    if not 0 <= multiplier < math.inf:
        raise PrivacyError(f"privacy.noise_multiplier is {multiplier}; expected a finite number from 0")


def check_delta(delta: float) -> None:
    """Raise PrivacyError unless it is above 0 and below 1."""
    if not 0 < delta < 1:
        raise PrivacyError(f"privacy.delta is {delta}; expected a number above 0 and below 1, such as 1e-5")


def _log_delta(x: float, mu: float) -> float:
    """Logarithm of delta at epsilon = mu x + mu^2 / 2, never too low by more than float64 is off."""
    from scipy.special import ndtr

    density = -x * x / 2 - math.log(2 * math.pi) / 2
    if mu < _SMALL:
        # Mills' ratio is convex and falls: its slope at x is its steepest between x and x + mu.
        return density + math.log(mu) + math.log(max(1 - x * _mills(x), 1e-300))
    if x > -1:
        return density + math.log(_mills(x) - _mills(x + mu))
    return math.log(float(ndtr(-x)) - math.exp(density) * _mills(x + mu))


def _mills(x: float) -> float:
    """(1 - Phi(x)) / phi(x)."""
    from scipy.special import erfcx

    return math.sqrt(math.pi / 2) * float(erfcx(x / math.sqrt(2)))
