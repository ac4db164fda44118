"""RAR-B at its full size, with regenerated weights in the official format: heavy, run in CI."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import recipe
from PIL import Image

from fastmem.models.checkpoints import build_networks
from fastmem.models.registry import find_entry

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FASTMEM_HOME with rar_b.bin and its tokenizer, filled by the recipe."""
    place = tmp_path_factory.mktemp("home")
    entry = find_entry("rar-b")
    (place / "weights").mkdir()
    for network, file in zip(build_networks(entry), (entry.generator_file, entry.tokenizer_file), strict=True):
        torch.save(recipe.fill(network.state_dict()), place / "weights" / file.name)
    return place


def run_python(home: Path, *arguments: str) -> str:
    environment = os.environ | {"FASTMEM_HOME": str(home)}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_score_takes_official_files_from_end_to_end(home, tmp_path):
    for i, pixels in enumerate(recipe.images("end-to-end", 16, 256)):
        place = tmp_path / "data" / f"n{i % 4:08d}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{i}.JPEG")
    arguments = ["score", "--model", "rar-b", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    # the regenerated weights know nothing of classes, so their order cannot be checked
    options = ["--views", "center", "--batch-size", "4", "--no-class-check", "--json"]
    document = json.loads(run_python(home, "-m", "fastmem", *arguments, *options))
    assert (document["images"], document["layers"], document["units"]) == (16, 24, 3072)
    assert document["segments"] == ["last", "last-trained"]
    for picture in document["pictures"]:
        assert Path(picture).stat().st_size > 10_000


PEAK = """
import resource, torch, fastmem
from fastmem.models import rar
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = fastmem.load_model("rar-b", device="cpu")
# touch every weight, as a pass does
total = sum(float(p.sum()) for n in (model.generator, model.tokenizer) for p in n.parameters())
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
size = sum(p.numel() * p.element_size() for n in (model.generator, model.tokenizer) for p in n.parameters())
print((after - before) * 1024 / size)
"""


def test_loading_takes_the_weights_size_in_memory_once(home):
    assert float(run_python(home, "-c", PEAK)) < 1.1
