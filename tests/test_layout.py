"""healthchecker.py reads from top to bottom, in small pieces: its own text is what is tested here."""

from __future__ import annotations

import ast
import builtins
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

FILE_LINES = 9050  # on the way to 7,900
FUNCTION_LINES = 40
MEDIAN_LINES = 10
CLASS_LINES = 200
BANNER_WIDTH = 79
LINE_WIDTH = 120

SOURCE = (Path(__file__).resolve().parent.parent / "healthchecker.py").read_text(encoding="utf-8")
LINES = SOURCE.splitlines()
TREE = ast.parse(SOURCE)
FUNCTIONS = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
CLASSES = [node for node in ast.walk(TREE) if isinstance(node, ast.ClassDef)]
BANNERS = [line for line in LINES if re.match(r"#\s*={2,}", line)]
Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


def length(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def bound_names(node: ast.AST) -> set[str]:
    """Names that a function (or a class body, or the module) binds itself; comprehension targets count as its own."""
    names: set[str] = set()
    if isinstance(node, Function):
        arguments = node.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        names = {argument.arg for argument in every if argument}
    pending = list(ast.iter_child_nodes(node))
    while pending:
        child = pending.pop()
        if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            names.add(child.id)
        elif isinstance(child, ast.ExceptHandler) and child.name:
            names.add(child.name)
        elif isinstance(child, ast.alias):
            names.add((child.asname or child.name).partition(".")[0])
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(child.name)
            pending += child.decorator_list
        elif not isinstance(child, ast.Lambda):
            pending += ast.iter_child_nodes(child)
    return names


def global_names(node: ast.AST, local: frozenset[str] = frozenset()) -> Iterator[tuple[str, int]]:
    """Names with their lines that `node` takes from the module; function bodies and annotations included."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in local:
        yield node.id, node.lineno
    body = node.body if isinstance(node, Function | ast.ClassDef) else []
    inner = local | bound_names(node) if isinstance(node, Function) else local
    inside = {id(child) for child in (body if isinstance(body, list) else [body])}
    own = frozenset(bound_names(node)) if isinstance(node, ast.ClassDef) else frozenset()
    for child in ast.iter_child_nodes(node):
        # A class's own names are seen by the statements of its body, but not by its methods.
        seen = own if own and id(child) in inside and not isinstance(child, Function) else frozenset()
        yield from global_names(child, (inner if id(child) in inside else local) | seen)


def definitions() -> dict[str, int]:
    """Line of the first definition of each name of the module."""
    lines: dict[str, int] = {}
    for statement in TREE.body:
        module = ast.Module(body=[statement], type_ignores=[])
        for name in bound_names(module):
            lines.setdefault(name, statement.lineno)
    return lines


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(): return later\n", {"later"}),
        ("def f(later): return later\n", set()),
        ("def f():\n later = 1\n return later\n", set()),
        ("def f(x: later) -> None: pass\n", {"later"}),
        ("def f(x=later): later = x\n", {"later"}),
        ("class A:\n later = 1\n b = later\n def f(self): return later\n", {"later"}),
        ("class A:\n later = 1\n b = later\n", set()),
        ("def f(): return [later for later in ()]\n", set()),
        ("def f():\n def later(): pass\n return lambda: later()\n", set()),
        ("f = lambda later: later\n", set()),
    ],
)
def test_name_finder(source: str, expected: set[str]) -> None:
    """The finder below sees what it should and no more, or the next test could not fail."""
    assert {name for name, _ in global_names(ast.parse(source)) if name == "later"} == expected


def test_definitions_refer_only_to_names_above() -> None:
    defined = definitions()
    early = [
        f"line {line}: {name}, which is defined in line {defined[name]}"
        for statement in TREE.body
        for name, line in global_names(statement)
        if defined.get(name, 0) > statement.lineno
    ]
    assert not early, "\n".join(early)


def test_every_name_is_defined() -> None:
    known = set(definitions()) | set(dir(builtins)) | {"__file__", "__name__"}
    unknown = {name: line for statement in TREE.body for name, line in global_names(statement) if name not in known}
    assert not unknown


def test_sections_stand_in_the_order_of_the_docstring() -> None:
    listed = re.findall(r"^    ([A-Z]\w+)\s{2,}\S", ast.get_docstring(TREE, clean=False) or "", re.MULTILINE)
    assert len(listed) >= 10
    assert [banner.split()[2] for banner in BANNERS] == listed


@pytest.mark.parametrize("banner", BANNERS)
def test_banner(banner: str) -> None:
    assert re.fullmatch(r"# === [A-Z][\w ]* =+", banner)
    assert len(banner) == BANNER_WIDTH


def test_sizes() -> None:
    long = [f"{node.name}: {length(node)} lines" for node in FUNCTIONS if length(node) > FUNCTION_LINES]
    long += [f"class {node.name}: {length(node)} lines" for node in CLASSES if length(node) > CLASS_LINES]
    long += [f"line {number}: {len(line)} columns" for number, line in enumerate(LINES, 1) if len(line) > LINE_WIDTH]
    assert not long, "\n".join(long)
    assert statistics.median(map(length, FUNCTIONS)) <= MEDIAN_LINES


def test_file_size() -> None:
    assert len(LINES) <= FILE_LINES


def test_no_unused_definition() -> None:
    """Private functions and methods are used somewhere; so is each public function of the module."""
    used = {node.id for node in ast.walk(TREE) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    used |= {node.attr for node in ast.walk(TREE) if isinstance(node, ast.Attribute)}
    used |= set(re.findall(r'"(_\w+)"', SOURCE))
    validated = {node.name for node in FUNCTIONS if node.decorator_list}  # pydantic calls these by itself
    private = {node.name for node in FUNCTIONS if re.match(r"_(?!_)", node.name)} - validated
    module = {node.name for node in TREE.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    constants = {name for name in definitions() if name.isupper()}
    private -= {"_parse_disconnect", "_new_conn"}  # paramiko and urllib3 call them
    assert not sorted((private | module | constants) - used)


def test_no_mutable_globals() -> None:
    """No function rebinds a name of the module."""
    assert not [node.lineno for node in ast.walk(TREE) if isinstance(node, ast.Global)]


def test_broad_handlers_name_their_reason() -> None:
    broad = [
        line
        for line in LINES
        if re.search(r"except (\(?(Base)?Exception\b|.*\bException[,)])", line) and "#" not in line
    ]
    assert not broad
