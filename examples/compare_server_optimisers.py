"""Three server rules on the same rows, split and evaluation: which loss for which bytes?

Run it: python examples/compare_server_optimisers.py [key=value ...]
"""

import sys
import tempfile
from pathlib import Path

import kilofed
from kilofed.config.tables import parse_words


def main(words: list[str]) -> None:
    overrides = {"rounds": 2, "train.steps": 4, "evaluate.baselines": ["base"], **parse_words(words)}
    with tempfile.TemporaryDirectory() as folder:
        for method in ("fedavg", "fedprox", "fedavgm"):
            run = kilofed.run("tiny", {**overrides, "method.name": method}, out=Path(folder) / method)
            loss, sent = run.rows["federated"].loss, run.results.bytes
            print(f"{method:8}  held-out loss {loss:.3f}  {sent.up / 1e6:.2f} MB up per client")


if __name__ == "__main__":
    main(sys.argv[1:])
