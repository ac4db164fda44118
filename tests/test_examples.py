"""The scripts in examples/: they run as a reader would run them, and use the public names alone."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastmem
from fastmem.cli import COMMANDS
from tests.conftest import ROOT

SCRIPT = ROOT / "examples" / "score_my_images.py"


def run_script(place: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def my_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one embedded picture of every class."""
    folder = tmp_path_factory.mktemp("examples") / "my-images"
    source = fastmem.embedded_source("train")
    for index in np.unique(source.labels, return_index=True)[1]:
        file = folder / str(source.names[index])
        file.parent.mkdir(parents=True)
        source.read(int(index)).save(file)
    return folder


def test_own_images_are_scored_and_the_highest_units_shown(my_images):
    place = my_images.parent
    found = run_script(place, "--data", "my-images", "--out", "mine", "--views", "center")
    assert found.returncode == 0, found.stderr
    assert "41 images, 8 blocks of 768 units" in found.stdout
    rows = re.findall(r"^ +(\d+) +(\d+) +([01]\.\d+)  (\S+)$", found.stdout, re.MULTILINE)
    assert len(rows) == 10
    assert len({(block, unit) for block, unit, _, _ in rows}) == 10
    scores = [float(unitmem) for _, _, unitmem, _ in rows]
    assert scores == sorted(scores, reverse=True)
    assert all((my_images / name).is_file() for *_, name in rows)
    assert all((place / "mine" / name).is_file() for name in ("run.json", "units.parquet", "top-images.png"))
    # a later stage finds the images where they are
    assert fastmem.open_run(place / "mine").train.count == 41
    advice = found.stdout.partition("What to do next")[2]
    assert set(re.findall(r"fastmem (\w+)", advice)) <= COMMANDS.keys()
    assert "scoring 41 images" in found.stderr


def test_an_error_is_one_sentence(tmp_path):
    found = run_script(tmp_path, "--data", "nowhere")
    assert (found.returncode, found.stdout) == (fastmem.InputFileError.exit_code, "")
    assert len(found.stderr.splitlines()) == 1
    assert found.stderr.startswith("expected a folder of images at nowhere")


@pytest.mark.parametrize("script", sorted(SCRIPT.parent.glob("*.py")), ids=lambda script: script.name)
def test_examples_use_public_names_alone(script):
    tree = ast.parse(script.read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not [name for name in imported if name.startswith("fastmem.")]
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "fastmem"
    }
    assert used
    assert used <= set(fastmem.__all__)
