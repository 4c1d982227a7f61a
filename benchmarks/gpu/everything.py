"""All that only a GPU can show, in one go: directions, and what speculation brings where few rows cost what one costs.

python benchmarks/gpu/everything.py [--quick]
"""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
JOBS = (
    [str(HERE / "directions.py")],
    [str(HERE.parent / "generation" / "decoding.py"), "--device", "cuda", "--large", "24x2048", "--small", "12x768"],
)


def main() -> None:
    failed = []
    for job in JOBS:
        print("==", *job, flush=True)
        if subprocess.run([sys.executable, *job, *sys.argv[1:]], check=False).returncode:
            failed.append(job[0])
    sys.exit(f"failed: {failed}" if failed else 0)


if __name__ == "__main__":
    main()
