"""The family of errors and the hint for misspelt names."""

import re

import kilofed.errors
from kilofed.errors import KilofedError, nearest


def family() -> dict[str, type]:
    own = kilofed.errors.__name__
    return {k: item for k, item in vars(kilofed.errors).items() if isinstance(item, type) and item.__module__ == own}


def test_every_error_is_a_kilofed_error_and_a_value_error() -> None:
    assert all(issubclass(kind, KilofedError) and issubclass(kind, ValueError) for kind in family().values())


def test_the_tree_in_the_docstring_names_every_error_at_its_place() -> None:
    parents: dict[int, str] = {}
    drawn = {}
    for line in (kilofed.errors.__doc__ or "").splitlines():
        if found := re.match(r"^([│├└─ ]*)([A-Z]\w+)  ", line):
            depth = len(found[1]) // 4
            parents[depth] = found[2]
            drawn[found[2]] = parents[depth - 1] if depth else "ValueError"
    assert drawn == {name: kind.__bases__[0].__name__ for name, kind in family().items()}


def test_the_nearest_name_is_offered() -> None:
    assert nearest("stpes", ["steps", "epochs"]) == " (did you mean steps?)"


def test_without_a_near_name_all_are_listed() -> None:
    assert nearest("zzz", ["b", "a"]) == " (there is: a, b)"
    assert nearest("zzz", []) == " (there is: nothing)"
