"""What `ls` and `show` print, and the table of methods for a page."""

from kilofed.federation.method import find_method, method_names
from kilofed.runs import listing


def test_the_table_of_methods_has_a_line_for_each_with_what_its_class_sends() -> None:
    head, rule, *lines = listing.methods_table().splitlines()
    assert head.count("|") == rule.count("|") == 4
    assert [line.split("`")[1] for line in lines] == method_names()
    for name, line in zip(method_names(), lines, strict=True):
        assert line.endswith(f"| {find_method(name).sends} |")
        assert " ".join(listing.methods()[name].split()).rstrip(".") in line


def test_methods_are_described_by_one_sentence() -> None:
    assert all(text and "\n" not in text for text in listing.methods().values())
