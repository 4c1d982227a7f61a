"""Small changes to a module's syntax tree: each is a mistake that somebody could make, and that a test should notice.

Text for people is left as it is: messages of errors and logs, docstrings, and annotations that are types only.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType

_COMPARED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
_COMPUTED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
_FUNCTIONS = {"min": "max", "max": "min", "any": "all", "all": "any", "sorted": "list"}
_FOR_PEOPLE = {"log", "warnings", "logging"}
_DROPPED = "dropped"


@dataclass(frozen=True)
class Mutant:
    """One change to a module."""

    number: int
    """Its place among all mutants of the module."""
    line: int
    statement: int
    """Line of the statement that it lies in."""
    where: str
    """The class and function that it lies in; empty outside of any."""
    kind: str
    change: str
    """`before -> after`."""


@dataclass(frozen=True)
class _Edit:
    """An item of a list, or a field of a node, that is replaced."""

    kind: str
    holder: list[ast.AST] | ast.AST
    place: int | str
    value: object
    shown: ast.AST
    """What is shown before and after; a statement that is dropped is shown before only."""
    part: str = ""
    """The field of it that is shown; empty for all."""

    @property
    def line(self) -> int:
        """Where it begins, from 1."""
        node = self.shown.target if isinstance(self.shown, ast.comprehension) else self.shown
        return int(getattr(node, "lineno", 0))

    @property
    def text(self) -> str:
        """What is shown, in one line; of a statement with a block the first line."""
        node = getattr(self.shown, self.part) if self.part else self.shown
        if isinstance(node, ast.comprehension):
            node = ast.ListComp(ast.Constant(...), [node])
        return ast.unparse(ast.fix_missing_locations(node)).partition("\n")[0]

    def replace(self) -> object:
        """Put the value in; returns what was there."""
        return self._put(self.value)

    def undo(self, was: object) -> None:
        """Put back what was there."""
        self._put(was)

    def _put(self, value: object) -> object:
        if isinstance(self.holder, list):
            was, self.holder[self.place] = self.holder[self.place], value  # type: ignore[index, call-overload]
            return was
        was = getattr(self.holder, str(self.place))
        setattr(self.holder, str(self.place), value)
        return was


def mutants(tree: ast.Module) -> Iterator[Mutant]:
    """Every mutant of `tree`; the tree is the mutant until the next one is asked for, and then as it was."""
    number = 0
    for node, parent, statement, where in _walk(tree, tree, 0, ""):
        for edit in (
            *_constants(node, parent),
            *_expressions(node),
            *_calls(node),
            *_conditions(node),
            *_statements(node),
        ):
            before = edit.text
            was = edit.replace()
            after = edit.kind if edit.kind.startswith(_DROPPED) else edit.text
            if after != before:
                yield Mutant(number, edit.line, statement or edit.line, where, edit.kind, _change(before, after))
                number += 1
            edit.undo(was)


def code_of(source: str, path: str, number: int) -> CodeType:
    """The code of a module's mutant. Raises IndexError: there is none of that number."""
    tree = ast.parse(source)
    for mutant in mutants(tree):
        if mutant.number == number:
            return compile(ast.fix_missing_locations(tree), path, "exec")
    raise IndexError(f"{path} has no mutant {number}")


def _change(before: str, after: str) -> str:
    """`before -> after`, each at most 80 letters from shortly before the place where they part."""
    same = next((place for place, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]), 0)
    first = max(same - 50, 0) if len(before) > 80 else 0
    shown = [("..." if first else "") + text[first : first + 80] for text in (before, after)]
    return f"{shown[0]} -> {shown[1] if after[0:7] != _DROPPED else after}"


def _walk(node: ast.AST, parent: ast.AST, statement: int, where: str) -> Iterator[tuple[ast.AST, ast.AST, int, str]]:
    """Nodes that may be changed, with the node above, the line of the statement, and the class and function around."""
    if isinstance(node, ast.stmt):
        statement = node.lineno
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        where = f"{where}.{node.name}".removeprefix(".")
    yield node, parent, statement, where
    for child in _children(node):
        yield from _walk(child, node, statement, where)


def _children(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.JoinedStr | ast.Raise):
        return
    if isinstance(node, ast.FunctionDef) and any(ast.unparse(one) == "overload" for one in node.decorator_list):
        return
    if isinstance(node, ast.Expr) and (isinstance(node.value, ast.Constant) or _is_for_people(node.value)):
        return
    if isinstance(node, ast.keyword) and node.arg == "strict":
        return  # A promise to ourselves: no test can see that it is asked for.
    for name, value in ast.iter_fields(node):
        if name in ("decorator_list", "returns") or (name == "annotation" and not _has_bounds(value)):
            continue
        yield from (one for one in (value if isinstance(value, list) else [value]) if isinstance(one, ast.AST))


def _has_bounds(annotation: object) -> bool:
    return isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Annotated"


