"""Environment of a run: versions, device, git commit and peak memory."""

import ctypes
import gc
import os
import platform
import re
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PACKAGES = ("kilofed", "torch", "transformers", "peft", "safetensors", "numpy", "datasets", "flwr-datasets", "flwr")


def describe(device: str) -> dict[str, str]:
    """Names and versions, all text; nothing about the user or the host name."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": str(os.cpu_count()),
        "device": _device(device),
        "git": _git(),
        **{name: _version(name) for name in PACKAGES},
    }


def peak_memory() -> int:
    """Peak resident set size of this process so far and of its finished children, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(one).ru_maxrss for one in who) * unit


def own_peak_memory() -> int:
    """Peak resident set size of this process only, in bytes; on Linux without the value inherited from its parent."""
    status = Path("/proc/self/status")
    if status.exists():  # On Linux a child process inherits ru_maxrss.
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text("ascii", "replace"))
        if found:
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak_memory() -> bool:
    """Return free memory to the system and reset `own_peak_memory`; False if the system cannot."""
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", "ascii")
    except (OSError, AttributeError):  # Only Linux with glibc has both.
        return False
    return True


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _device(device: str) -> str:
    import torch

    if device.startswith("cuda") and torch.cuda.is_available():
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return device


def _git() -> str:
    """Commit of the source tree that kilofed runs from, with `+` if it has changes; empty for an installed package."""
    here = Path(__file__).resolve().parent
    try:
        top = _ask_git(here, "rev-parse", "--show-toplevel")
        if not (Path(top) / "src" / "kilofed").is_dir():
            return ""  # Installed inside the checkout of another project.
        return _ask_git(here, "rev-parse", "HEAD") + ("+" if _ask_git(here, "status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _ask_git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def free_memory(device: "torch.device") -> int:
    """Bytes of memory available on `device`."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text("ascii").splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # Only Linux reports what is available.
