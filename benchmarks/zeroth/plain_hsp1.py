"""HSP-1 written a second time, from docs/seed-pool.md alone: numpy only, nothing of kilofed, block by block.

The tests and benchmarks compare kilofed with it. Run as a script it prints the published test vectors:

    python benchmarks/zeroth/plain_hsp1.py > src/kilofed/zeroth/directions/vectors.json
"""

import hashlib
import json
from typing import Any

import numpy as np

U32 = 0xFFFFFFFF


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]:
    """Philox4x32-10 with Python's integers."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        p, q = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (q >> 32) ^ b ^ k, q & U32, (p >> 32) ^ d ^ m, p & U32
        k, m = (k + 0x9E3779B9) & U32, (m + 0xBB67AE85) & U32
    return [a, b, c, d]


def sign_table(block: int, stream: int, num_seeds: int, key: int) -> np.ndarray:
    """(R, 16) of +1 and -1."""
    num_rows = num_seeds // 16
    table = np.empty((num_rows, 16), dtype=np.int8)
    for lane in range(16):
        for first in range(0, num_rows, 128):
            counter = (block & U32, first // 128 * 32 + stream * 16 + lane, block >> 32, 0)
            words = philox(counter, (key & U32, key >> 32))
            for row in range(first, min(first + 128, num_rows)):
                bit = words[row // 32 % 4] >> row % 32 & 1
                table[row, lane] = 1 - 2 * bit
    return table


def hadamard(size: int) -> np.ndarray:
    """Sylvester's matrix: entry (i, j) is (-1)**popcount(i & j)."""
    matrix = np.ones((1, 1), dtype=np.int8)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def dense_block(block: int, num_seeds: int, key: int) -> np.ndarray:
    """(K elements, K directions) of +1 and -1: the definition itself."""
    rows = num_seeds // 16
    d, e = sign_table(block, 0, num_seeds, key), sign_table(block, 1, num_seeds, key)
    z = np.einsum("rl,rk,lm,kl->rlkm", d, hadamard(rows), hadamard(16), e)
    return z.reshape(num_seeds, num_seeds)


