"""Imports run down the list of rooms: none runs up, none closes a circle, and only some rooms know a model family.

A room is a folder of the package, or a file that lies beside the folders. Every import statement counts, also those
inside functions and those for type checkers.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import pytest

from tests.conftest import ROOT

# top floor first: a room may import those after it
ROOMS = (
    "cli",
    "stages",
    "demo",
    "report",
    "sweep",
    "mitigation",
    "extraction",
    "quality",
    "scoring",
    "ranking",
    "index",
    "tokens",
    "stats",
    "models",
    "data",
    "runs",
    "backends",
)
# it stands beside the one room that may import it, and imports no other
KERNELS, USES_KERNELS = "kernels", "backends"
# files below all rooms; these may import each other
GROUND = ("home", "files", "reporter", "errors")
# what users import and run: it may name everything, and nothing may import it
FRONT_DOOR, FRONT_DOOR_MODULES = "front door", ("fastmem", "fastmem.__main__")
# but for its number
VERSION = "fastmem.__version__"

FLOORS = {
    FRONT_DOOR: -1,
    **{room: floor for floor, room in enumerate(ROOMS)},
    KERNELS: len(ROOMS),
    **dict.fromkeys(GROUND, len(ROOMS) + 1),
}

FAMILY_MODULES = {f"fastmem.models.{family}" for family in ("rar", "var", "maskgit_vqgan", "vqvae")}
# the demo trains small models of every family
KNOWS_FAMILIES = ("models", "demo")


def module_of(file: str) -> str:
    """The module that a file is: fastmem/stats/builder.py is fastmem.stats.builder, and kernels/ is fastmem.kernels."""
    parts = file.removesuffix(".py").removesuffix("/__init__").split("/")
    return ".".join(parts if parts[0] == "fastmem" else ["fastmem", *parts])


def room_of(module: str) -> str:
    return FRONT_DOOR if module in FRONT_DOOR_MODULES else module.split(".")[1]


def folder_of(module: str, file: str | None) -> str:
    """The folder of a file; a file that lies beside the folders stands for itself."""
    folder = module if file is None or file.endswith("__init__.py") else module.rpartition(".")[0]
    return module if folder == "fastmem" else folder


@dataclass(frozen=True)
class Arrow:
    """One import of one module by another; ``target_file`` is None where no file is that module."""

    file: str
    line: int
    target: str
    target_file: str | None = None

    @property
    def source(self) -> str:
        return module_of(self.file)

    @property
    def room(self) -> str:
        return room_of(self.source)

    @property
    def target_room(self) -> str:
        return room_of(self.target)

    @property
    def folders(self) -> tuple[str, str]:
        return folder_of(self.source, self.file), folder_of(self.target, self.target_file)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.room} imports {self.target} of {self.target_room}"


def imported_names(statement: ast.AST, file: str) -> Iterator[tuple[str, str]]:
    """The names that a statement imports, each with the module that it is taken from."""
    if isinstance(statement, ast.Import):
        yield from ((alias.name, alias.name) for alias in statement.names)
    elif isinstance(statement, ast.ImportFrom):
        module = statement.module or ""
        if statement.level:
            package = module_of(file).split(".")
            up = statement.level - file.endswith("__init__.py")
            module = ".".join([*package[: len(package) - up], *filter(None, [module])])
        yield from ((f"{module}.{alias.name}", module) for alias in statement.names)


def find_arrows(sources: Mapping[str, str]) -> list[Arrow]:
    """The imports of the package's modules in files, given as their text by path, except those of the front door."""
    files = {module_of(file): file for file in sources}
    arrows = {}
    for file, text in sources.items():
        if module_of(file) in FRONT_DOOR_MODULES:
            continue
        for statement in ast.walk(ast.parse(text, file)):
            for name, module in imported_names(statement, file):
                if name.split(".")[0] == "fastmem" and name != VERSION:
                    # the name may be a module, or something that a module holds
                    target = name if name in files else module
                    arrows[Arrow(file, statement.lineno, target, files.get(target))] = None
    return list(arrows)


def list_upward(arrows: list[Arrow]) -> list[str]:
    """Imports that run up; of two rooms that import each other, those of the lower one do."""
    found = []
    for arrow in arrows:
        room, target = arrow.room, arrow.target_room
        if room == target or room not in FLOORS or target not in FLOORS:
            continue
        if target == KERNELS:
            wrong = "" if room == USES_KERNELS else f"which only {USES_KERNELS} may import"
        elif room == KERNELS:
            wrong = f"but {KERNELS} may import no other room"
        else:
            wrong = "which stands above it" if FLOORS[target] < FLOORS[room] else ""
        if wrong:
            found.append(f"{arrow}, {wrong}")
    return found


