"""RAR-B and VAR-d16 at full size, with regenerated weights in the official formats: heavy, run in CI."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastmem.models.checkpoints import build_networks
from fastmem.models.registry import find_entry
from tests.conftest import AS_BUILT, recipe

pytestmark = pytest.mark.heavy


# blocks, units, segments
SIZES = {"rar-b": (24, 3072, ["last", "last-trained"]), "var-d16": (16, 4096, [f"scale{k}" for k in range(1, 11)])}


@pytest.fixture(scope="module", params=SIZES)
def model(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def home(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FASTMEM_HOME with a model's official files, filled by the recipe."""
    place = tmp_path_factory.mktemp("home")
    entry = find_entry(model)
    (place / "weights").mkdir()
    for network, file in zip(build_networks(entry), (entry.generator_file, entry.tokenizer_file), strict=True):
        torch.save(recipe.fill(network.state_dict(), AS_BUILT), place / "weights" / file.name)
    return place


def run_python(home: Path, *arguments: str) -> str:
    environment = os.environ | {"FASTMEM_HOME": str(home)}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_score_takes_official_files_from_end_to_end(model, home, tmp_path):
    for i, pixels in enumerate(recipe.images("end-to-end", 16, 256)):
        place = tmp_path / "data" / f"n{i % 4:08d}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{i}.JPEG")
    arguments = ["score", "--model", model, "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    # the regenerated weights know nothing of classes, so their order cannot be checked
    options = ["--views", "center", "--batch-size", "4", "--no-class-check", "--json"]
    document = json.loads(run_python(home, "-m", "fastmem", *arguments, *options))
    layers, units, segments = SIZES[model]
    assert (document["images"], document["layers"], document["units"]) == (16, layers, units)
    assert document["segments"] == segments
    for picture in document["pictures"]:
        assert Path(picture).stat().st_size > 10_000


PEAK = """
import importlib, resource, sys, torch, fastmem
from fastmem.models.registry import find_entry
importlib.import_module(find_entry(sys.argv[1]).module)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = fastmem.load_model(sys.argv[1], device="cpu")
# touch every weight, as a pass does
total = sum(float(p.sum()) for n in (model.generator, model.tokenizer) for p in n.parameters())
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
size = sum(p.numel() * p.element_size() for n in (model.generator, model.tokenizer) for p in n.parameters())
print((after - before) * 1024 / size)
"""


def test_loading_takes_the_weights_size_in_memory_once(model, home):
    assert float(run_python(home, "-c", PEAK, model)) < 1.1
