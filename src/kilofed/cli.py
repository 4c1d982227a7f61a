"""The command `kilofed`: parse, call, print. Results go to stdout, progress and messages to stderr."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from kilofed.errors import KilofedError

ABOUT = "Federated fine-tuning of language models, for people whose data may not move."
ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "DO_NOT_TRACK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONSAFEPATH": "1",
}
"""Defaults that switch off telemetry and notices of libraries, and keep Python files of the current folder from taking
the place of libraries in the processes that this one starts; what the user has set is kept."""
LOADING = ("run", "resume", "check", "compare", "plan", "show", "eval", "export", "replay", "chat", "serve")
"""Commands that load a method."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0 done, 1 refused or failed, 130 stopped by Ctrl-C."""
    options = _parse(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("absl").setLevel(logging.ERROR)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        _settle_trust(options)
        options.call(options)
    except KilofedError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        from kilofed.commands.progress import Progress

        print(f"\nstopped.{Progress.hint()}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse options, which may stand between the positional words."""
    parser = argparse.ArgumentParser(prog="kilofed", description=ABOUT)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_training, _add_plan, _add_reading, _add_results, _add_serving):
        add(commands)
    for name in LOADING:
        commands.choices[name].add_argument(
            "--trust", action="store_true", help="run the code of a method that is not kilofed's without asking"
        )
    options, more = parser.parse_known_args(argv)
    if more and ("words" not in options or any(word.startswith("-") for word in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:
        options.words = [*options.words, *more]
    return options


def _settle_trust(options: argparse.Namespace) -> None:
    """What decides on code that is not kilofed's: --trust, else the user if there is one to ask, else nobody."""
    from kilofed.config import trust

    def answer(name: str, place: str) -> bool:
        if options.trust:
            return True
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            return False
        print(f"runs code of {name} at {place}: go on? [y/N] ", end="", file=sys.stderr, flush=True)
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    if "trust" in options:
        trust.ask(answer)


def _add_training(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    run = commands.add_parser("run", help="run a recipe from the first round to the report")
    run.add_argument("--out", type=Path, help="run folder to create (default runs/NAME-N)")
    run.set_defaults(call=_run)

    resume = commands.add_parser("resume", help="continue a run that was stopped")
    resume.add_argument("folder", type=Path, metavar="RUN", help="a run folder")
    resume.set_defaults(call=_resume)

    check = commands.add_parser("check", help="check a recipe's model, data and machine before training")
    check.set_defaults(call=_check)

    compare = commands.add_parser(
        "compare", help="run several methods on one model and one partition, and compare them"
    )
    compare.add_argument(
        "words", nargs="*", metavar="RECIPE key=value", help="as for run; LABEL:key=value changes one entry only"
    )
    compare.add_argument(
        "--methods", required=True, metavar="A,B", help="methods or shipped recipes; full=fedavg labels an entry full"
    )
    compare.add_argument("--seeds", type=int, default=1, help="runs of each method, with different seeds (default 1)")
    compare.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the runs and compare.html")
    compare.set_defaults(call=_compare)

    for command in (run, check):
        command.add_argument(
            "words",
            nargs="*",
            metavar="RECIPE key=value",
            help="a recipe's name or file (default tiny), and overrides",
        )
    for command in (run, resume, check, compare):
        command.add_argument("--json", action="store_true", help="print one JSON value")


def _add_plan(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    plan = commands.add_parser("plan", help="forecast what methods cost on a given device and link, without a run")
    plan.add_argument("words", nargs="*", metavar="RECIPE key=value", help="as for compare")
    plan.add_argument("--methods", default="", metavar="A,B", help="as for compare (default: one of each family)")
    plan.add_argument(
        "--flops", type=_amount("FLOP"), metavar="F", help="operations per second of a client (default: as here)"
    )
    plan.add_argument("--server-flops", type=_amount("FLOP"), metavar="F", help="of the server (default: as a client)")
    plan.add_argument("--memory", type=_amount("B"), metavar="B", help="of a client, such as 8GB (default: as here)")
    plan.add_argument("--up", type=_amount("bit"), metavar="R", help="bits per second from a client (default 20Mbit)")
    plan.add_argument("--down", type=_amount("bit"), metavar="R", help="bits per second to a client (default 100Mbit)")
    plan.add_argument(
        "--latency", type=_amount("s", "30m"), metavar="S", help="of a request and its reply (default 30ms)"
    )
    plan.add_argument("--json", action="store_true", help="print one JSON value")
    plan.set_defaults(call=_plan)


def _add_reading(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    ls = commands.add_parser("ls", help="list methods, recipes, data sources or runs")
    ls.add_argument("what", nargs="?", choices=("methods", "recipes", "data", "runs"), help="default: all of them")
    ls.add_argument("--markdown", action="store_true", help="print the methods as a Markdown table")
    ls.set_defaults(call=_ls)

    show = commands.add_parser("show", help="explain a method, a recipe or a table of a recipe, field by field")
    show.add_argument("name", metavar="NAME", help="such as fedavg, tiny, train")
    show.set_defaults(call=_show)

    report = commands.add_parser("report", help="write the report of a run again and print its path")
    report.add_argument("folder", type=Path, metavar="RUN", help="a run folder")
    report.set_defaults(call=_report)

    for command in (ls, show):
        command.add_argument("--json", action="store_true", help="print one JSON value")


def _add_results(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    evaluate = commands.add_parser("eval", help="score a run's model on held-out rows")
    evaluate.add_argument("folder", type=Path, metavar="RUN", help="a run folder")
    evaluate.add_argument("words", nargs="*", metavar="key=value", help="such as data.test=FILE evaluate.generate=100")
    evaluate.add_argument("--json", action="store_true", help="print one JSON value")
    evaluate.set_defaults(call=_eval)

    export = commands.add_parser("export", help="copy the adapter or the merged model out of a run folder")
    export.add_argument("--merged", type=Path, metavar="DIR", help="write one model that plain transformers loads")
    export.add_argument("--adapter", type=Path, metavar="DIR", help="copy the adapter in PEFT's format")
    export.set_defaults(call=_export)

    replay = commands.add_parser("replay", help="write the model of any round of a seed-pool run, from its records")
    replay.add_argument("--round", type=int, required=True, metavar="R", help="0 is the base model")
    replay.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for the model")
    replay.add_argument("--without", type=int, metavar="CLIENT", help="leave out the reports of this client")
    replay.set_defaults(call=_replay)

    for command in (export, replay):
        command.add_argument("folder", type=Path, metavar="RUN", help="a run folder")


def _add_serving(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    chat = commands.add_parser("chat", help="chat with a run's model")
    chat.add_argument("--max-new-tokens", type=int, default=128, help="longest answer (default 128)")
    chat.set_defaults(call=_chat)

    serve = commands.add_parser("serve", help="serve a run's model over an OpenAI-compatible API")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    serve.add_argument("--port", type=int, default=8000, help="0 takes a free one (default 8000)")
    serve.add_argument("--name", default="", help="the model's name in the API (default: the folder's name)")
    serve.add_argument("--template", default="", help="prompt template (default: the one of the run's training)")
    serve.add_argument("--device", default="", help="device of the model (default: the recipe's)")
    serve.add_argument("--threads", type=int, default=0, help="threads of torch (default 0: torch's own choice)")
    serve.add_argument(
        "--token-file", type=Path, metavar="FILE", help="token (default: KILOFED_TOKEN, else a new one)"
    )
    serve.add_argument("--no-token", action="store_true", help="accept requests of every program of this machine")
    serve.add_argument("--max-active", type=int, default=8, help="requests decoded concurrently (default 8)")
    serve.add_argument("--max-waiting", type=int, default=64, help="further requests that may wait (default 64)")
    serve.add_argument(
        "--max-body", type=int, default=1 << 20, metavar="BYTES", help="largest request (default 1 MiB)"
    )
    serve.add_argument("--max-choices", type=int, default=128, help="most answers to one request (default 128)")
    serve.add_argument("--max-logprobs", type=int, default=128, help="most log-probabilities per token (default 128)")
    serve.add_argument("--timeout", type=float, default=300.0, metavar="S", help="seconds per request (default 300)")
    serve.set_defaults(call=_serve)

    for command in (chat, serve):
        command.add_argument("path", metavar="RUN", help="a run folder, a model directory, builtin:small or a hub id")


def _amount(unit: str, example: str = "8G") -> Callable[[str], float]:
    """A parser of options such as 8GB."""

    def read(text: str) -> float:
        from kilofed.units import quantity

        try:
            return quantity(text, unit)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{error}; expected such as {example}{unit}") from error

    return read


def _run(options: argparse.Namespace) -> None:
    from kilofed.commands.training import run

    run(options)


def _resume(options: argparse.Namespace) -> None:
    from kilofed.commands.training import resume

    resume(options)


def _check(options: argparse.Namespace) -> None:
    from kilofed.commands.training import check

    check(options)


def _compare(options: argparse.Namespace) -> None:
    from kilofed.commands.training import compare

    compare(options)


def _plan(options: argparse.Namespace) -> None:
    from kilofed.commands.training import plan

    plan(options)


def _ls(options: argparse.Namespace) -> None:
    from kilofed.commands.reading import ls

    ls(options)


def _show(options: argparse.Namespace) -> None:
    from kilofed.commands.reading import show

    show(options)


def _report(options: argparse.Namespace) -> None:
    from kilofed.commands.reading import report

    report(options)


def _eval(options: argparse.Namespace) -> None:
    from kilofed.commands.results import evaluate

    evaluate(options)


def _export(options: argparse.Namespace) -> None:
    from kilofed.commands.results import export

    export(options)


def _replay(options: argparse.Namespace) -> None:
    from kilofed.commands.results import replay

    replay(options)


def _chat(options: argparse.Namespace) -> None:
    from kilofed.commands.serving import chat

    chat(options)


def _serve(options: argparse.Namespace) -> None:
    from kilofed.commands.serving import serve

    serve(options)