def direction(k: int, num_elements: int, num_seeds: int, key: int, first_block: int) -> np.ndarray:
    """(num_elements,) int8."""
    h_row, h_lane = hadamard(num_seeds // 16)[:, k // 16], hadamard(16)[:, k % 16]
    blocks = []
    for block in range(first_block, first_block - (-num_elements // num_seeds)):
        d, e = sign_table(block, 0, num_seeds, key), sign_table(block, 1, num_seeds, key)
        blocks.append(d * h_row[:, None] * h_lane * e[k // 16])
    return np.concatenate(blocks).reshape(-1)[:num_elements]


def block_sum(a: np.ndarray, key: int, block: int) -> np.ndarray:
    """(K,) float32: sum_k a_k z_k in the order of the specification, one butterfly after the other."""
    num_rows = len(a) // 16
    y = a.astype(np.float32).reshape(num_rows, 16).copy()
    for h in (1, 2, 4, 8):
        for lane in range(16):
            if not lane & h:
                x, w = y[:, lane].copy(), y[:, lane + h].copy()
                y[:, lane], y[:, lane + h] = x + w, x - w
    y = np.where(sign_table(block, 1, len(a), key) < 0, -y, y)
    distances = [h for h in (1 << i for i in range(20)) if h < num_rows]
    for h in [h for h in distances if h >= 16] + [h for h in distances if h < 16]:
        for row in range(num_rows):
            if not row & h:
                x, w = y[row].copy(), y[row + h].copy()
                y[row], y[row + h] = x + w, x - w
    return np.where(sign_table(block, 0, len(a), key) < 0, -y, y).reshape(-1)


def rebuild(w0: np.ndarray, a: np.ndarray, key: int, first_block: int) -> np.ndarray:
    """(n,) float32, not yet rounded to a narrower type."""
    parts = []
    for i, start in enumerate(range(0, len(w0), len(a))):
        part = w0[start : start + len(a)].astype(np.float32)
        parts.append(part + block_sum(a, key, first_block + i)[: len(part)])
    return np.concatenate(parts)


def to_bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """Nearest bfloat16, ties to even, as uint16."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bfloat16_bits(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def order(key: int, round: int, client: int, weights: list[int], num_steps: int) -> list[int]:
    """The directions a client draws, with replacement."""
    seeds, total = [], sum(weights)
    for step in range(num_steps):
        word = philox((step // 4, round, client, 1), (key & U32, key >> 32))[step % 4]
        place, k = word * total >> 32, 0
        while place >= weights[k]:
            place, k = place - weights[k], k + 1
        seeds.append(k)
    return seeds


def numbers(tag: int, count: int, bits: int) -> np.ndarray:
    """Test input: (count,) integers of `bits` bits, centred, from Philox with key 0 and fourth counter word `tag`."""
    words = [word for i in range(-(-count // 4)) for word in philox((i, 0, 0, tag), (0, 0))][:count]
    return np.array(words, dtype=np.int64) // 2 ** (32 - bits) - 2 ** (bits - 1)


def test_coefficients(num_seeds: int) -> np.ndarray:
    """24-bit integers times 2**-33, exact in float32; their sums are not, so the order of adding shows."""
    return (numbers(255, num_seeds, 24) * 2.0**-33).astype(np.float32)


def test_weights(num_elements: int, dtype: str) -> np.ndarray:
    """As float32; integers of as many bits as the dtype holds exactly, scaled into [-1, 1)."""
    bits = {"float32": 24, "float16": 11, "bfloat16": 8}[dtype]
    return (numbers(254, num_elements, bits) * 2.0 ** (1 - bits)).astype(np.float32)


def rebuilt_bits(dtype: str, a: np.ndarray, key: int, first_block: int, num_elements: int) -> np.ndarray:
    """Bit patterns of the rebuilt test weights."""
    exact = rebuild(test_weights(num_elements, dtype), a, key, first_block)
    if dtype == "bfloat16":
        return to_bfloat16_bits(exact)
    return exact.view(np.uint32) if dtype == "float32" else exact.astype(np.float16).view(np.uint16)


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(array.astype(array.dtype.newbyteorder("<")).tobytes()).hexdigest()


def _known_answers() -> list[dict[str, Any]]:
    """From the known-answer file of Random123 (Salmon et al. 2011)."""
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    cases = [((0,) * 4, (0,) * 2), ((U32,) * 4, (U32,) * 2), pi]
    return [
        {
            "counter": [f"{c:08x}" for c in counter],
            "key": [f"{k:08x}" for k in key],
            "words": [f"{w:08x}" for w in philox(counter, key)],
        }
        for counter, key in cases
    ]


def make_vectors() -> dict[str, Any]:
    directions, rebuilds = [], []
    places = [(64, 0, 0), (1024, 1, 0), (4096, 0xFEDCBA9876543210, U32), (65536, 7, 3)]
    for num_seeds, key, first_block in places:
        n = 2 * num_seeds + 77
        common = {"num_seeds": num_seeds, "key": f"{key:016x}", "first_block": first_block, "num_elements": n}
        for k in (0, 1, 16, num_seeds - 1):
            z = direction(k, n, num_seeds, key, first_block)
            text = "".join("+" if sign > 0 else "-" for sign in z)
            digest = hashlib.sha256(text.encode()).hexdigest()
            directions.append({**common, "seed": k, "first": text[:32], "last": text[-32:], "sha256": digest})
        for dtype in ("float32", "bfloat16", "float16"):
            for moved in (None, (num_seeds - 3, "0x1p-10")):
                a = test_coefficients(num_seeds)
                if moved:
                    a[moved[0]] += np.float32(float.fromhex(moved[1]))
                bits = rebuilt_bits(dtype, a, key, first_block, n)
                digits = 8 if dtype == "float32" else 4
                rebuilds.append(
                    {
                        **common,
                        "dtype": dtype,
                        "moved": moved,
                        "first": [f"{b:0{digits}x}" for b in bits[:8]],
                        "last": [f"{b:0{digits}x}" for b in bits[-8:]],
                        "sha256": _digest(bits),
                    }
                )
    orders = []
    for weights in ([1] * 64, [1, 0, 3] + [2] * 61):
        seeds = order(5, 12, 34, weights, 10)
        orders.append({"key": f"{5:016x}", "round": 12, "client": 34, "weights": weights, "seeds": seeds})
    return {
        "version": "HSP-1",
        "philox": _known_answers(),
        "directions": directions,
        "rebuilds": rebuilds,
        "orders": orders,
    }


def print_vectors() -> None:
    """One line per vector."""
    vectors = make_vectors()
    lists = [
        f'  "{name}": [\n' + ",\n".join(f"    {json.dumps(entry)}" for entry in entries) + "\n  ]"
        for name, entries in vectors.items()
        if isinstance(entries, list)
    ]
    print(f'{{\n  "version": "{vectors["version"]}",\n' + ",\n".join(lists) + "\n}")


if __name__ == "__main__":
    print_vectors()
