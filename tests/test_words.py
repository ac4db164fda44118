"""The form of docstrings: one for everything public, and a list of the arguments where there are more than three."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

MOST = 3
FILES = sorted(path for room in ("fastmem", "kernels") for path in (ROOT / room).rglob("*.py"))
Function = ast.FunctionDef | ast.AsyncFunctionDef


def public(body: list[ast.stmt], owner: str = "") -> Iterator[tuple[str, ast.ClassDef | Function]]:
    """Public classes and functions, with methods of public classes, by their names."""
    for node in body:
        if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_"):
            yield f"{owner}{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{node.name}.")


def is_decorated_by(node: ast.ClassDef | Function, name: str) -> bool:
    return any(name in ast.unparse(decorator) for decorator in node.decorator_list)


def arguments(node: Function) -> list[str]:
    """What a caller gives, without self and cls."""
    given = node.args
    names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls", "ctx")]


def fields(node: ast.ClassDef) -> list[str]:
    """Fields of a dataclass that its docstring has to explain."""
    return [
        field.target.id
        for field in node.body
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and not field.target.id.startswith("_")
        and "ClassVar" not in ast.unparse(field.annotation)
    ]


def complaints(tree: ast.Module) -> list[str]:
    """Names in a module whose docstring lacks what it needs."""
    found = [] if ast.get_docstring(tree) else ["the module has no docstring"]
    for name, node in public(tree.body):
        text = ast.get_docstring(node) or ""
        if isinstance(node, ast.ClassDef):
            if not text:
                found.append(f"{name} has no docstring")
            named = fields(node) if is_decorated_by(node, "dataclass") else []
            if len(named) > MOST and "Attributes:" not in text and "Fields as in" not in text:
                found.append(f"{name} has {len(named)} fields and no list of them")
        # a command's docstring is its help text, a kernel's file says what its arguments are, and what a network's pass
        # takes stands at the network
        elif not any(is_decorated_by(node, name) for name in ("make_command", "jit")) and node.name != "forward":
            named = arguments(node)
            if len(named) > MOST and "Args:" not in text and "Arguments and results: as" not in text:
                found.append(f"{name} has {len(named)} parameters and no list of them")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_things_say_what_they_take(path: Path):
    assert complaints(ast.parse(path.read_text())) == []


def test_the_complaints_are_found():
    source = '''"""A module."""
from dataclasses import dataclass
@dataclass
class Many:
    """One."""
    a: int
    b: int
    c: int
    d: int
class Bare:
    def method(self, a, b, c): ...
    def long(self, a, b, c, d): ...
def _private(a, b, c, d): ...
def listed(a, b, c, *, d):
    """Do it.

    Args:
        a: one.
    """
'''
    assert complaints(ast.parse(source)) == [
        "Many has 4 fields and no list of them",
        "Bare has no docstring",
        "Bare.long has 4 parameters and no list of them",
    ]
