"""Numbers as people read them, and read from what people write; what is no number is `-`."""

import re

_PREFIXES = {"m": 1e-3, "": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}


def quantity(text: str, unit: str) -> float:
    """A number above 0 with or without a unit, such as `8GB`, `20 Mbit`, `30ms`, `2e12`. Raises ValueError."""
    found = re.fullmatch(rf"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]{{1,2}})?)\s*([mkMGTP]?)(?:{unit}(?:/s)?)?\s*", text)
    value = float(found[1]) * _PREFIXES[found[2]] if found else 0.0
    if not value > 0:
        raise ValueError(f"{text!r} is no number of {unit}")
    return value


def number(value: object) -> float | None:
    """`value` if it is a number."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def size(value: object) -> str:
    """Bytes with a unit, such as `1.2 MB`; 1 kB is 1000 bytes."""
    num_bytes = number(value)
    if num_bytes is None:
        return "-"
    if round(num_bytes) < 1000:
        return f"{num_bytes:.0f} B"
    power = next((p for p in (1, 2, 3) if round(num_bytes / 1000**p, 1) < 1000), 4)
    return f"{num_bytes / 1000**power:.1f} {('kB', 'MB', 'GB', 'TB')[power - 1]}"


def fixed(value: object, digits: int = 3) -> str:
    """`digits` behind the point; from ten millions on three digits in all."""
    found = number(value)
    return "-" if found is None else f"{found:,.{digits}f}" if abs(found) < 1e7 else f"{found:.3g}"


def percent(value: object) -> str:
    """A share, 0 to 1, as `31.2 %`."""
    share = number(value)
    return "-" if share is None else f"{100 * share:.1f} %"


def count(value: object) -> str:
    """A whole number such as `1,234,567`."""
    found = number(value)
    return "-" if found is None else f"{found:,.0f}"


def duration(value: object) -> str:
    """Seconds as `3.2 s`, `4.1 min` or `2.3 h`."""
    found = number(value)
    if found is None:
        return "-"
    unit, name = next(((u, n) for u, n in ((1, "s"), (60, "min")) if found < 100 * u), (3600, "h"))
    return f"{found / unit:,.1f} {name}"


def operations(value: object) -> str:
    """Floating-point operations with a unit, such as `3.4 GFLOP`."""
    found = number(value)
    if found is None:
        return "-"
    power = next((p for p in range(5) if round(found / 1000**p, 1) < 1000), 5)
    return f"{found / 1000**power:.1f} {('', 'k', 'M', 'G', 'T', 'P')[power]}FLOP"
