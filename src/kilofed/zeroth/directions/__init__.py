"""Directions in weight space from a pool of seeds (HSP-1, docs/seed-pool.md)."""

from kilofed.zeroth.directions.layout import Layout, Slot, layout_of
from kilofed.zeroth.directions.pool import Position, SeedPool, coefficients, integer_weights
from kilofed.zeroth.directions.spec import DEFAULT_NUM_SEEDS, VERSION, DirectionsError

__all__ = [
    "DEFAULT_NUM_SEEDS",
    "VERSION",
    "DirectionsError",
    "Layout",
    "Position",
    "SeedPool",
    "Slot",
    "coefficients",
    "integer_weights",
    "layout_of",
]