def list_unknown(arrows: list[Arrow]) -> list[str]:
    return [f"{arrow}, which is not in the list of rooms" for arrow in arrows if arrow.target_room not in FLOORS]


def list_families(arrows: list[Arrow]) -> list[str]:
    return [
        f"{arrow}, but only {' and '.join(KNOWS_FAMILIES)} may know a model family"
        for arrow in arrows
        if arrow.target in FAMILY_MODULES and arrow.room not in KNOWS_FAMILIES
    ]


def list_circles_of_files(arrows: list[Arrow]) -> list[str]:
    return list_circles({(a.source, a.target): a for a in arrows if a.target_file is not None})


def list_circles_of_folders(arrows: list[Arrow]) -> list[str]:
    return list_circles({a.folders: a for a in arrows if len(set(a.folders)) == 2})


def list_circles(edges: Mapping[tuple[str, str], Arrow]) -> list[str]:
    """The shortest circle through each thing that lies on one, unless an earlier one passes through it."""
    after: dict[str, list[str]] = {}
    for one, other in sorted(edges):
        after.setdefault(one, []).append(other)
    found: list[str] = []
    seen: set[str] = set()
    for start in after:
        circle = None if start in seen else shortest_circle(start, after)
        if circle is not None:
            seen.update(circle)
            steps = zip(circle, [*circle[1:], start], strict=True)
            found.append("a circle:\n" + "\n".join(f"  {edges[step]}" for step in steps))
    return found


def shortest_circle(start: str, after: Mapping[str, list[str]]) -> list[str] | None:
    """The way from ``start`` back to itself, without its end; None where there is none."""
    ways, reached = [[start]], {start}
    for way in ways:
        for other in after.get(way[-1], ()):
            if other == start:
                return way
            if other not in reached:
                reached.add(other)
                ways.append([*way, other])
    return None


RULES = {
    "imports run down": list_upward,
    "every import is of a known room": list_unknown,
    "model families stay in their rooms": list_families,
    "files have no circles": list_circles_of_files,
    "folders have no circles": list_circles_of_folders,
}


@pytest.fixture(scope="module")
def package() -> dict[str, str]:
    """The text of every file of the package, by its path in the repository."""
    files = (file for folder in ("fastmem", "kernels") for file in sorted((ROOT / folder).rglob("*.py")))
    return {file.relative_to(ROOT).as_posix(): file.read_text() for file in files}


@pytest.mark.parametrize("list_broken", RULES.values(), ids=RULES)
def test_the_package_keeps_the_rule(package, list_broken: Callable[[list[Arrow]], list[str]]):
    broken = list_broken(find_arrows(package))
    assert not broken, "\n".join(broken)


def test_the_rooms_of_the_package_are_those_of_the_list(package):
    assert {room_of(module_of(file)) for file in package} == set(FLOORS)


STATS = "from fastmem.stats.builder import StatsBuilder"
UPWARD = {
    "up": (
        {"fastmem/stats/a.py": "\nfrom fastmem.ranking.gap import gap"},
        "fastmem/stats/a.py:2: stats",
        "of ranking",
    ),
    "of two that go both ways": (
        {"fastmem/stats/a.py": "import fastmem.data.b", "fastmem/data/b.py": "import fastmem.stats.a"},
        "fastmem/data/b.py:1: data",
        "of stats",
    ),
    "in a function": ({"fastmem/data/a.py": f"def f():\n    {STATS}"}, "fastmem/data/a.py:2: data", "of stats"),
    "for types": ({"fastmem/data/a.py": f"if TYPE_CHECKING:\n    {STATS}"}, "fastmem/data/a.py:2: data", "of stats"),
    "a module by name": ({"fastmem/runs/a.py": "import fastmem.cli.b"}, "fastmem/runs/a.py:1: runs", "of cli"),
    "a relative one": ({"fastmem/runs/a.py": "from ..cli import b"}, "fastmem/runs/a.py:1: runs", "of cli"),
    "from the ground": ({"fastmem/files.py": "import fastmem.runs.folder"}, "fastmem/files.py:1: files", "of runs"),
    "the front door": ({"fastmem/cli/a.py": "from fastmem import UnitStats"}, "cli/a.py:1: cli", "of front door"),
    "kernels by others": (
        {"fastmem/stats/a.py": "import fastmem.kernels.b"},
        "fastmem/stats/a.py:1",
        "only backends may",
    ),
    "out of kernels": (
        {"kernels/a.py": "from fastmem.errors import UsageError"},
        "kernels/a.py:1: kernels",
        "of errors",
    ),
}


