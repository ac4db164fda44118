"""Merging as a stage: finished runs over different images become one run folder, for all stages after scoring."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from fastmem.data.sources import ImageSource
from fastmem.errors import FastmemError, InputFileError, UsageError
from fastmem.files import OWNER_PREFIX
from fastmem.report.score_report import write_report
from fastmem.reporter import QUIET, Reporter, Work, size
from fastmem.runs.folder import RunFolder, check_writable
from fastmem.runs.owner import owned
from fastmem.runs.ranks import in_job
from fastmem.scoring.merge import Whole
from fastmem.scoring.parts import as_paths, open_parts
from fastmem.stages.opened_run import open_again
from fastmem.stages.score import ScoredRun


def merge(
    runs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    pictures: bool = True,
    reporter: Reporter = QUIET,
) -> ScoredRun:
    """Make one run of several: all shards of a job, or runs over different images with equal model and settings.

    The new run is as one that was scored in one piece: counts, largest responses and image ids are the same, means and
    variances equal to rounding. The order of ``runs`` changes nothing. The folder is there whole or not at all.

    Args:
        runs: folders of the finished runs.
        out: folder of the new run, which must not be there, or be empty.
        pictures: draw the run folder's pictures, too; the images are read where the runs found them.
        reporter: is told the plan, statistics that are read, and what a person should know.

    Raises: UsageError for runs that do not make one, which it names, or a folder that cannot be written; InputFileError
    where a run is missing, unfinished or damaged.
    """
    if in_job():
        raise UsageError("expected one process to merge, got several ranks: call it without torchrun")
    # a link is followed, so that the folder it names is replaced and not the link
    place = Path(os.path.realpath(out))
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise UsageError(
            f"expected a new folder for the merged run, got {out}, which is not empty: choose another --out"
        )
    check_writable(place)
    whole = Whole.of(open_parts(as_paths(runs)))
    making = place.with_name(f".{place.name}.merging")
    images = sum(map(len, whole.manifests.values()))
    sentence = f"merging {len(whole.parts)} runs of {images:,} images, about {size(_bytes(whole))} on disk"
    with owned(making, "merge"):
        # what a killed process left
        _clear(making)
        try:
            reporter.planned(Work(sum(len(part.manifests) for part in whole.parts), "sets", sentence))
            folder = RunFolder(making)
            whole.write(folder, reporter.advance)
            found = whole.result(folder)
            if not found.train.count:
                raise InputFileError(
                    f"expected images that can be read in {len(whole.parts)} runs, got none: see their result.json"
                )
            source = _source(whole, reporter) if pictures else None
            document, findings = write_report(
                whole.identity["model"],
                source,
                folder,
                found,
                whole.identity["settings"]["views"],
                pictures,
                Path(out),
            )
        except BaseException:
            _clear(making)
            raise
    try:
        os.replace(making, place)
    except OSError as error:
        shutil.rmtree(making, ignore_errors=True)
        raise UsageError(
            f"expected to be able to make the folder {out}, got {error.strerror or error}: choose another --out"
        ) from error
    # class rows are read when they are needed, from where they are now
    found = whole.result(RunFolder(Path(out)))
    return ScoredRun(
        **{field.name: getattr(found, field.name) for field in fields(found)}, findings=findings, document=document
    )


def _check_new(place: Path) -> None:
    """Raises: UsageError where a folder is not new, or cannot be made."""
    try:
        taken = any(place.iterdir()) if os.path.isdir(place) else os.path.lexists(place)
        check_writable(place)
    except OSError as error:
        raise UsageError(
            f"expected a new folder for the merged run, got {place} ({error.strerror or error}): choose another --out"
        ) from error
    if taken:
        raise UsageError(
            f"expected a new folder for the merged run, got {place}, which is not empty: choose another --out"
        )


def _bytes(whole: Whole) -> int:
    """Return about how many bytes the new run takes: class rows add up, and sums of all images are there once."""
    folders = [part.folder for part in whole.parts]
    rows = sum(file.stat().st_size for folder in folders for file in folder.path.glob("*.classes/*"))
    return rows + sum(folders[0].stats_file(split).stat().st_size for split in whole.parts[0].manifests)


def _source(whole: Whole, reporter: Reporter) -> ImageSource | None:
    """Return the training images; None where they cannot be opened here, which takes nothing from the statistics."""
    manifest = whole.manifests["train"]
    try:
        source = open_again(whole.inputs, "train", None, whole.inputs.classes or manifest.classes)
        manifest.found_in(source)
    except FastmemError as error:
        reporter.note(f"no picture of the images behind the highest units: {error}")
        return None
    return source


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif not path.name.startswith(OWNER_PREFIX):
            path.unlink()
