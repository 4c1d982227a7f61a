"""The built package: the wheel comes out of the sdist, holds what is read at run time, and runs outside the repository."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
QUICK = ("rounds=1", "train.steps=1", "evaluate.generate=1", "evaluate.max_new_tokens=2")
SMALL = ("data.options.train_rows=8", "data.options.test_rows=2", "data.options.num_clients=2")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist and the wheel that was made of it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def one(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def test_the_wheel_holds_every_file_of_the_sources_and_nothing_else(built: Path) -> None:
    sources = ROOT / "src" / "kilofed"
    there = {
        f"kilofed/{path.relative_to(sources).as_posix()}"
        for path in sources.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(one(built, "*.whl")) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == there
    assert {path.rpartition(".")[2] for path in held} >= {"py", "typed", "jinja", "css", "html", "toml", "json"}
    for needed in (
        "assets/small/model.safetensors",
        "data/sources/gazetteer.toml",
        "recipes/tiny.toml",
        "reports/page.css",
        "reports/report.html.jinja",
        "serving/page.html",
        "zeroth/directions/vectors.json",
    ):
        assert f"kilofed/{needed}" in held


def test_the_sdist_holds_what_a_build_needs(built: Path) -> None:
    with tarfile.open(one(built, "*.tar.gz")) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert names >= {"pyproject.toml", "README.md", "LICENSE", "src/kilofed/__init__.py", "PKG-INFO"}


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a fresh environment with the wheel; what it depends on is taken from this environment."""
    home = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    programs = home / ("Scripts" if os.name == "nt" else "bin")
    pip = [sys.executable, "-m", "pip", "--python", str(programs / "python"), "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", one(built, "*.whl")], check=True)
    # Folders named in a .pth file come after the wheel's, and the .pth files in them, such as that of an editable
    # install, are not read.
    packages = sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)})
    (Path(packages) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", "utf-8")
    return programs


def outside(*command: str | Path, cwd: Path) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_is_what_is_imported(installed: Path, tmp_path: Path) -> None:
    found = outside(installed / "python", "-c", "import kilofed; print(kilofed.__file__)", cwd=tmp_path)
    assert Path(found.strip()).is_relative_to(installed.parent)


def test_the_installed_command_runs_and_exports_outside_the_repository(installed: Path, tmp_path: Path) -> None:
    kilofed = installed / "kilofed"
    outside(kilofed, "run", "tiny", *QUICK, *SMALL, "--out", "run", cwd=tmp_path)
    rows = json.loads((tmp_path / "run" / "results.json").read_text("utf-8"))["rows"]
    assert rows["federated"]["loss"] > 0
    assert "</html>" in (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "fedkseed" in outside(kilofed, "ls", "methods", cwd=tmp_path)
    outside(kilofed, "export", "run", "--merged", "merged", cwd=tmp_path)
    assert (tmp_path / "merged" / "config.json").exists()


def locked() -> dict[str, tuple[str, list[str]]]:
    """Version and hashes of each requirement in requirements/, by name."""
    found: dict[str, tuple[str, list[str]]] = {}
    for path in sorted((ROOT / "requirements").glob("*.lock")):
        for one in re.split(r"\n(?=[a-z])", path.read_text("utf-8").replace(" \\\n", "")):
            if pinned := re.match(r"([a-z0-9.-]+)==([^ ]+)", one):
                version = pinned[2].removesuffix("+cpu")
                assert found.setdefault(pinned[1], (version, []))[0] == version
                assert pinned[1] == "torch" or not found[pinned[1]][1], f"{pinned[1]} stands in two files"
                found[pinned[1]][1].extend(re.findall(r"--hash=sha256:([0-9a-f]{64})(?![0-9a-f])", one))
    return found


def named(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower().replace("_", "-")


def test_everything_that_make_run_installs_has_a_version_that_is_tested_and_hashes() -> None:
    found = locked()
    assert all(hashes for _, hashes in found.values())
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert {named(one) for one in [*needed["project"]["dependencies"], *needed["build-system"]["requires"]]} <= set(
        found
    )
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    tested = {named(line): line.partition("==")[2] for line in lines if not line.startswith("#")}
    other = {
        name: (version, tested[name]) for name, (version, _) in found.items() if tested.get(name, version) != version
    }
    assert set(other) <= {"triton"}, "run scripts/lock.py"  # torch from PyPI asks for one of its own.
