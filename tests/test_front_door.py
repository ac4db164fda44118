"""The names that the package offers: three lists that agree, loaded on first use, stages beside rooms of one name."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from importlib import import_module

import pytest

import fastmem
from tests.conftest import ROOT

# what was offered before this list was made, and what the stages are called
PROMISED = (
    "ArraySource Edit EditPlan FastmemError FolderSource InputFileError ScoreResult Selection UnitStats UsageError "
    "ZipSource assemble attribution embedded_source gap load_model membership model_names owners reliability responses "
    "scale_units score select open_run index extract mitigate evaluate sweep Reporter"
)


def test_the_three_lists_of_names_are_equal():
    tree = ast.parse((ROOT / "fastmem" / "__init__.py").read_text())
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    imported = {
        alias.asname or alias.name: node.module
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == fastmem._HOMES
    assert fastmem.__all__ == sorted(fastmem._HOMES)
    assert set(PROMISED.split()) <= set(fastmem.__all__)
    assert set(fastmem.__all__) <= set(dir(fastmem))


@pytest.mark.parametrize("name", fastmem.__all__)
def test_a_name_is_what_its_home_has(name):
    found, own = getattr(fastmem, name), getattr(import_module(fastmem._HOMES[name]), name)
    # some are decorated, and a room that is called wraps its stage
    assert inspect.unwrap(found) is inspect.unwrap(own)
    assert inspect.getdoc(own)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'scores'"):
        fastmem.scores  # noqa: B018


@pytest.mark.parametrize("first", ["fastmem.sweep.table", "fastmem.index.build", "fastmem.stages.sweep"])
def test_stages_and_rooms_of_one_name_are_both_there(first):
    check = f"""
import importlib, inspect
import fastmem
importlib.import_module({first!r})
import fastmem.index as first, fastmem.sweep as second
for name, room in (("index", first), ("sweep", second)):
    stage = getattr(importlib.import_module(f"fastmem.stages.{{name}}"), name)
    assert getattr(fastmem, name) is room and callable(room)
    assert inspect.signature(room) == inspect.signature(stage)
    try:
        room()
    except TypeError as error:
        assert "missing" in str(error)
    else:
        raise SystemExit("nothing was missing")
"""
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
