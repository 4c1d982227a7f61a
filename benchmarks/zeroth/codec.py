"""Bytes per client and round: projected gradients up, coefficients down, headers and checksums included.

    python benchmarks/zeroth/codec.py [--quick] [--json]

Synthetic traffic of the paper's setting: 10 clients a round, tau = 200 steps each, gradients from Student's t with five
degrees of freedom, order uniform. The error is that of the shared state relative to the exact sums, after the last
round. The paper's format costs K * 4 + 4 bytes down and 1,600 up.
"""

import argparse
import json

import numpy as np

from kilofed.zeroth.codec import State, advance, decode_scalars, encode_scalars, encode_state, receive
from kilofed.zeroth.directions.pool import SeedPool

TAU, CLIENTS = 200, 10


def measure(num_seeds: int, bits: int, num_rounds: int, seed: int) -> dict[str, float]:
    """Mean bytes of one run, and the error at its end."""
    rng, pool = np.random.default_rng(seed), SeedPool(num_seeds, seed)
    exact, unquantised, server, client = (np.zeros(num_seeds), np.zeros(num_seeds), *[State.zeros(num_seeds)] * 2)
    up, down = [], []
    for step in range(num_rounds):
        for i in range(CLIENTS):
            gradients, order = rng.standard_t(5, size=TAU), pool.sample(step, i, TAU)
            message = encode_scalars(gradients, bits=bits)
            up.append(len(message))
            np.add.at(exact, order, decode_scalars(message, count=TAU) / CLIENTS)
            np.add.at(unquantised, order, gradients / CLIENTS)
        server, message = advance(server, exact, bits=bits)
        client = receive(client, message, count=num_seeds)
        down.append(len(message))
    if not np.array_equal(client.levels, server.levels):
        raise SystemExit("client and server differ")
    error = np.linalg.norm(client.values - unquantised) / np.linalg.norm(unquantised)
    return {
        "up": float(np.mean(up)),
        "delta": float(np.mean(down)),
        "up + delta": float(np.mean(up) + np.mean(down)),
        "worst up + delta": float(max(up) + max(down)),
        "full state": float(len(encode_state(server))),
        "error": float(error),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one run of 10 rounds instead of three of 40")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    for num_seeds in (4096, 1024):
        for bits in (8, 6, 5, 4):
            seeds, num_rounds = ((0,), 10) if options.quick else ((0, 1, 2), 40)
            runs = [measure(num_seeds, bits, num_rounds, seed) for seed in seeds]
            means = {name: float(np.mean([run[name] for run in runs])) for name in runs[0]}
            rows.append({"K": num_seeds, "bits": bits, "paper": num_seeds * 4 + 4 + 1600, **means})
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print(
        "| K | bits | up | delta | up + delta | worst | full state | error | paper |\n|---|---|---|---|---|---|---|---|---|"
    )
    for row in rows:
        numbers = [f"{row[name]:,.0f}" for name in ("up", "delta", "up + delta", "worst up + delta", "full state")]
        print(f"| {row['K']} | {row['bits']} | {' | '.join(numbers)} | {row['error']:.2%} | {row['paper']:,} |")


if __name__ == "__main__":
    main()
