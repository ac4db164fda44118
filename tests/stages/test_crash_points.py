"""A stage that is killed at a boundary of a write goes on, and leaves the files of an undisturbed one.

What a killed process leaves is a copy of the folder at that moment: half-written files stay, and so does the file that
says who works there. The folder holds the run and the caches of its stages.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import fastmem
from fastmem import ArraySource, InputFileError, UsageError, files, open_run
from fastmem.stages.opened_run import OpenedRun
from tests.conftest import FakeEmbedder, folder_bytes, random_images, write_folder

# a process with this number is never there
NOBODY = 2**22 + 1
Work = Callable[[OpenedRun, bool], object]


def extract(run: OpenedRun, resume: bool) -> None:
    fastmem.extract(run, prefixes=[0, 2], top_per_class=3, judge="sscd", resume=resume, workers=0)


def mitigate(run: OpenedRun, resume: bool) -> None:
    target = run.path / "edited.safetensors"
    fastmem.mitigate(run, by="attribution", top=0.2, save_to=None if resume and target.exists() else target)


def evaluate(run: OpenedRun, resume: bool) -> None:
    fastmem.evaluate(run, samples=7, batch_size=3, png=True, features="sscd", resume=resume, workers=0)


def sweep(run: OpenedRun, resume: bool) -> None:
    options = {"fractions": (0.2,), "seeds": 1, "declared_seeds": 2, "re_attack": (0.2,), "samples": 5, "batch_size": 3}
    fastmem.sweep(run, by=("random", "matched"), judge="sscd", top_per_class=2, resume=resume, **options)


STAGES = {stage.__name__: stage for stage in (extract, mitigate, evaluate, sweep)}


@pytest.fixture(scope="module")
def scored(toy_model, toy_source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of the toy model over 23 images, with 9 held out, scored without losses of images."""
    root = tmp_path_factory.mktemp("scored")
    fastmem.score(toy_model, toy_source, heldout=heldout(), views=2, check_classes=False, out=root / "run", workers=0)
    return root


def heldout() -> ArraySource:
    return ArraySource(random_images(9, 16, seed=5), np.array([0] * 4 + [1] * 2 + [3] * 3))


