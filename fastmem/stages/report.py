"""The report as a stage: everything that a run has found, as one HTML page that needs no network."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from fastmem.errors import InputFileError, UsageError
from fastmem.files import read_json
from fastmem.mitigation.edit_file import load_edit
from fastmem.ranking.gap import Gap, gap
from fastmem.report.extraction_report import keep_verdicts, read_completions
from fastmem.report.page.documents import EvaluationDocument, ExtractionDocument, ScoreDocument, SweepDocument
from fastmem.report.page.page import write_page
from fastmem.report.page.story import FinishedExtraction, Story
from fastmem.reporter import SILENT, Reporter
from fastmem.runs.folder import RESULT_SCHEMA, RunInputs
from fastmem.stages import evaluate, extract, sweep
from fastmem.stages.extract import COMPLETIONS, ExtractionResult
from fastmem.stages.opened_run import CAUTION, OpenedRun

Document = TypeVar("Document")
# name of the page in the run folder, and how many targets of an extraction have pictures
PAGE, MOST_DECODED = "report.html", 400


def report(
    run: OpenedRun,
    out: str | os.PathLike[str] | None = None,
    images: bool = True,
    *,
    pictures: int = MOST_DECODED,
    reporter: Reporter = SILENT,
) -> Path:
    """Write the page of a run: what was found beside its controls, the units, the images, and how to repeat it.

    A stage that has not run yet is named with its command in the place of its part.

    Args:
        run: the run.
        out: the HTML file; None for report.html in the run folder.
        images: show pictures; without them the page has names and numbers alone.
        pictures: how many targets of an extraction are shown with pictures, the most similar first.
        reporter: is told what is read and left out.

    Returns: the path of the page.

    Raises: UsageError for a page that cannot be written; InputFileError for a file of the run that is missing, damaged
    or of another run.
    """
    if pictures < 0:
        raise UsageError(f"expected at least 0 targets with pictures, got {pictures}: leave it out for {MOST_DECODED}")
    path = run.path / PAGE if out is None else Path(out)
    if path.is_dir():
        raise UsageError(f"expected an HTML file to write, got the folder {path}: name a file in it")
    story = read_story(run)
    for name in story.unfinished:
        reporter.note(f"left out, because it is not finished: {name}")
    left_out = write_page(path, story, images, pictures)
    if left_out:
        reporter.note(f"{left_out:,} pictures are left out, so that the page stays small")
    return path


def read_story(run: OpenedRun) -> Story:
    """Read everything that the stages have left in a run. Raises: InputFileError, as ``report``."""
    folder, owner = run.folder, {"run_id": run.id}
    stats = run.stats()
    extractions = []
    folders = sorted(path for path in (folder.path / "extractions").glob("*") if path.is_dir())
    for path in folders:
        if (path / "result.json").exists():
            extractions.append(_extraction(run, path))
    evaluations = [
        _read(path, evaluate.SCHEMA, EvaluationDocument, owner)
        for path in sorted((folder.path / "evaluations").glob("*.json"))
    ]
    swept = folder.path / "sweep" / "sweep.json"
    return Story(
        path=folder.path,
        identity=run.identity,
        inputs=RunInputs.load(folder, run.id),
        model=run.model,
        sources=run.sources,
        manifests=run.manifests,
        stats=stats,
        losses={split: losses for split in run.manifests if (losses := run.losses(split)) is not None},
        gap=_gap(run),
        score=_read(folder.result_file, RESULT_SCHEMA, ScoreDocument, owner),
        extractions=tuple(sorted(extractions, key=_first)),
        evaluations=tuple(sorted(evaluations, key=lambda e: e.edit is not None)),
        edits=tuple(load_edit(folder, path.stem, run.id) for path in sorted(folder.edits_folder.glob("*.safetensors"))),
        sweep=_read(swept, sweep.SCHEMA, SweepDocument, owner) if swept.exists() else None,
        unfinished=tuple(str(path) for path in folders if not (path / "result.json").exists()),
        caution=CAUTION,
    )


def _first(extraction: FinishedExtraction) -> tuple[bool, int, str]:
    """Sort key: the unedited model before edits, and longer prefixes before shorter ones."""
    return extraction.document.edit is not None, -max(extraction.document.prefixes), extraction.name


def _read(path: Path, schema: str, kind: type[Document], owner: Mapping[str, Any]) -> Document:
    """A stage's document as a dataclass. Raises: InputFileError where it is missing, damaged or another run's."""
    return msgspec.convert(read_json(path, schema, kind, owner), kind)


def _extraction(run: OpenedRun, path: Path) -> FinishedExtraction:
    entries = read_json(path / "result.json", extract.SCHEMA, ExtractionDocument, {"run_id": run.id})
    document = msgspec.convert(entries, ExtractionDocument)
    keys = [str(prefix) for prefix in document.prefixes]
    if not keys or any(set(counted) != set(keys) for counted in document.by_prefix):
        raise InputFileError(
            f"expected counts for the prefixes {', '.join(keys) or '(at least one)'} in {path / 'result.json'}, got "
            "others: extract again"
        )
    counts = {prefix: document.extracted[str(prefix)] for prefix in document.prefixes}
    table = ExtractionResult(path, entries).verdicts
    verdicts = keep_verdicts(table, path / "verdicts.parquet", counts, document.threshold, run.manifests)
    kept = path / COMPLETIONS
    completions = read_completions(kept, run.id, verdicts) if kept.exists() else None
    return FinishedExtraction(path.name, document, verdicts, completions)


def _gap(run: OpenedRun) -> Gap | None:
    """The gap of every unit; None where there is no held-out set that matches, or folds are too small."""
    if run.heldout is None:
        return None
    try:
        return gap(run.train, run.heldout)
    except UsageError:
        return None
