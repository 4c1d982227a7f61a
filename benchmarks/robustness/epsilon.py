"""Epsilon of 20 settings against the definition in 50 digits and accountants that share no code with kilofed's.

    python benchmarks/robustness/epsilon.py [--quick] [--json]

kilofed: what a run reports. exact: Balle and Wang 2018, theorem 8, as printed, by bisection in 50 digits (mpmath). PLD: the
numerical accountant of dp-accounting, which composes mean by mean. Renyi: (alpha n / 2 s^2) minimised over real orders, with
the conversion of Canonne, Kamath and Steinke 2020. Ends with an error where kilofed's is below the exact one or more than
one in ten million above it. --quick leaves the numerical accountant out.
"""

import argparse
import json
import math
import time

import mpmath
from dp_accounting import GaussianDpEvent
from dp_accounting.pld import PLDAccountant
from scipy.optimize import minimize_scalar

from kilofed.privacy.accounting import gaussian_epsilon

SETTINGS = [
    *((s, n, 1e-5) for s in (0.5, 1.0, 2.5, 10.0) for n in (1, 2, 30, 200)),
    (1.0, 10, 1e-9),
    (4.0, 1000, 1e-6),
    (0.3, 5, 1e-3),
    (50.0, 10_000, 1e-10),
]
"""(noise multiplier, means, delta)."""
EXTREMES = [(1.0, 10, 1e-300), (100.0, 10**12, 1e-5), (1e6, 1, 1e-12), (1e-3, 1, 1e-5)]
"""Where arithmetic is hard; numerical accountants give up here."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="without the numerical accountant")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = [row(*setting, numerical=not args.quick) for setting in SETTINGS]
    rows += [row(*setting, numerical=False) for setting in EXTREMES]
    if args.json:
        print(json.dumps(rows))
    else:
        print("| noise | means | delta | kilofed | exact | above exact | PLD | Renyi |\n" + "|---:" * 8 + "|")
        for one in rows:
            numerical = f"{one['pld']:.4f}" if one["pld"] is not None else "-"
            print(
                f"| {one['noise']:g} | {one['means']:,} | {one['delta']:g} | {one['kilofed']:.6g} | {one['exact']:.6g} | "
                f"{one['above']:.1e} | {numerical} | {one['renyi'] / one['exact'] - 1:+.1%} |"
            )
        print(f"\n{1e6 * seconds():.0f} microseconds per epsilon")
    if bad := [one for one in rows if not 0 <= one["above"] <= 1e-7]:
        raise SystemExit(f"{len(bad)} of {len(rows)} are not the exact epsilon: {bad}")


def row(noise: float, means: int, delta: float, *, numerical: bool) -> dict[str, float | None]:
    """One setting by every way of counting."""
    found, true = gaussian_epsilon(noise, means, delta), exact(noise, means, delta)
    return {
        "noise": noise,
        "means": means,
        "delta": delta,
        "kilofed": found,
        "exact": float(true),
        "above": float(mpmath.mpf(found) / true - 1),
        "pld": pld(noise, means, delta) if numerical else None,
        "renyi": renyi(noise, means, delta),
    }


def exact(noise: float, means: int, delta: float) -> mpmath.mpf:
    """The smallest epsilon at which the two distributions are (epsilon, delta)-close."""
    with mpmath.workdps(50):
        mu = mpmath.sqrt(means) / mpmath.mpf(noise)

        def delta_at(epsilon: mpmath.mpf) -> mpmath.mpf:
            first, second = mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu
            return mpmath.ncdf(first) - mpmath.exp(epsilon) * mpmath.ncdf(second)

        low, high = mpmath.mpf(0), 45 * mu + mu * mu / 2
        for _ in range(160):
            middle = (low + high) / 2
            low, high = (middle, high) if delta_at(middle) > delta else (low, middle)
        return high


def pld(noise: float, means: int, delta: float) -> float:
    """By composing discretised privacy losses."""
    accountant = PLDAccountant()
    accountant.compose(GaussianDpEvent(noise), means)
    return float(accountant.get_epsilon(delta))


def renyi(noise: float, means: int, delta: float) -> float:
    """The smallest bound over real orders above 1."""

    def bound(log_over_one: float) -> float:
        order = 1 + math.exp(log_over_one)
        spent = order * means / (2 * noise**2)
        return spent + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)

    return float(minimize_scalar(bound, bounds=(-25, 25), method="bounded", options={"xatol": 1e-10}).fun)


def seconds() -> float:
    """Median time of one epsilon."""
    times = []
    for count in range(1, 102):
        began = time.perf_counter()
        gaussian_epsilon(1.1, count, 1e-5)
        times.append(time.perf_counter() - began)
    return sorted(times)[50]


if __name__ == "__main__":
    main()
