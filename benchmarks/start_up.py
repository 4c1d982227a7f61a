"""How long does `kilofed --help` take beside an empty Python, and is torch left alone?

python benchmarks/start_up.py [--quick] [--json]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    kilofed = str(Path(sys.executable).parent / "kilofed")
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "kilofed --help": [kilofed, "--help"],
        "kilofed ls methods": [kilofed, "ls", "methods"],
        "kilofed show train": [kilofed, "show", "train"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(5 if options.quick else 21):
        for name, words in commands.items():
            began = time.perf_counter()
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - began)
    medians = {name: round(statistics.median(values), 3) for name, values in seconds.items()}
    if options.json:
        print(json.dumps(medians))
        return
    for name, median in medians.items():
        print(f"{name:20} {median:.3f} s   (median of {len(seconds[name])})")


if __name__ == "__main__":
    main()
