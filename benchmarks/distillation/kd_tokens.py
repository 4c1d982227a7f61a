"""How much does KD lose on a language model's head when only a few tokens of each position travel?

The recipe `tiny` under KD with all 4,096 tokens, with 32 and with 8, in float16 and int8: held-out loss after the same
rounds, bytes per client and round. Wanted: 32 tokens within 0.01 nats of all, at under 2 % of the bytes.

    python benchmarks/distillation/kd_tokens.py [--quick] [--json]
"""

import argparse
import json
import tempfile
from pathlib import Path

import kilofed
from kilofed.config.fields import Value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="two clients, one round: about a minute on an idle machine"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    same: dict[str, Value] = {
        "method": "kd", "data.public_share": 0.2, "evaluate.baselines": [], "evaluate.generate": 0, "evaluate.every": 99,
        "rounds": 1 if options.quick else 6, "seeds": 1 if options.quick else 3,
    }  # fmt: skip
    if options.quick:
        same |= {"data.options.num_clients": 2, "data.public_share": 0.1, "data.max_test_rows": 20, "train.steps": 5}
    found = []
    for top_k, wire in ((0, "float16"), (32, "float16"), (32, "int8"), (8, "float16")):
        with tempfile.TemporaryDirectory() as folder:
            done = kilofed.run("tiny", {**same, "method.top_k": top_k, "method.wire": wire}, out=Path(folder) / "run")
            sent = done.results.bytes
            loss = done.rows["federated"].loss
            found.append({"tokens": top_k or "all", "wire": wire, "loss": loss, "bytes": sent.up + sent.down})
        if not options.json:
            row, whole = found[-1], found[0]
            print(f"{row['tokens']:>4} tokens, {row['wire']:<8} loss {row['loss']:.4f} ({row['loss'] - whole['loss']:+.4f})  "
              f"{row['bytes']:>12,.0f} bytes ({100 * row['bytes'] / whole['bytes']:.2f} %)", flush=True)  # fmt: skip
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
