"""The command line: options, help, refusals on stderr and exit statuses."""

import pytest

from kilofed.cli import main


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["run", "tiny", "ruonds=3"], "RecipeError: ruonds is not a field of Recipe (did you mean rounds?)\n"),
        (["run", "tinny"], "RecipeError: tinny is neither a shipped recipe nor a .toml file (did you mean tiny?)\n"),
        (["run", "tiny", "full"], "RecipeError: 2 recipes are named (tiny, full); expected one, then key=value\n"),
        (["resume", "nowhere"], "RunError: nowhere is not a run folder (it has no run.json)"),
        (["show", "fedagv"], "RecipeError: fedagv is no method, recipe or table of a recipe (did you mean fedavg?)\n"),
        (["export", "nowhere"], "RunError: nothing to export; give --merged DIR or --adapter DIR\n"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_a_refusal_is_one_sentence_on_stderr(
    command: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith(message)


@pytest.mark.parametrize(
    "command",
    [
        ["run", "tiny", "--json", "ruonds=3"],
        ["run", "--out", "there", "tiny", "ruonds=3"],
        ["run", "tiny", "--out", "there", "ruonds=3", "--json"],
        ["check", "tiny", "--json", "ruonds=3"],
    ],
    ids=" ".join,
)
def test_options_may_stand_between_the_words(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 1
    assert "ruonds is not a field" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["ls", "--jsno"], ["resume", "run", "more"], ["run", "tiny", "--ot", "x"]])
def test_what_a_command_does_not_take_is_refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for command in ("run", "resume", "check", "ls", "show", "eval", "report", "export", "chat", "serve"):
        assert f"\n    {command} " in text
