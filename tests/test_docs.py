"""What README and docs show is run: shell commands shortened by overrides, Python as it stands."""

import io
import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest

import kilofed
from kilofed import cli
from kilofed.config.recipe import Recipe
from kilofed.config.tables import changed

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHORT = ["rounds=1", "train.steps=1", "train.epochs=0", "evaluate.generate=1", "evaluate.max_new_tokens=2"]
SMALL = ["data.options.train_rows=8", "data.options.test_rows=2", "data.options.num_clients=2"]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), flags=re.M | re.S)


def commands(page: Path) -> list[list[str]]:
    lines = "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip() and not line.startswith("#")]


def test_make_targets_that_are_shown_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.M))
    shown = {word[1] for page in PAGES for word in commands(page) if word[0] == "make"}
    assert shown
    assert shown <= targets


def test_ci_runs_the_test_command_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    assert "\nmake test\n" in script
    assert ["make", "test"] in commands(ROOT / "README.md")


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_tables_of_methods_are_what_ls_prints(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["ls", "--markdown"])
    table = capsys.readouterr().out
    shown = [
        found
        for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
        for found in re.findall(r"<!-- methods: .*? -->\n(.*?)<!-- end of methods -->", page.read_text("utf-8"), re.S)
    ]
    assert shown == [table, table]


def test_commands_of_the_readme_are_those_of_the_parser(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    known = set(re.findall(r"^    (\w+)  ", capsys.readouterr().out, flags=re.M))
    named = set(re.findall(r"`kilofed (\w+)", (ROOT / "README.md").read_text("utf-8")))
    assert named >= {"run", "resume", "check", "ls", "show", "eval", "report", "export", "chat", "replay", "serve"}
    assert named == known


@pytest.mark.slow
def test_shell_commands_of_the_start_page_run_in_their_order(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, "my-model")
    rows = [{"hospital": f"h{i % 2}", "instruction": f"say {i}", "response": f"it is {i}"} for i in range(40)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    ran = []
    for program, *words in commands(ROOT / "docs" / "start.md"):
        if program != "kilofed":
            continue
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
        if words[0] == "run":
            words = [*words, *SHORT, *([] if "data=./rows.jsonl" in words else SMALL)]
            words = [word for word in words if not word.startswith("rounds=") or word == "rounds=1"]
        assert cli.main(words) == 0, f"kilofed {' '.join(words)}: {capsys.readouterr().err}"
        ran.append(words[0])
    assert {"run", "show"} & set(ran)


@pytest.mark.slow
def test_shell_commands_of_the_kd_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = commands(ROOT / "docs" / "kd.md")
    assert len(shown) == 3
    for program, *words in shown:
        assert program == "kilofed"
        less = ["data.options.train_rows=40", "data.options.test_rows=2", "data.partition.min_rows=1"]
        assert cli.main([*words, *SHORT, *less]) == 0


@pytest.mark.slow
def test_shell_commands_of_the_split_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = commands(ROOT / "docs" / "split.md")
    assert len(shown) == 4
    for program, *words in shown:
        assert program == "kilofed"
        assert cli.main([*words, *SHORT, *SMALL]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_python_of_a_page_runs_as_it_stands(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(ROOT / page, "python"):
        exec(compile(block, page, "exec"), scope)
    assert isinstance(scope["run"], kilofed.Run)


@pytest.mark.slow
def test_example_prints_a_line_per_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["example", *SHORT, *SMALL])
    runpy.run_path(str(ROOT / "examples" / "compare_server_optimisers.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["fedavg", "fedprox", "fedavgm"]


def test_method_that_the_page_shows_first_is_fedprox() -> None:
    shown = blocks(ROOT / "docs" / "add-a-method.md", "python")[0]
    assert shown == (ROOT / "src" / "kilofed" / "methods" / "fedprox.py").read_text("utf-8")


def test_method_that_the_page_shows_second_runs_by_its_name(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "shown_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "signs.py").write_text(blocks(ROOT / "docs" / "add-a-method.md", "python")[1], "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("KILOFED_TRUST", "shown_package.signs")
    recipe = changed(tiny_recipe, {"method.name": "shown_package.signs", "method.step": 0.01})
    run = kilofed.run(recipe, out=tmp_path / "run")
    assert run.rows["federated"].loss != run.rows["base"].loss
    assert run.results.bytes.up < run.results.bytes.down  # A byte a parameter up, four down.