@pytest.fixture
def root(scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, in which the caches of the stages lie, too; all work is cut into many small writes."""
    folder = Path(shutil.copytree(scored, tmp_path / "root"))
    monkeypatch.setenv("FASTMEM_HOME", str(folder / "home"))
    monkeypatch.setattr(
        "fastmem.stages.options.find_embedder", lambda *args, **kwargs: (FakeEmbedder(), "a fake SSCD model")
    )
    monkeypatch.setattr("fastmem.extraction.extract.UNIT_TARGETS", 2)
    monkeypatch.setattr("fastmem.extraction.candidates.SAVE_SECONDS", -1)
    monkeypatch.setattr("fastmem.quality.reference.PART", 4)
    # how long a row took differs between any two
    monkeypatch.setattr("fastmem.sweep.table.time.monotonic", lambda: 0.0)
    return folder


def do(work: Work, root: Path, model, source, resume: bool) -> None:
    """Do a stage's work as a command would: the run is opened first."""
    work(open_run(root / "run", model=model, data=source, heldout=heldout()), resume)


def spread(count: int, most: int) -> list[int]:
    """At most so many of the numbers below count, evenly."""
    return sorted({round(i * (count - 1) / max(1, min(count, most) - 1)) for i in range(min(count, most))})


def as_another_process_left_it(root: Path) -> None:
    """Its owners are dead, and its half-written files have not been touched for a while."""
    for file in root.rglob(".owner-*"):
        file.write_text(file.read_text().replace(f'"process": {os.getpid()}', f'"process": {NOBODY}'))
    before = time.time() - 2 * 3600
    for file in root.rglob("*.partial"):
        os.utime(file, (before, before))


def copy_at_boundaries(root: Path, copies: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Copy the folder at every boundary, into a folder with its number; returns the boundaries that are passed."""
    passed: list[str] = []

    def copy(place: str) -> None:
        # no file is written to twice, so that links are copies
        shutil.copytree(root, copies / str(len(passed)), copy_function=os.link)
        passed.append(place)

    monkeypatch.setattr(files, "at_boundary", copy)
    return passed


def check_same(found: dict[str, bytes], whole: dict[str, bytes], place: str) -> None:
    """Nothing is left over, and all files are the same but cached tokens, of which a resumed pass keeps fewer."""
    assert [name for name in found if ".partial" in name or ".owner" in name] == [], place
    sides = [
        {name: content for name, content in side.items() if not name.startswith("home/tokens/")}
        for side in (found, whole)
    ]
    assert sides[0].keys() == sides[1].keys(), place
    assert [name for name in sides[1] if sides[0][name] != sides[1][name]] == [], place


def kill_at_boundaries(work: Work, root: Path, images, copies: Path, monkeypatch, most: int | None) -> int:
    """Compare what every kill and a resumption leave with undisturbed work; returns how many boundaries there are."""
    with monkeypatch.context() as patched:
        passed = copy_at_boundaries(root, copies, patched)
        do(work, root, *images, False)
    whole = folder_bytes(root)
    for number in spread(len(passed), most or len(passed)):
        shutil.rmtree(root)
        shutil.copytree(copies / str(number), root)
        as_another_process_left_it(root)
        do(work, root, *images, True)
        check_same(folder_bytes(root), whole, passed[number])
    return len(passed)


# least number of boundaries that there are, and how many of them are tried where not all are
BOUNDARIES = {"extract": (20, 5), "mitigate": (20, 5), "evaluate": (50, 5), "sweep": (50, 4)}


@pytest.mark.parametrize("stage", BOUNDARIES)
def test_a_stage_that_is_killed_at_a_write_goes_on(toy_model, toy_source, root, tmp_path, monkeypatch, stage):
    least, most = BOUNDARIES[stage]
    images = toy_model, toy_source
    assert kill_at_boundaries(STAGES[stage], root, images, tmp_path / "copies", monkeypatch, most) >= least


@pytest.mark.heavy
@pytest.mark.parametrize("stage", BOUNDARIES)
def test_a_stage_can_be_killed_at_every_write(toy_model, toy_source, root, tmp_path, monkeypatch, stage):
    kill_at_boundaries(STAGES[stage], root, (toy_model, toy_source), tmp_path / "copies", monkeypatch, None)


def fill_disk_at(number: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """From the boundary with this number on there is no room; returns the boundaries that are passed."""
    passed: list[str] = []

    def full(place: str) -> None:
        passed.append(place)
        if len(passed) > number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "at_boundary", full)
    return passed


@pytest.mark.parametrize("stage", BOUNDARIES)
def test_a_full_disk_is_one_sentence_and_loses_nothing(toy_model, toy_source, root, tmp_path, monkeypatch, stage):
    images, start = (toy_model, toy_source), tmp_path / "start"
    shutil.copytree(root, start)
    with monkeypatch.context() as patched:
        passed = fill_disk_at(10**9, patched)
        do(STAGES[stage], root, *images, False)
    whole = folder_bytes(root)
    for number in spread(len(passed), 2):
        shutil.rmtree(root)
        shutil.copytree(start, root)
        with monkeypatch.context() as patched:
            fill_disk_at(number, patched)
            with pytest.raises(UsageError, match="No space left on device: choose another --out or make room"):
                do(STAGES[stage], root, *images, False)
        do(STAGES[stage], root, *images, True)
        check_same(folder_bytes(root), whole, passed[number])


def test_a_folder_is_taken_again_where_no_image_could_be_read(toy_model, tmp_path):
    pictures = write_folder(tmp_path / "pictures", random_images(6, 16))
    good = folder_bytes(pictures)
    for name in good:
        (pictures / name).write_bytes(b"broken")
    for _ in range(2):
        with pytest.raises(InputFileError, match="got 6 that cannot, the first class-0"):
            fastmem.score(
                toy_model,
                fastmem.FolderSource(pictures),
                views="center",
                check_classes=False,
                out=tmp_path / "run",
                workers=0,
            )
        assert not (tmp_path / "run").exists()
    with pytest.raises(InputFileError, match="expected the folder of a scored run"):
        open_run(tmp_path / "run", model=toy_model)
    for name, content in good.items():
        (pictures / name).write_bytes(content)
    found = fastmem.score(
        toy_model, fastmem.FolderSource(pictures), views="center", check_classes=False, out=tmp_path / "run", workers=0
    )
    assert found.train.count == 6


@pytest.mark.parametrize("stage", ["extract", "evaluate", "sweep"])
def test_images_that_change_after_they_were_listed_end_no_stage_in_a_traceback(
    toy_model, root, tmp_path, monkeypatch, stage
):
    shutil.rmtree(root / "run")
    sets = {name: write_folder(tmp_path / name, random_images(12, 16, seed)) for seed, name in enumerate(("a", "b"))}
    fastmem.score(
        toy_model,
        fastmem.FolderSource(sets["a"]),
        heldout=fastmem.FolderSource(sets["b"]),
        views="center",
        check_classes=False,
        out=root / "run",
    )
    run = open_run(root / "run", model=toy_model)
    shutil.rmtree(root / "home", ignore_errors=True)
    for pictures in sets.values():
        files_there = sorted(pictures.rglob("*.png"))
        files_there[0].unlink()
        files_there[1].write_bytes(files_there[2].read_bytes()[:40])
        files_there[3].unlink()
        files_there[3].mkdir()
    STAGES[stage](run, False)


def test_a_folder_that_is_removed_in_the_middle_is_said_so(toy_model, toy_source, root, monkeypatch):
    with monkeypatch.context() as patched:

        def remove(place: str) -> None:
            if place == "after train-00001.safetensors":
                shutil.rmtree(root / "run" / "extractions")

        patched.setattr(files, "at_boundary", remove)
        with pytest.raises(UsageError, match="expected .* to stay .* got it removed"):
            do(extract, root, toy_model, toy_source, False)
    do(extract, root, toy_model, toy_source, True)
