"""Commands that only read files and print, without torch: ls, show, report."""

import argparse
import json

from kilofed.reports import report as reports
from kilofed.runs import listing


def ls(options: argparse.Namespace) -> None:
    """List methods, recipes, data sources or runs."""
    if options.markdown:
        print(listing.methods_table())
        return
    kinds = [options.what] if options.what else ["methods", "recipes", "data", "runs"]
    tables = {kind: getattr(listing, kind)() for kind in kinds}
    if options.json:
        print(json.dumps(tables[options.what] if options.what else tables))
        return
    indent = "  " if len(tables) > 1 else ""
    for kind, rows in tables.items():
        if len(tables) > 1:
            print(f"{kind}:")
        width = max(map(len, rows), default=0)
        for name, text in rows.items():
            print(f"{indent}{name:{width}}  {text}".rstrip())


def show(options: argparse.Namespace) -> None:
    """Explain a method, a recipe or a table of a recipe."""
    shown = listing.show(options.name)
    print(json.dumps(shown.as_dict()) if options.json else shown.as_text())


def report(options: argparse.Namespace) -> None:
    """Write a run's report again and print its path."""
    print(reports.write(options.folder))