@pytest.mark.parametrize(("sources", "place", "rooms"), UPWARD.values(), ids=UPWARD)
def test_an_import_that_runs_up_is_found(sources, place, rooms):
    (found,) = list_upward(find_arrows(sources))
    assert place in found
    assert rooms in found


DOWN = {
    "fastmem/__init__.py": "from fastmem.cli import main",
    "fastmem/cli/a.py": "import os\nfrom fastmem.stats import builder\nfrom fastmem import __version__, errors",
    "fastmem/stats/__init__.py": "from fastmem.stats.builder import StatsBuilder",
    "fastmem/stats/builder.py": "from fastmem.backends import plain",
    "fastmem/backends/plain.py": "from fastmem.kernels.b import c\nfrom fastmem.errors import UsageError",
    "fastmem/demo/a.py": "from fastmem.models import rar",
    "fastmem/models/rar.py": "",
    "fastmem/files.py": "from fastmem.errors import UsageError",
    "fastmem/errors.py": "",
    "kernels/b.py": "from fastmem.kernels.d import e",
}


@pytest.mark.parametrize("list_broken", RULES.values(), ids=RULES)
def test_imports_that_run_down_pass(list_broken: Callable[[list[Arrow]], list[str]]):
    assert list_broken(find_arrows(DOWN)) == []


CIRCLES = {
    "of two files": (
        list_circles_of_files,
        {
            "fastmem/stats/a.py": "\nimport fastmem.stats.b",
            "fastmem/stats/b.py": "def f():\n\n    from fastmem.stats import a",
        },
        ["fastmem/stats/a.py:2: stats imports fastmem.stats.b", "fastmem/stats/b.py:3: stats imports fastmem.stats.a"],
    ),
    "of a file and its package": (
        list_circles_of_files,
        {
            "fastmem/stats/__init__.py": "from fastmem.stats.a import A",
            "fastmem/stats/a.py": "from fastmem.stats import A",
        },
        ["fastmem/stats/__init__.py:1", "fastmem/stats/a.py:1"],
    ),
    "of two files of the ground": (
        list_circles_of_files,
        {"fastmem/files.py": "import fastmem.errors", "fastmem/errors.py": "import fastmem.files"},
        ["fastmem/files.py:1", "fastmem/errors.py:1"],
    ),
    "of three folders": (
        list_circles_of_folders,
        {
            "fastmem/cli/a.py": "import fastmem.stats.a",
            "fastmem/stats/b.py": "import fastmem.data.a",
            "fastmem/data/b.py": "import fastmem.cli.b",
            "fastmem/runs/a.py": "import fastmem.cli.a",
            **dict.fromkeys(("fastmem/stats/a.py", "fastmem/data/a.py", "fastmem/cli/b.py"), ""),
        },
        ["fastmem/cli/a.py:1: cli", "fastmem/stats/b.py:1: stats", "fastmem/data/b.py:1: data"],
    ),
}


@pytest.mark.parametrize(("list_found", "sources", "places"), CIRCLES.values(), ids=CIRCLES)
def test_a_circle_is_found(list_found, sources, places):
    (found,) = list_found(find_arrows(sources))
    assert len(found.splitlines()) == 1 + len(places)
    for place in places:
        assert place in found


def test_a_room_that_is_not_in_the_list_is_found():
    (found,) = list_unknown(find_arrows({"fastmem/cli/a.py": "from fastmem.attic import box"}))
    assert found.startswith("fastmem/cli/a.py:1: cli imports fastmem.attic of attic")


@pytest.mark.parametrize("statement", ["from fastmem.models import rar", "from fastmem.models.rar import RAR"])
def test_a_model_family_outside_its_rooms_is_found(statement):
    sources = {"fastmem/report/a.py": statement, "fastmem/demo/a.py": statement, "fastmem/models/rar.py": ""}
    (found,) = list_families(find_arrows(sources))
    assert found.startswith("fastmem/report/a.py:1: report imports fastmem.models.rar of models")
