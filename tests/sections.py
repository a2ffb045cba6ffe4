"""The sections of healthchecker.py as its text has them: `make map` prints sizes, and who uses what of whom."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

PROGRAM = Path(__file__).resolve().parent.parent / "healthchecker.py"
HEAD = "Head"  # what stands above the first section
BANNER = re.compile(r"# === (.+?) =+$")
Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


# === Names ===================================================================


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


def definitions(tree: ast.Module) -> dict[str, int]:
    """Line of the first definition of each name of a module."""
    lines: dict[str, int] = {}
    for statement in tree.body:
        for name in bound_names(ast.Module(body=[statement], type_ignores=[])):
            lines.setdefault(name, statement.lineno)
    return lines


def comprehended(tree: ast.Module) -> set[str]:
    """Names of comprehensions that stand in the module itself: they end with them."""
    plain = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    loops = [inner for node in plain for inner in ast.walk(node) if isinstance(inner, ast.comprehension)]
    return {node.id for loop in loops for node in ast.walk(loop.target) if isinstance(node, ast.Name)}


# === Sections ================================================================


@dataclass
class Section:
    """A section: its lines from the banner on, what it defines, and what it uses of the others."""

    name: str
    first: int
    last: int
    comment: list[str]
    defined: set[str] = field(default_factory=set)
    uses: dict[str, set[str]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return self.last - self.first + 1

    @property
    def gives(self) -> list[str] | None:
        """What the comment says that others may use (`nothing`: nothing); None where it does not say."""
        found = re.search(r"^Gives: (.*)\Z", "\n".join(self.comment), re.DOTALL | re.MULTILINE)
        return re.findall(r"\w+", found[1].removeprefix("nothing")) if found else None


def comment_at(lines: list[str], first: int) -> list[str]:
    """The comment's text that follows the banner in line `first`."""
    found: list[str] = []
    for line in lines[first:]:
        if line.startswith("#"):
            found.append(line.removeprefix("#").strip())
        elif line.strip() or found:
            break
    return found


def sections(source: str) -> dict[str, Section]:
    """The sections of a module, in its order."""
    lines = source.splitlines()
    banners = [(number, found[1]) for number, line in enumerate(lines, 1) if (found := BANNER.match(line))]
    starts = [(1, HEAD), *banners]
    ends = [first - 1 for first, _ in banners] + [len(lines)]
    found = {
        name: Section(name, first, last, comment_at(lines, first))
        for (first, name), last in zip(starts, ends, strict=True)
    }
    tree = ast.parse(source)
    aliases = [node for node in ast.walk(tree) if isinstance(node, ast.alias)]
    nobodys = {(alias.asname or alias.name).partition(".")[0] for alias in aliases} | comprehended(tree)
    owner = {name: at(found, line) for name, line in definitions(tree).items() if name not in nobodys}
    for name, section in owner.items():
        section.defined.add(name)
    for statement in tree.body:
        here = at(found, statement.lineno)
        for name, _ in global_names(statement):
            if owner.get(name, here) is not here:
                here.uses.setdefault(owner[name].name, set()).add(name)
    return found


def at(found: Mapping[str, Section], line: int) -> Section:
    return next(section for section in found.values() if section.first <= line <= section.last)


def taken(found: Mapping[str, Section], name: str) -> set[str]:
    """What others use of a section."""
    return set().union(*(section.uses.get(name, set()) for section in found.values()))


def main() -> int:
    """Prints the map."""
    found = sections(PROGRAM.read_text(encoding="utf-8"))
    for name, section in found.items():
        print(f"{name:12} {section.size:5} lines, {len(section.defined):3} names, gives {len(taken(found, name)):3}")
        for other in found:
            if names := sorted(section.uses.get(other, ())):
                print(f"{'':14}of {other}: {', '.join(names)}")
    size = PROGRAM.stat().st_size
    lines = sum(section.size for section in found.values())
    print(f"{'all':12} {lines:5} lines, {size:,} bytes, {size / lines:.1f} a line")
    return 0


if __name__ == "__main__":
    sys.exit(main())
