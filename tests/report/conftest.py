"""A small run with every stage and with names that are markup, for the tests of its page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

import fastmem
from fastmem.report.page.story import Story
from fastmem.stages.report import read_story
from tests.conftest import FakeEmbedder, exit_code, random_images

# together with the names of their files the second ends a script, and the third acts on a picture that fails
CLASSES = ("plain", "x<", "<img src=x onerror=window.hacked=1>")
FILES = ("<script>window.hacked=1;", "script><script>window.hacked=1;<b>", "a&amp;'\"{{ 7*7 }}%{y}", "\u732b <b>bold")


@dataclass(frozen=True, eq=False)
class HostileRun:
    """A run whose class and file names are markup, opened, and the names of its images."""

    run: fastmem.OpenedRun
    names: tuple[str, ...]

    def story(self) -> Story:
        """What the page tells of it."""
        return read_story(self.run)


@pytest.fixture(scope="session")
def hostile_run(tmp_path_factory: pytest.TempPathFactory) -> HostileRun:
    folder = tmp_path_factory.mktemp("hostile")
    names = []
    for seed, split in enumerate(("train", "heldout")):
        for i, pixels in enumerate(random_images(12, 64, seed)):
            place = folder / split / CLASSES[i % 3]
            place.mkdir(parents=True, exist_ok=True)
            name = f"{FILES[i // 3]}{'' if split == 'train' else 'held'}.png"
            Image.fromarray(pixels).save(place / name)
            names.append(f"{CLASSES[i % 3]}/{name}")
    options = ("--model", "rar-tiny", "--views", "center", "--no-class-check", "--per-image", "--out", folder / "run")
    assert exit_code("score", *options, "--data", folder / "train", "--heldout", folder / "heldout") == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastmem.stages.options.find_embedder", lambda *a, **k: (FakeEmbedder(), "a fake SSCD model"))
        run = fastmem.open_run(folder / "run", device="cpu")
        index = fastmem.index(run.sources["train"])
        fastmem.mitigate(run, top=0.05, name="halved")
        fastmem.mitigate(run, top=0.05, by="random", name="drawn")
        for edit in (None, "halved", "drawn"):
            fastmem.extract(run, edit, index, [0, 63], top_per_class=3)
            fastmem.evaluate(run, edit, samples=6)
        fastmem.sweep(
            run,
            by=("unitmem", "random"),
            fractions=(0.02, 0.05),
            seeds=2,
            declared_seeds=2,
            equal_quality=(),
            samples=6,
            top_per_class=3,
        )
    return HostileRun(run, tuple(names))
