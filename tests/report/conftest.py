"""A small run with every stage and with names that are markup, for the tests of its page."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from PIL import Image

import fastmem
from fastmem.report.page.story import Story
from fastmem.stages.report import read_story
from tests.conftest import FakeEmbedder, make_toy_model, random_images

# together with the names of their files the second ends a script, and the third acts on a picture that fails
CLASSES = ("plain", "x<", "<img src=x onerror=window.hacked=1>")
FILES = (
    "<script>window.hacked=1;",
    "script><script>window.hacked=1;<b>",
    "a&amp;'\"{{ 7*7 }}%{y}",
    "\u732b <b>bold\u202e",
)


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
        for i, pixels in enumerate(random_images(12, 16, seed)):
            place = folder / split / CLASSES[i % 3]
            place.mkdir(parents=True, exist_ok=True)
            name = f"{FILES[i // 3]}{'' if split == 'train' else 'held'}.png"
            Image.fromarray(pixels).save(place / name)
            names.append(f"{CLASSES[i % 3]}/{name}")
    model = make_toy_model()
    train, heldout = (fastmem.FolderSource(folder / split) for split in ("train", "heldout"))
    fastmem.score(
        model, train, heldout=heldout, views=2, check_classes=False, per_image=True, pictures=False, out=folder / "run"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastmem.stages.options.find_embedder", lambda *a, **k: (FakeEmbedder(), "a fake SSCD model"))
        run = fastmem.open_run(folder / "run", model=model)
        index = fastmem.index(train)
        fastmem.mitigate(run, top=0.05, name="halved")
        fastmem.mitigate(run, top=0.05, by="random", name="drawn")
        for edit in (None, "halved", "drawn"):
            fastmem.extract(run, edit, index, [0, 3], top_per_class=3)
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
