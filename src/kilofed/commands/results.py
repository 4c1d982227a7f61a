"""Commands on the model of a finished run: eval, export, replay."""

import argparse
import json
import shutil

from kilofed.config.tables import parse_words
from kilofed.errors import RunError
from kilofed.records.codec import to_json
from kilofed.reports.report import scores
from kilofed.runs import export as exports
from kilofed.runs import replay as replays
from kilofed.runs import restore


def evaluate(options: argparse.Namespace) -> None:
    """Score a run's model on held-out rows and print the scores."""
    row = restore.score(options.folder, parse_words(options.words))
    if options.json:
        print(json.dumps(to_json(row)))
        return
    print(scores({"federated": row}, shutil.get_terminal_size((100, 24)).columns))


def export(options: argparse.Namespace) -> None:
    """Copy the adapter, or write the merged model. Raises RunError: neither is asked for."""
    if not options.merged and not options.adapter:
        raise RunError("nothing to export; give --merged DIR or --adapter DIR")
    if options.adapter:
        print(exports.adapter(options.folder, options.adapter))
    if options.merged:
        print(exports.merged(options.folder, options.merged))


def replay(options: argparse.Namespace) -> None:
    """Write the model of a round of a seed-pool run and print its path."""
    print(replays.write(options.folder, options.out, round=options.round, without=options.without))
