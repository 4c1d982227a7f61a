"""Commands that run recipes or prepare them: run, resume, check, compare, plan."""

import argparse
import json
import shutil
from collections.abc import Sequence

from kilofed.commands.progress import Progress
from kilofed.config.fields import Value
from kilofed.config.tables import load, parse_words
from kilofed.errors import KilofedError, RecipeError
from kilofed.records.codec import to_json
from kilofed.records.results import Results
from kilofed.reports.report import table
from kilofed.runs import check as checks
from kilofed.runs import compare as comparisons
from kilofed.runs import loop
from kilofed.runs import plan as plans
from kilofed.runs.sites import Sites


def run(options: argparse.Namespace) -> None:
    """Run a recipe and print its results."""
    source, overrides = split_words(options.words)
    with Progress() as watch:
        finished = loop.run(source, overrides, out=options.out, watch=watch)
    print_results(finished.results, options.json)


def resume(options: argparse.Namespace) -> None:
    """Continue a run and print its results."""
    with Progress() as watch:
        finished = loop.resume(options.folder, watch=watch)
    print_results(finished.results, options.json)


def print_results(results: Results, as_json: bool) -> None:
    """Print a run's results as one JSON value, or as a table."""
    if as_json:
        print(json.dumps(results.to_json()))
        return
    print(table(results, shutil.get_terminal_size((100, 24)).columns))
    print(f"report: {results.run}/report.html")


def check(options: argparse.Namespace) -> None:
    """Print what is found in a recipe. Raises KilofedError: something in it is bad."""
    source, overrides = split_words(options.words)
    findings = checks.check(load(source, overrides))
    if options.json:
        print(json.dumps([vars(finding) for finding in findings]))
    else:
        for finding in findings:
            print(f"{finding.level:4}  {finding.text}")
    if any(finding.level == "bad" for finding in findings):
        raise KilofedError("the recipe has problems; correct the lines marked bad")


def compare(options: argparse.Namespace) -> None:
    """Run several methods and print their comparison."""
    source, overrides = split_words(options.words)
    chosen, common = comparisons.entries(options.methods, overrides)
    compared = comparisons.compare(source, chosen, common, out=options.out, seeds=options.seeds)
    if options.json:
        print(json.dumps(to_json(compared)))
        return
    print(comparisons.text(compared))
    print(f"page: {options.out}/compare.html")


def plan(options: argparse.Namespace) -> None:
    """Print the costs that methods would have on the stated device and link."""
    source, overrides = split_words(options.words)
    recipes = plans.recipes(source, options.methods, overrides)
    names = ("flops", "memory", "up", "down", "latency", "server_flops")
    stated = {name: getattr(options, name) for name in names}
    device = plans.device(Sites(next(iter(recipes.values()))), **stated)
    forecasts = plans.plan(recipes, device)
    if options.json:
        print(json.dumps({"device": vars(device), "methods": [vars(one) for one in forecasts]}))
        return
    print(plans.text(forecasts, device))


def split_words(words: Sequence[str]) -> tuple[str, dict[str, Value]]:
    """The recipe's name or file, `tiny` if none is given, and the overrides. Raises RecipeError: two recipes."""
    names = [word for word in words if "=" not in word]
    if len(names) > 1:
        raise RecipeError(f"{len(names)} recipes are named ({', '.join(names)}); expected one, then key=value")
    return (names[0] if names else "tiny"), parse_words([word for word in words if "=" in word])
