"""Write requirements/*.lock: what `make run` installs, by version and sha256, for every system.

    python scripts/lock.py [--uv uv]

Versions are those of constraints.txt; hashes are those of all files that the package index has of a version. Needs uv and
the network. Afterwards look at the difference: a file that an index adds to a version is a change to be asked about.
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = "pip>=25.1\nsetuptools\nhatchling\neditables\n"
"""What builds a source distribution, and kilofed itself."""
CUDA = ("cuda-", "nvidia-", "triton")
"""What only a wheel of torch with CUDA needs."""
CPU_WHEEL = "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b"
"""Of torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl, with which kilofed is tested; PyPI has none of that kind."""

ABOUT = {
    "build": "What the other files are installed with.",
    "run": "What kilofed needs. The last hash of torch is that of a wheel for CPUs that PyPI does not have; other wheels\n"
    "# from outside PyPI, such as those for CPUs of other systems, are refused: install them through constraints.txt.",
    "cuda": "What torch's wheels for Linux from PyPI need besides.",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--uv", default="uv")
    uv = parser.parse_args().uv
    build = resolved(uv, BUILD)
    everything = resolved(uv, (ROOT / "pyproject.toml"))
    cuda = {name: text for name, text in everything.items() if name.startswith(CUDA)}
    run = {name: text for name, text in everything.items() if name not in cuda and name not in build}
    run["torch"] += f" \\\n    --hash=sha256:{CPU_WHEEL}"
    for name, found in (("build", build), ("run", run), ("cuda", cuda)):
        text = f"# {ABOUT[name]} Written by scripts/lock.py.\n" + "".join(f"{one}\n" for one in found.values())
        (ROOT / "requirements" / f"{name}.lock").write_text(text, "utf-8")


def resolved(uv: str, wanted: str | Path) -> dict[str, str]:
    """Each requirement with its marker and hashes, by name."""
    with tempfile.TemporaryDirectory() as folder:
        source = wanted if isinstance(wanted, Path) else Path(folder) / "wanted.in"
        if isinstance(wanted, str):
            source.write_text(wanted, "utf-8")
        command = [
            uv,
            "pip",
            "compile",
            source,
            "--constraint",
            ROOT / "constraints.txt",
            "--generate-hashes",
            "--quiet",
        ]
        command += ["--universal", "--python-version", "3.11", "--no-header", "--no-annotate"]
        text = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    found: dict[str, str] = {}
    for line in text.splitlines():
        if not line.startswith(" "):
            name = line.partition("==")[0]
            found[name] = line
        else:
            found[name] += f"\n{line}"
    return found


if __name__ == "__main__":
    main()
