"""Code that a recipe names runs when the user trusts it, and not before."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kilofed.config import trust
from kilofed.errors import RecipeError

METHOD = """
from dataclasses import dataclass
from pathlib import Path

from kilofed.methods.fedavg import FedAvg

with Path(__file__).with_name("ran").open("a") as file:
    file.write("ran\\n")

@dataclass(frozen=True)
class Mine(FedAvg):
    '''My own.'''
"""
HOSTILE = "from pathlib import Path\n\nPath(__file__).with_suffix('.ran').touch()\nraise SystemExit('hostile')\n"
STOLEN = ("kilofed", "torch", "json", "multiprocessing", "random", "flwr", "grpc", "sitecustomize")
SCRIPT = "import sys\n\nfrom kilofed.cli import main\n\nif __name__ == '__main__':\n    sys.exit(main())\n"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current folder with a package of one method, from which nothing is imported yet."""
    folder = tmp_path / "home"
    (folder / "my_package").mkdir(parents=True)
    (folder / "my_package" / "my_method.py").write_text(METHOD, "utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.setenv(trust.VARIABLE, "")
    path, before = list(sys.path), trust._answer
    yield folder
    sys.path[:] = path
    trust.ask(before)
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[name]


def test_nobody_asked_is_a_refusal_that_names_the_file_and_runs_nothing(home: Path) -> None:
    file = home / "my_package" / "my_method.py"
    with pytest.raises(
        RecipeError, match=r"would run the code of .*my_method\.py; expected .* add --trust"
    ) as refused:
        trust.allow("my_package.my_method")
    assert str(file) in str(refused.value)
    assert not (home / "my_package" / "ran").exists()
    assert str(home) not in sys.path
    assert "my_package" not in sys.modules


def test_the_answer_is_kept_for_this_process_and_those_it_starts(home: Path) -> None:
    asked = []

    def answer(name: str, place: str) -> bool:
        asked.append((name, place))
        return True

    trust.ask(answer)
    trust.allow("my_package.my_method")
    trust.allow("my_package.my_method")
    assert asked == [("my_package.my_method", str(home / "my_package" / "my_method.py"))]
    assert os.environ[trust.VARIABLE] == "my_package.my_method"
    assert sys.path[-1] == str(home)  # After all that is installed.
    with pytest.raises(RecipeError, match="does not exist"):
        trust.allow("my_package.other")


def test_the_environment_trusts_by_name(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(trust.VARIABLE, "another.one, my_package.my_method")
    trust.allow("my_package.my_method")
    monkeypatch.setenv(trust.VARIABLE, "another.one,my_package")
    with pytest.raises(RecipeError, match=r"set KILOFED_TRUST=my_package\.my_method"):
        trust.allow("my_package.my_method")


def test_what_is_imported_and_what_is_kilofeds_own_needs_no_trust(home: Path) -> None:
    trust.allow("collections.abc")
    trust.allow("kilofed.methods.fedavg")
    assert str(home) not in sys.path


def test_looking_for_a_module_runs_none_of_its_packages(home: Path) -> None:
    (home / "outer" / "inner").mkdir(parents=True)
    for package in (home / "outer", home / "outer" / "inner"):
        (package / "__init__.py").write_text(HOSTILE, "utf-8")
    (home / "outer" / "inner" / "deep.py").write_text(HOSTILE, "utf-8")
    assert trust.find("outer.inner.deep") == str(home / "outer" / "inner" / "deep.py")
    assert trust.find("outer.inner.absent") is None
    assert trust.find("absent.inner") is None
    assert not list(home.rglob("*.ran"))


def kilofed(home: Path, *words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """The console script, in a current folder whose files bear the names of libraries."""
    for name in STOLEN:
        (home / f"{name}.py").write_text(HOSTILE, "utf-8")
    script = home.parent / "bin" / "kilofed"
    script.parent.mkdir(exist_ok=True)
    script.write_text(SCRIPT, "utf-8")
    done = subprocess.run(
        [sys.executable, str(script), *words],
        cwd=home, env={**os.environ, **environment}, capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert not list(home.glob("*.ran")), "a file of the current folder ran in place of a library"
    assert "Traceback" not in done.stderr
    return done


def test_the_command_refuses_and_shows_what_is_trusted(home: Path) -> None:
    done = kilofed(home, "show", "my_package.my_method")
    assert done.returncode == 1
    assert done.stderr.startswith("RecipeError: method 'my_package.my_method' would run the code of ")
    assert not (home / "my_package" / "ran").exists()
    assert "client_weighting = " in kilofed(home, "show", "my_package.my_method", "--trust").stdout
    assert "client_weighting = " in kilofed(home, "show", "my_package.my_method", **{trust.VARIABLE: "my_package.my_method"}).stdout  # fmt: skip # noqa: E501


SMALL = ("rounds=1", "train.steps=1", "evaluate.generate=0", "data.max_test_rows=2")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["inprocess", "pool", "stream", "flower"])
def test_a_trusted_method_of_the_current_folder_runs_in_every_engine_and_nothing_else_of_it(
    engine: str, home: Path, tiny_model: Path, tiny_rows: Path
) -> None:
    words = (*SMALL, f"model={tiny_model}", f"data={tiny_rows}", "evaluate.baselines=[]", f"engine={engine}")
    words = ("run", "tiny", "method=my_package.my_method", *words, "--out", "out")
    assert kilofed(home, *words).returncode == 1
    assert not (home / "my_package" / "ran").exists()
    done = kilofed(home, *words, "--trust")
    assert done.returncode == 0, done.stderr
    processes = len((home / "my_package" / "ran").read_text("utf-8").splitlines())
    assert (processes > 1) == (engine != "inprocess")
    (home / "out" / "results.json").unlink()
    assert kilofed(home, "resume", "out").returncode == 1
    assert kilofed(home, "resume", "out", "--trust").returncode == 0


@pytest.mark.slow
def test_a_comparison_starts_nothing_of_the_current_folder_but_what_is_trusted(
    home: Path, tiny_model: Path, tiny_rows: Path
) -> None:
    methods = "fedavg,mine=my_package.my_method"
    words = (
        "compare",
        "tiny",
        "--methods",
        methods,
        "--out",
        "out",
        *SMALL,
        f"model={tiny_model}",
        f"data={tiny_rows}",
    )
    refused = kilofed(home, *words)
    assert refused.returncode == 1
    assert "would run the code of" in refused.stderr
    assert not (home / "out").exists()  # Before the first entry has run.
    done = kilofed(home, *words, "--trust")
    assert done.returncode == 0, done.stderr
    assert "mine" in done.stdout