def _is_for_people(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func).partition(".")[0] in _FOR_PEOPLE


def _constants(node: ast.AST, parent: ast.AST) -> Iterator[_Edit]:
    if not isinstance(node, ast.Constant) or not isinstance(node.value, bool | int | float):
        return
    values = [not node.value] if isinstance(node.value, bool) else [node.value + 1, node.value - 1]
    around = ast.expr | ast.keyword | ast.Assign | ast.AnnAssign | ast.AugAssign | ast.Return
    shown = parent if isinstance(parent, around) else node
    for value in values:
        yield _Edit("constant", node, "value", value, shown)


def _expressions(node: ast.AST) -> Iterator[_Edit]:
    if isinstance(node, ast.Compare):
        for place, operator in enumerate(node.ops):
            if type(operator) in _COMPARED:
                yield _Edit("comparison", list_of(node.ops), place, _COMPARED[type(operator)](), node)
    elif isinstance(node, ast.BinOp | ast.AugAssign):
        if type(node.op) in _COMPUTED and not _is_text(node):
            yield _Edit("arithmetic", node, "op", _COMPUTED[type(node.op)](), node)
    elif isinstance(node, ast.BoolOp):
        yield _Edit("and, or", node, "op", ast.Or() if isinstance(node.op, ast.And) else ast.And(), node)


def list_of(items: object) -> list[ast.AST]:
    """`items`, which are a list of nodes."""
    assert isinstance(items, list)
    return items


def _calls(node: ast.AST) -> Iterator[_Edit]:
    if not isinstance(node, ast.Call):
        return
    name = node.func.id if isinstance(node.func, ast.Name) else ""
    if name in _FUNCTIONS and (name != "sorted" or not node.keywords):
        yield _Edit("function", node.func, "id", _FUNCTIONS[name], node)
    if isinstance(node.func, ast.Attribute) and node.func.attr in _FUNCTIONS:
        yield _Edit("function", node.func, "attr", _FUNCTIONS[node.func.attr], node)
    plain = len(node.args) > 1 and not any(isinstance(one, ast.Starred) for one in node.args[:2])
    if plain and ast.unparse(node.func) not in {
        "isinstance",
        "issubclass",
        "cast",
        "getattr",
        "hasattr",
        "min",
        "max",
    }:
        yield _Edit("swapped arguments", node, "args", [node.args[1], node.args[0], *node.args[2:]], node)


def _conditions(node: ast.AST) -> Iterator[_Edit]:
    if isinstance(node, ast.IfExp):
        yield _Edit("condition", node, "test", _negated(node.test), node)
    elif isinstance(node, ast.If | ast.While) and not _negated_by_its_operator(node.test):
        yield _Edit("condition", node, "test", _negated(node.test), node, "test")
    elif isinstance(node, ast.comprehension):
        for place, test in enumerate(node.ifs):
            yield _Edit("condition", list_of(node.ifs), place, _negated(test), node)


def _negated_by_its_operator(test: ast.expr) -> bool:
    """Whether the other operator of a comparison is its negation."""
    last = ast.Lt | ast.LtE | ast.Gt | ast.GtE
    return isinstance(test, ast.Compare) and len(test.ops) == 1 and not isinstance(test.ops[0], last)


def _statements(node: ast.AST) -> Iterator[_Edit]:
    for name in ("body", "orelse", "finalbody"):
        block = getattr(node, name, None)
        if not isinstance(block, list):
            continue
        for place, one in enumerate(block):
            if isinstance(one, ast.With):
                if all(item.optional_vars is None for item in one.items):
                    bare = ast.copy_location(ast.If(ast.Constant(True), one.body, []), one)
                    yield _Edit("dropped with", block, place, bare, one)
            elif _can_be_dropped(one, node):
                yield _Edit(_DROPPED, block, place, ast.copy_location(ast.Pass(), one), one)


def _can_be_dropped(one: ast.stmt, inside: ast.AST) -> bool:
    if isinstance(one, ast.Expr):
        return isinstance(one.value, ast.Call | ast.Yield) and not _is_for_people(one.value)
    if isinstance(one, ast.Return):
        return not isinstance(inside, ast.FunctionDef | ast.With)
    if isinstance(one, ast.Assign | ast.AugAssign) or (isinstance(one, ast.AnnAssign) and one.value):
        return not isinstance(inside, ast.ClassDef | ast.Module)
    return isinstance(one, ast.Raise | ast.Continue | ast.Break | ast.Delete)


def _is_text(node: ast.BinOp | ast.AugAssign) -> bool:
    sides = [node.left, node.right] if isinstance(node, ast.BinOp) else [node.value]
    return any(isinstance(s, ast.JoinedStr) or isinstance(getattr(s, "value", None), str | bytes) for s in sides)


def _negated(test: ast.expr) -> ast.expr:
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return test.operand
    return ast.copy_location(ast.UnaryOp(ast.Not(), test), test)
