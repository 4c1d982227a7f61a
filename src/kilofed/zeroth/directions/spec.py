"""HSP-1, the structured seed pool: its constants, its limits and its published test vectors (docs/seed-pool.md).

A pool of K directions covers the parameters in blocks of K. In block b, with R = K / 16 rows of 16 lanes,

    z_k[b, row, lane] = D[b, row, lane] * (-1)^|row & k // 16| * (-1)^|lane & k % 16| * E[b, k // 16, lane]

where |.| counts set bits and D, E are signs drawn by Philox4x32-10 under the pool's key.
"""

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Final, TypedDict

from kilofed.errors import KilofedError

VERSION: Final = "HSP-1"
LANES: Final = 16
DEFAULT_NUM_SEEDS: Final = 4096
MIN_NUM_SEEDS: Final = 64
MAX_NUM_SEEDS: Final = 1 << 20
MAX_FIRST_BLOCK: Final = 1 << 62

ROWS_PER_CALL: Final = 128
"""Rows whose signs come from one Philox call per lane: four words of 32 bits."""
STREAM_D: Final = 0
STREAM_E: Final = 1
COUNTER_STRIDE: Final = 32
"""Second counter word = (row // 128) * 32 + stream * 16 + lane."""

TAG_SIGNS: Final = 0
TAG_ORDER: Final = 1
TAG_RADEMACHER: Final = 2
TAG_GAUSSIAN: Final = 3
"""Fourth counter word: separates the uses of one pool key."""


class DirectionsError(KilofedError):
    """An argument that a seed pool cannot represent."""


def check_num_seeds(num_seeds: int) -> int:
    """Return K, or raise DirectionsError unless it is a power of two from 64 to 2**20."""
    if not MIN_NUM_SEEDS <= num_seeds <= MAX_NUM_SEEDS or num_seeds & (num_seeds - 1):
        raise DirectionsError(
            f"num_seeds is {num_seeds}; {VERSION} needs a power of two from {MIN_NUM_SEEDS} to {MAX_NUM_SEEDS}"
            "; 4096 is the default, 1024 sends fewer bytes"
        )
    return num_seeds


def check_below(name: str, value: int, limit: int) -> int:
    """Return an integer in [0, limit), or raise DirectionsError naming it."""
    if not 0 <= value < limit:
        raise DirectionsError(f"{name} is {value}; expected at least 0 and below {limit}")
    return value


def far_levels(num_seeds: int) -> list[int]:
    """Row distances of the first butterfly levels over rows: 16, 32, ... up to R / 2."""
    return _doublings(16, num_seeds // LANES)


def near_levels(num_seeds: int) -> list[int]:
    """Row distances of the last butterfly levels: those of 1, 2, 4, 8 below R."""
    return _doublings(1, min(16, num_seeds // LANES))


def _doublings(first: int, end: int) -> list[int]:
    return [first << i for i in range(end.bit_length()) if first << i < end]


class PhiloxVector(TypedDict):
    """Words in hexadecimal."""

    counter: list[str]
    key: list[str]
    words: list[str]


class DirectionVector(TypedDict):
    """A direction as a text of + and -: its first and last 32 characters, and the SHA-256 of the whole."""

    num_seeds: int
    key: str
    first_block: int
    num_elements: int
    seed: int
    first: str
    last: str
    sha256: str


class RebuildVector(TypedDict):
    """Rebuilt test weights: their first and last eight bit patterns, and the SHA-256 of all, little-endian."""

    num_seeds: int
    key: str
    first_block: int
    num_elements: int
    dtype: str
    moved: tuple[int, str] | None
    first: list[str]
    last: list[str]
    sha256: str


class OrderVector(TypedDict):
    """The directions that a client samples."""

    key: str
    round: int
    client: int
    weights: list[int]
    seeds: list[int]


@dataclass(frozen=True)
class Vectors:
    """The published test vectors; docs/seed-pool.md defines each field."""

    philox: list[PhiloxVector]
    directions: list[DirectionVector]
    rebuilds: list[RebuildVector]
    orders: list[OrderVector]


def load_vectors() -> Vectors:
    """Read the test vectors that are installed with the package."""
    table = json.loads(files(__package__).joinpath("vectors.json").read_text(encoding="utf-8"))
    if table["version"] != VERSION:
        raise DirectionsError(f"vectors.json is for {table['version']}, this is {VERSION}")
    return Vectors(table["philox"], table["directions"], table["rebuilds"], table["orders"])
