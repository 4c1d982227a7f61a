import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from kilofed.zeroth.directions.pool import SeedPool
from kilofed.zeroth.directions.spec import (
    DirectionsError,
    check_below,
    check_num_seeds,
    far_levels,
    load_vectors,
    near_levels,
)

PATTERNS = {"float32": np.uint32, "bfloat16": np.uint16, "float16": np.uint16}


@pytest.mark.parametrize("num_seeds", [0, -4096, 32, 100, 4095, 1 << 21])
def test_pools_the_layout_cannot_hold_are_refused(num_seeds):
    with pytest.raises(DirectionsError, match=f"num_seeds is {num_seeds}; HSP-1 needs a power of two from 64"):
        check_num_seeds(num_seeds)


def test_numbers_out_of_range_are_named():
    with pytest.raises(ValueError, match="key is -1; expected at least 0"):
        check_below("key", -1, 4)
    with pytest.raises(ValueError, match="key is 4; expected at least 0 and below 4"):
        check_below("key", 4, 4)


def test_levels_cover_every_row_once():
    assert far_levels(4096) == [16, 32, 64, 128]
    assert near_levels(4096) == [1, 2, 4, 8]
    assert far_levels(64) == []
    assert near_levels(64) == [1, 2]


def test_published_directions():
    for vector in load_vectors().directions:
        pool = SeedPool(vector["num_seeds"], int(vector["key"], 16))
        signs = pool.direction(vector["seed"], vector["num_elements"], first_block=vector["first_block"])
        text = "".join("+" if sign > 0 else "-" for sign in signs.tolist())
        assert text.startswith(vector["first"])
        assert text.endswith(vector["last"])
        assert hashlib.sha256(text.encode()).hexdigest() == vector["sha256"]


@pytest.fixture(scope="module")
def inputs(plain):
    """The test coefficients and weights, made once per pool size."""
    made: dict[tuple[int, int, str], tuple[np.ndarray, torch.Tensor]] = {}

    def make(num_seeds, num_elements, dtype):
        if (num_seeds, num_elements, dtype) not in made:
            weights = torch.from_numpy(plain.test_weights(num_elements, dtype)).to(getattr(torch, dtype))
            made[num_seeds, num_elements, dtype] = (plain.test_coefficients(num_seeds), weights)
        return made[num_seeds, num_elements, dtype]

    return make


def test_published_rebuilds(inputs):
    for vector in load_vectors().rebuilds:
        a, w0 = inputs(vector["num_seeds"], vector["num_elements"], vector["dtype"])
        here = SeedPool(vector["num_seeds"], int(vector["key"], 16)).at(a)
        if vector["moved"]:
            k, delta = vector["moved"]
            here = here.moved(k, float.fromhex(delta))
        out = here.rebuild(w0, first_block=vector["first_block"])
        bits = out.view(torch.int32 if out.itemsize == 4 else torch.int16).numpy().view(PATTERNS[vector["dtype"]])
        digits = 2 * out.itemsize
        assert [f"{b:0{digits}x}" for b in bits[:8]] == vector["first"]
        assert [f"{b:0{digits}x}" for b in bits[-8:]] == vector["last"]
        assert hashlib.sha256(bits.astype(bits.dtype.newbyteorder("<")).tobytes()).hexdigest() == vector["sha256"]


def test_published_orders():
    for vector in load_vectors().orders:
        pool = SeedPool(len(vector["weights"]), int(vector["key"], 16))
        weights = np.array(vector["weights"])
        seeds = pool.sample(vector["round"], vector["client"], len(vector["seeds"]), weights=weights)
        assert seeds.tolist() == vector["seeds"]


def test_example_of_the_specification_runs():
    page = Path(__file__).parents[3] / "docs" / "seed-pool.md"
    example = re.search(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert example
    exec(example.group(1), {})


@pytest.mark.slow
def test_vectors_are_what_the_plain_implementation_makes(plain):
    vectors, made = load_vectors(), plain.make_vectors()
    assert vectors.philox == made["philox"]
    assert vectors.directions == made["directions"]
    assert vectors.orders == made["orders"]
    assert [{**v, "moved": v["moved"] and tuple(v["moved"])} for v in vectors.rebuilds] == made["rebuilds"]
