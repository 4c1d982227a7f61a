"""The command `kilofed`: parse, call, print. Results go to stdout, progress and messages to stderr."""

import argparse
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kilofed.errors import KilofedError

if TYPE_CHECKING:
    from tqdm import tqdm

    from kilofed.config.fields import Value
    from kilofed.runs.results import Results

ABOUT = "Federated fine-tuning of language models, for people whose data may not move."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0 done, 1 refused or failed, 130 stopped by Ctrl-C."""
    options = _parse(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        _prepare()
        options.call(options)
    except KilofedError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nstopped.{_Progress.hint()}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """As argparse does it, but options may stand between the words."""
    parser = _parser()
    options, more = parser.parse_known_args(argv)
    if more and ("words" not in options or any(word.startswith("-") for word in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:
        options.words = [*options.words, *more]
    return options


def _amount(unit: str, example: str = "8G") -> Callable[[str], float]:
    """Reads an option such as 8GB."""

    def read(text: str) -> float:
        from kilofed.units import quantity

        try:
            return quantity(text, unit)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{error}; expected such as {example}{unit}") from error

    return read


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kilofed", description=ABOUT)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run a recipe from the first round to the report")
    run.add_argument(
        "words", nargs="*", metavar="RECIPE key=value", help="a recipe's name or file (default tiny), then changes"
    )
    run.add_argument("--out", type=Path, help="run folder to make (default runs/NAME-N)")
    run.set_defaults(call=_run)

    resume = commands.add_parser("resume", help="go on with a run that was stopped")
    resume.set_defaults(call=_resume)

    check = commands.add_parser("check", help="look at a recipe's model, data and machine before anything is trained")
    check.add_argument("words", nargs="*", metavar="RECIPE key=value", help="as for run")
    check.set_defaults(call=_check)

    compare = commands.add_parser("compare", help="run several methods on one model and one split, side by side")
    compare.add_argument(
        "words", nargs="*", metavar="RECIPE key=value", help="as for run; LABEL:key=value changes one entry alone"
    )
    compare.add_argument(
        "--methods", required=True, metavar="A,B", help="methods or shipped recipes; full=fedavg names an entry full"
    )
    compare.add_argument("--seeds", type=int, default=1, help="repeats of each (default 1)")
    compare.add_argument("--out", type=Path, required=True, metavar="DIR", help="where runs and compare.html go")
    compare.set_defaults(call=_compare)

    plan = commands.add_parser("plan", help="tell what methods would take on a given device and link, before any runs")
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
        "--latency", type=_amount("s", "30m"), metavar="S", help="of a message and its answer (default 30ms)"
    )
    plan.set_defaults(call=_plan)

    ls = commands.add_parser("ls", help="list methods, recipes, data sources or runs")
    ls.add_argument("what", nargs="?", choices=("methods", "recipes", "data", "runs"), help="default: all of them")
    ls.add_argument("--markdown", action="store_true", help="methods as a table for a page")
    ls.set_defaults(call=_ls)

    show = commands.add_parser("show", help="explain a method, a recipe or a table of a recipe, field by field")
    show.add_argument("name", metavar="NAME", help="such as fedavg, tiny, train")
    show.set_defaults(call=_show)

    evaluate = commands.add_parser("eval", help="score a run's model on held-out rows")
    evaluate.add_argument("folder", type=Path, metavar="RUN", help="a run folder")
    evaluate.add_argument("words", nargs="*", metavar="key=value", help="such as data.test=FILE evaluate.generate=100")
    evaluate.set_defaults(call=_eval)

    report = commands.add_parser("report", help="write the report of a run again and print its path")
    report.set_defaults(call=_report)

    export = commands.add_parser("export", help="take the result out of a run folder")
    export.add_argument("--merged", type=Path, metavar="DIR", help="write one model that plain transformers loads")
    export.add_argument("--adapter", type=Path, metavar="DIR", help="copy the adapter in PEFT's format")
    export.set_defaults(call=_export)

    replay = commands.add_parser("replay", help="write the model of any round of a seed-pool run, from its records")
    replay.add_argument("--round", type=int, required=True, metavar="R", help="0 is the base model")
    replay.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for the model")
    replay.add_argument("--without", type=int, metavar="CLIENT", help="leave out what this client reported")
    replay.set_defaults(call=_replay)

    chat = commands.add_parser("chat", help="chat with a run's model")
    chat.add_argument("--max-new-tokens", type=int, default=128, help="longest answer (default 128)")
    chat.set_defaults(call=_chat)

    serve = commands.add_parser("serve", help="serve a run's model over an OpenAI-compatible API")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    serve.add_argument("--port", type=int, default=8000, help="0 takes a free one (default 8000)")
    serve.add_argument("--name", default="", help="what clients call the model (default: the folder's name)")
    serve.add_argument("--template", default="", help="prompt template (default: the one of the run's training)")
    serve.add_argument("--device", default="", help="where the model runs (default: the recipe's)")
    serve.add_argument("--threads", type=int, default=0, help="threads of torch (default 0: torch's own choice)")
    serve.add_argument(
        "--token-file", type=Path, metavar="FILE", help="token (default: KILOFED_TOKEN, else a new one)"
    )
    serve.add_argument("--no-token", action="store_true", help="let in every program of this machine")
    serve.add_argument("--max-active", type=int, default=8, help="requests decoded in turns (default 8)")
    serve.add_argument("--max-waiting", type=int, default=64, help="requests that may wait beyond these (default 64)")
    serve.add_argument(
        "--max-body", type=int, default=1 << 20, metavar="BYTES", help="largest request (default 1 MiB)"
    )
    serve.add_argument("--max-choices", type=int, default=128, help="most answers to one request (default 128)")
    serve.add_argument("--max-logprobs", type=int, default=128, help="most log-probabilities per token (default 128)")
    serve.add_argument("--timeout", type=float, default=300.0, metavar="S", help="seconds per request (default 300)")
    serve.set_defaults(call=_serve)

    for command in (chat, serve):
        command.add_argument("path", metavar="RUN", help="a run folder, a model directory, builtin:small or a hub id")
    for command in (resume, report, export, replay):
        command.add_argument("folder", type=Path, metavar="RUN", help="a run folder")
    for command in (run, resume, check, compare, plan, ls, show, evaluate):
        command.add_argument("--json", action="store_true", help="print one JSON value")
    return parser


def _run(options: argparse.Namespace) -> None:
    from kilofed.runs.loop import run

    source, overrides = _split(options.words)
    with _Progress() as watch:
        done = run(source, overrides, out=options.out, watch=watch)
    _print_results(done.results, options.json)


def _resume(options: argparse.Namespace) -> None:
    from kilofed.runs.loop import resume

    with _Progress() as watch:
        done = resume(options.folder, watch=watch)
    _print_results(done.results, options.json)


def _print_results(results: "Results", as_json: bool) -> None:
    if as_json:
        print(json.dumps(results))
        return
    from kilofed.reports.report import table

    print(table(results, _width()))
    print(f"report: {results['run']}/report.html")


def _check(options: argparse.Namespace) -> None:
    from kilofed.config.tables import load
    from kilofed.runs.check import check

    source, overrides = _split(options.words)
    findings = check(load(source, overrides))
    if options.json:
        print(json.dumps([vars(finding) for finding in findings]))
    else:
        for finding in findings:
            print(f"{finding.level:4}  {finding.text}")
    if any(finding.level == "bad" for finding in findings):
        raise KilofedError("the recipe would not run well as it is; see the lines marked bad")


def _compare(options: argparse.Namespace) -> None:
    from kilofed.runs import compare

    source, overrides = _split(options.words)
    chosen, common = compare.entries(options.methods, overrides)
    found = compare.compare(source, chosen, common, out=options.out, seeds=options.seeds)
    if options.json:
        print(json.dumps(found))
        return
    print(compare.text(found))
    print(f"page: {options.out}/compare.html")


def _plan(options: argparse.Namespace) -> None:
    from kilofed.runs import plan
    from kilofed.runs.sites import Sites

    source, overrides = _split(options.words)
    recipes = plan.recipes(source, options.methods, overrides)
    names = ("flops", "memory", "up", "down", "latency", "server_flops")
    stated = {name: getattr(options, name) for name in names}
    device = plan.device(Sites(next(iter(recipes.values()))), **stated)
    found = plan.plan(recipes, device)
    if options.json:
        print(json.dumps({"device": vars(device), "methods": [vars(one) for one in found]}))
        return
    print(plan.text(found, device))


def _ls(options: argparse.Namespace) -> None:
    from kilofed.runs import listing

    if options.markdown:
        print(listing.methods_table())
        return
    kinds = [options.what] if options.what else ["methods", "recipes", "data", "runs"]
    found = {kind: getattr(listing, kind)() for kind in kinds}
    if options.json:
        print(json.dumps(found[options.what] if options.what else found))
        return
    for kind, rows in found.items():
        if len(found) > 1:
            print(f"{kind}:")
        width = max(map(len, rows), default=0)
        for name, text in rows.items():
            print(f"{'  ' if len(found) > 1 else ''}{name:{width}}  {text}".rstrip())


def _show(options: argparse.Namespace) -> None:
    from kilofed.runs import listing

    shown = listing.show(options.name)
    print(json.dumps(shown.as_dict()) if options.json else shown.as_text())


def _eval(options: argparse.Namespace) -> None:
    from kilofed.config.tables import parse_words
    from kilofed.runs.restore import score

    row = score(options.folder, parse_words(options.words))
    if options.json:
        print(json.dumps(row))
        return
    from kilofed.reports.report import table

    print(table({"rows": {"federated": row}}, _width()))


def _report(options: argparse.Namespace) -> None:
    from kilofed.reports.report import write

    print(write(options.folder))


def _export(options: argparse.Namespace) -> None:
    from kilofed.errors import RunError
    from kilofed.runs import export

    if not options.merged and not options.adapter:
        raise RunError("say what to export: --merged DIR or --adapter DIR")
    if options.adapter:
        print(export.adapter(options.folder, options.adapter))
    if options.merged:
        print(export.merged(options.folder, options.merged))


def _replay(options: argparse.Namespace) -> None:
    from kilofed.runs.replay import write

    print(write(options.folder, options.out, round=options.round, without=options.without))


def _chat(options: argparse.Namespace) -> None:
    from kilofed.serving.chat import converse

    converse(options.path, max_new_tokens=options.max_new_tokens)


def _serve(options: argparse.Namespace) -> None:
    from kilofed.errors import ServeError

    try:
        from kilofed.serving import server
        from kilofed.serving.requests import Limits
    except ModuleNotFoundError as error:
        raise ServeError(f"{error.name} is missing: pip install 'kilofed[serve]'") from error

    limits = Limits(
        options.max_active,
        options.max_waiting,
        options.max_body,
        options.timeout,
        options.max_choices,
        options.max_logprobs,
    )
    config = server.ServerConfig(options.host, options.port, options.token_file, not options.no_token)
    opened = server.open_model(
        options.path, name=options.name, template=options.template, device=options.device, threads=options.threads
    )
    server.serve(opened, config, limits)


def _split(words: Sequence[str]) -> tuple[str, "dict[str, Value]"]:
    """The recipe's name or file, `tiny` if none is given, and the overrides."""
    from kilofed.config.tables import parse_words
    from kilofed.errors import RecipeError

    names = [word for word in words if "=" not in word]
    if len(names) > 1:
        raise RecipeError(f"{len(names)} recipes are named ({', '.join(names)}); expected one, then key=value")
    return (names[0] if names else "tiny"), parse_words([word for word in words if "=" in word])


