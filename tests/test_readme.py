"""README.md and docs/: the ten lines of Python run, and links, commands, options and names are real ones."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import pytest

import fastmem
from fastmem.cli import cli
from tests.conftest import ROOT

README = ROOT / "README.md"
USAGE = ROOT / "docs" / "usage.md"
TOP_PAGES = (README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md")
PAGES = (*TOP_PAGES, *sorted((ROOT / "docs").glob("*.md")))
MOST_LINES, LONGEST_LINE = 150, 120
MARKER = "<!-- tested: tests/test_readme.py -->"
# no page has to name these
OF_CLICK = {"--help", "-h", "--version"}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
each_reference = pytest.mark.parametrize("page", [README, USAGE], ids=lambda page: page.name)


def marked_code() -> list[str]:
    """The lines of code in the block after the marker."""
    (block,) = re.findall(re.escape(MARKER) + r"\n```python\n(.*?)```", README.read_text(), re.DOTALL)
    return [line for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Any], Path]]:
    """What the ten lines leave: their names, and the run folder."""
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        place = tmp_path_factory.mktemp("readme")
        patch.chdir(place)
        exec(compile("\n".join(marked_code()), str(README), "exec"), names)
        yield names, place / "runs" / "first"


def test_the_example_has_ten_lines_of_code():
    code = marked_code()
    assert len(code) == 10
    assert not [line for line in code if line.lstrip().startswith("#") or ";" in line]


def test_the_example_scores(ran):
    names, folder = ran
    left = ("run.json", "result.json", "units.parquet", "images.parquet", "train.safetensors", "heldout.safetensors")
    assert all((folder / name).is_file() for name in (*left, "top-images.png", "unitmem-by-block.png"))
    stats = names["scored"].train
    assert stats.count == names["model"].num_classes
    unitmem = stats.unitmem()
    assert 0 <= float(unitmem.min()) < float(unitmem.max()) <= 1


def test_the_example_extracts(ran):
    names, folder = ran
    (verdicts,) = folder.glob("extractions/unedited-*/verdicts.parquet")
    assert verdicts.with_name("result.json").is_file()
    assert verdicts.with_name("extracted.png").is_file()
    ((prefix, count),) = names["found"].extracted.items()
    classes = names["model"].num_classes
    # pictures that were shown 16 times are among them
    assert (prefix, 0 < count < classes) == (8, True)
    assert names["found"].verdicts.num_rows == 2 * classes


def test_the_example_mitigates(ran):
    names, folder = ran
    (file,) = folder.glob("edits/*.safetensors")
    model, edit = names["model"], names["edit"]
    assert len(edit) == round(0.05 * model.num_layers * model.num_units)
    assert fastmem.EditPlan.load(file).equals(edit)
    # the stages undo it
    assert not names["run"].model.edits


def test_the_example_evaluates(ran):
    names, folder = ran
    (file,) = folder.glob("evaluations/*.json")
    assert not file.name.startswith("unedited")
    metrics = names["quality"].metrics
    assert 0 < metrics["loss_train"] < metrics["loss_heldout"] < 10


def test_the_readme_is_short():
    lines = README.read_text().splitlines()
    assert len(lines) < MOST_LINES
    assert not [line for line in lines if len(line) > LONGEST_LINE]


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What links can point at inside a page: its headings in lower case, spaces as dashes, without other marks."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@each_page
def test_links_and_pictures_are_there(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    wrong = []
    for target in targets:
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        place = page.parent / path if path else page
        if not place.exists() or (anchor and anchor not in anchors(place)):
            wrong.append(target)
    assert not wrong


def test_the_readme_links_to_what_there_is():
    assert len(re.findall(r"\]\(docs/", README.read_text())) >= 5
    assert {page.name for page in PAGES if page.parent.name == "docs"} >= {
        "architecture.md",
        "metrics.md",
        "performance.md",
        "results.md",
        "run-folder.md",
        "usage.md",
    }


@pytest.mark.parametrize("page", [*TOP_PAGES[:2], ROOT / "docs" / "architecture.md"], ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page):
    named = re.findall(r"`([\w./-]+\.(?:py|md|cpp|cu|json|zip))`", prose(page))
    # what a run leaves is named too, and has no place here
    of_runs = {"run.json", "result.json", "inputs.json"}
    places = (ROOT, ROOT / "fastmem", ROOT / "fastmem" / "models", ROOT / "fastmem" / "backends", ROOT / "kernels")
    missing = [
        name
        for name in named
        if "NAME" not in name and name not in of_runs and not any((place / name).exists() for place in places)
    ]
    assert not missing


def options_by_command() -> dict[str, set[str]]:
    """The options of every command, by walking the command line."""
    with click.Context(cli) as ctx:
        commands = {name: cli.get_command(ctx, name) for name in cli.list_commands(ctx)}
    return {
        name: {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
        for name, command in commands.items()
    }


def shell_code(page: Path) -> Iterator[tuple[str, str, bool]]:
    """Code of a page that is no Python: the text, the command whose section it is in, and whether a table has it."""
    section, fence = "", None
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            fence = None if fence is not None else line.removeprefix("```")
        elif fence is not None:
            if fence != "python":
                yield line.split("#")[0], section, False
        elif line.startswith("## "):
            found = re.fullmatch(r"## fastmem (\w+)", line)
            section = found[1] if found else ""
        else:
            yield from ((code, section, line.startswith("|")) for code in re.findall(r"`([^`]+)`", line))


@each_reference
def test_commands_and_options_exist(page):
    known = options_by_command()
    anywhere = set().union(*known.values()) | OF_CLICK
    wrong = []
    for code, section, in_table in shell_code(page):
        command = re.search(r"(?<![\w./-])(?:\.venv/bin/)?fastmem ([a-z]+)", code)
        if command and command[1] not in known:
            wrong.append(code)
            continue
        owner = command[1] if command else section if in_table else ""
        allowed = known[owner] | OF_CLICK if owner in known else anywhere
        wrong += [f"{owner} {option}" for option in re.findall(r"(?<!\S)--[a-z][a-z-]*", code) if option not in allowed]
    assert not wrong


def test_usage_names_every_command_and_option():
    code = [code for code, _, _ in shell_code(USAGE)]
    named = {option for text in code for option in re.findall(r"--[a-z][a-z-]*", text)}
    known = options_by_command()
    assert not set().union(*known.values()) - OF_CLICK - named
    assert not [name for name in known if f"fastmem {name}" not in code]


def calls(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Functions of the package that a page calls, with the names of their keyword arguments."""
    text = page.read_text()
    for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("fastmem."):
                yield ast.unparse(node.func).split(".")[1], [word.arg for word in node.keywords]
    for name, arguments in re.findall(r"`fastmem\.(\w+)\(([^`]*)\)`", prose(page)):
        yield name, re.findall(r"(\w+)=", arguments)


@each_reference
def test_functions_take_the_arguments_they_are_shown_with(page):
    for name, keywords in calls(page):
        assert set(keywords) <= set(inspect.signature(getattr(fastmem, name)).parameters), name


@each_page
def test_names_of_the_package_exist(page):
    named = set(re.findall(r"\bfastmem\.([A-Za-z_]\w*)", page.read_text()))
    assert not [name for name in named if not hasattr(fastmem, name) and find_spec(f"fastmem.{name}") is None]
