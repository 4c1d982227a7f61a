"""How many lines of code is a method? Blank lines, comments and docstrings do not count.

python benchmarks/methods/method_lines.py [--quick] [--json]
"""

import argparse
import ast
import json
from importlib import resources


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="takes no time either way")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    files = sorted((resources.files("kilofed") / "methods").iterdir(), key=lambda item: item.name)
    counts = {f.name[:-3]: count(f.read_text("utf-8")) for f in files if f.name.endswith(".py") and f.name[0] != "_"}
    print(json.dumps(counts) if options.json else "\n".join(f"{name:12} {lines:4}" for name, lines in counts.items()))


def count(source: str) -> int:
    """Lines that hold code."""
    quiet: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            quiet |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(source.splitlines(), 1)
    return sum(bool(line.strip()) and line.strip()[0] != "#" and number not in quiet for number, line in lines)


if __name__ == "__main__":
    main()