def _width() -> int:
    return shutil.get_terminal_size((100, 24)).columns


def _prepare() -> None:
    """Nothing is sent anywhere, and libraries keep their notices to themselves, unless the user set otherwise."""
    for name, value in {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "DO_NOT_TRACK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }.items():
        os.environ.setdefault(name, value)
    logging.getLogger("absl").setLevel(logging.ERROR)


class _Progress:
    """Progress on stderr: a bar on a terminal, a line per round elsewhere."""

    _folder: Path | None = None

    def __init__(self) -> None:
        self._bar: tqdm[None] | None = None
        self._terminal = sys.stderr.isatty()

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def begin(self, folder: Path) -> None:
        type(self)._folder = folder
        print(f"run folder: {folder}", file=sys.stderr)

    def stage(self, text: str) -> None:
        if self._bar is not None and self._terminal:
            self._bar.set_description_str(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def round(self, number: int, total: int, metrics: Mapping[str, object]) -> None:
        shown = {"train_loss": "training loss", "loss": "held-out loss", "accuracy": "accuracy"}
        text = "  ".join(
            f"{word} {metrics[name]:.4f}" for name, word in shown.items() if metrics.get(name) is not None
        )
        if not self._terminal:
            print(f"round {number}/{total}  {text}  {metrics['seconds']:.1f} s", file=sys.stderr, flush=True)
            return
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=number - 1, unit="round", file=sys.stderr, dynamic_ncols=True)
        self._bar.set_description_str(f"round {number}/{total}")
        self._bar.set_postfix_str(text)
        self._bar.update()

    @classmethod
    def hint(cls) -> str:
        """What to do after Ctrl-C."""
        folder = cls._folder
        return f" What was finished is safe: kilofed resume {folder}" if folder else ""
