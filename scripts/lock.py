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
TORCH = ("torch", "cuda-", "nvidia-", "triton")
"""torch and what only its wheels with CUDA need."""
CPU_WHEELS = ("6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b",)
"""Of torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl, with which kilofed is tested. PyPI has no wheels of that kind,
and no index that says the hashes of others could be asked."""

ABOUT = {
    "build": "What the other files are installed with.",
    "run": "What kilofed needs, but for torch.",
    "torch-cpu": "torch for CPUs, taken where pip knows of a place that has it: PyPI does not.",
    "torch": "torch from PyPI, and what its wheels with CUDA need; taken where there is no wheel of torch-cpu.lock.",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--uv", default="uv")
    uv = parser.parse_args().uv
    build = resolved(uv, BUILD)
    everything = resolved(uv, (ROOT / "pyproject.toml"))
    torch = {name: text for name, text in everything.items() if name.startswith(TORCH)}
    run = {name: text for name, text in everything.items() if name not in torch and name not in build}
    hashes = "".join(f" \\\n    --hash=sha256:{one}" for one in CPU_WHEELS)
    cpu = {"torch": torch["torch"].partition(" ")[0] + "+cpu" + hashes}
    for name, found in (("build", build), ("run", run), ("torch-cpu", cpu), ("torch", torch)):
        text = f"# {ABOUT[name]} Written by scripts/lock.py.\n" + "".join(f"{one}\n" for one in found.values())
        (ROOT / "requirements" / f"{name}.lock").write_text(text, "utf-8")


def resolved(uv: str, wanted: str | Path) -> dict[str, str]:
    """Each requirement with its marker and hashes, by name."""
    with tempfile.TemporaryDirectory() as folder:
        source = wanted if isinstance(wanted, Path) else Path(folder) / "wanted.in"
        if isinstance(wanted, str):
            source.write_text(wanted, "utf-8")
        # torch from PyPI asks for a triton of its own; that of constraints.txt is for tests beside torch for CPUs.
        lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
        tested = Path(folder) / "tested.txt"
        tested.write_text("\n".join(line for line in lines if not line.startswith("triton==")), "utf-8")
        command = [
            uv,
            "pip",
            "compile",
            source,
            "--constraint",
            tested,
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
