"""Extraction as a stage: candidates of a scored run are attacked, judged, and kept in the run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from fastmem.data.manifest import Manifest
from fastmem.errors import UsageError
from fastmem.extraction.association import find_associations
from fastmem.extraction.attack import BATCH_ROWS
from fastmem.extraction.candidates import TOP_PER_CLASS, collect_losses, progress_file
from fastmem.extraction.extract import Extraction, check_prefixes
from fastmem.extraction.extract import extract as attack_and_judge
from fastmem.extraction.verdicts import Judge, SSCDJudge
from fastmem.files import read_table, write_json
from fastmem.index.build import default_index_folder
from fastmem.index.search import EmbeddingIndex
from fastmem.mitigation.edit_file import EditPlan
from fastmem.report.extraction_report import describe, write_completions, write_verdicts
from fastmem.reporter import QUIET, SILENT, Reporter, Work
from fastmem.runs.owner import owned
from fastmem.stages.index import IndexResult
from fastmem.stages.opened_run import EditInForce, OpenedRun, edited
from fastmem.stages.options import USUAL_SSCD, AttackOptions, SSCDOptions
from fastmem.stages.result import StageResult, read_document, settings_digest, settings_document

if TYPE_CHECKING:
    import pyarrow

SCHEMA = "fastmem.extraction/1"
# what the pictures of a page are decoded from
COMPLETIONS = "completions.safetensors"
# the columns of a table of verdicts that are never empty
VERDICT_COLUMNS = {
    "id": "int64",
    "set": "string",
    "class": "string",
    "label": "int64",
    "name": "string",
    "candidate": "bool",
    "matched": "bool",
    "candidate_score": "float",
    "prefix": "int32",
    "token_match": "double",
    "similarity": "float",
    "extracted": "bool",
    "group": "int64",
}


@dataclass(frozen=True)
class ExtractSettings:
    """What determines an extraction; its folder is named after a hash of this.

    Attributes:
        prefixes: lengths in tokens.
        top_per_class: candidates of every class.
        judge: name of who decides.
        threshold: above this similarity a target counts as extracted.
        index: id of the index that was searched; None without an index.
        batch_size: rows of tokens that are completed at once.
        dtype: the generator's.
        device: kind of device.
        checkpoint: SHA-256 of the generator, with its edit.
        tokenizer: SHA-256 of the tokenizer.
    """

    prefixes: tuple[int, ...]
    top_per_class: int
    judge: str
    threshold: float
    index: str | None
    batch_size: int
    dtype: str
    device: str
    checkpoint: str
    tokenizer: str


class DocumentShape(TypedDict):
    """The entries of result.json that are read again."""

    extracted: dict[str, int]
    extracted_original: dict[str, int | None]
    candidates: int
    threshold: float
    settings: dict[str, Any]


class ExtractionResult(StageResult):
    """The verdicts of an extraction; ``path`` is its folder in the run."""

    @property
    def extracted(self) -> dict[int, int]:
        """How many candidates were extracted, by prefix length in tokens."""
        return {int(prefix): int(count) for prefix, count in self.document["extracted"].items()}

    @property
    def verdicts(self) -> pyarrow.Table:
        """One row for every target and prefix; ``write_verdicts`` says what the columns are.

        Raises: InputFileError where the file is missing or damaged, or is another extraction's.
        """
        owner = _table_owner(self.document["run_id"], self.document["settings"])
        return read_table(self.path / "verdicts.parquet", "verdicts", VERDICT_COLUMNS, owner, more=True)


def _table_owner(run: str, settings: dict[str, Any]) -> dict[str, str]:
    """Entries of a table of verdicts that say which extraction it is of."""
    return {"fastmem.run": run, "fastmem.settings": settings_digest(settings)}


def extract(
    run: OpenedRun,
    edit: str | EditPlan | None = None,
    index: str | os.PathLike[str] | IndexResult | None = None,
    prefixes: Sequence[int] | None = None,
    top_per_class: int = TOP_PER_CLASS,
    judge: str = "auto",
    threshold: float | None = None,
    resume: bool = False,
    *,
    sscd: SSCDOptions = USUAL_SSCD,
    batch_size: int = BATCH_ROWS,
    workers: int | None = None,
    reporter: Reporter = QUIET,
) -> ExtractionResult:
    """Pull training images out of the model of a scored run, and judge what comes back.

    Candidates are the images of every class that the model predicts best. Each is completed from its first tokens,
    without guidance or sampling. The same is done with the run's held-out images. An extraction that the run has
    already is read.

    Args:
        run: the run.
        edit: the edit to attack under: a name in the run, a file, or a plan; None attacks the unedited model.
        index: of the training set, in which every completion is searched; None takes the set's own where it was made.
        prefixes: lengths in tokens; None takes the model's ladder.
        top_per_class: how many candidates of every class.
        judge: "sscd", "tokens" or "auto"; see ``AttackOptions``.
        threshold: a completion that is more alike its target than this counts as extracted; see ``AttackOptions``.
        resume: go on with an extraction that was interrupted.
        sscd: which SSCD model compares pictures.
        batch_size: rows of tokens that are completed at once.
        workers: processes that decode images; None chooses by cores.
        reporter: is told the plan, candidates that are done, and what a person should know.

    Raises: UsageError for options that do not fit, an unfinished extraction where ``resume`` is off, or an edited model
    whose run has no candidates yet; InputFileError for a missing or damaged file. KeyboardInterrupt keeps what is done.
    """
    options = AttackOptions(top_per_class, judge, threshold)
    lengths = tuple(run.model.prefixes if prefixes is None else prefixes)
    check_prefixes(run.model, lengths)
    with edited(run, edit, reporter) as in_force:
        chosen = options.choose_judge(sscd, str(run.model.device), reporter)
        searched = find_index(run, index, chosen, reporter)
        settings = ExtractSettings(
            lengths,
            top_per_class,
            chosen.name,
            chosen.threshold,
            None if searched is None else searched.header.id,
            batch_size,
            **run.weights(),
        )
        asked = settings_document(settings)
        folder = run.folder.extraction_folder(f"{in_force.label}-{settings_digest(asked)}")
        with owned(folder, "extract"):
            file = folder / "result.json"
            if file.exists():
                reporter.note(f"{folder} has this extraction already")
                document = read_document(file, SCHEMA, DocumentShape, {"run_id": run.id, "settings": asked})
                # they stay where a process is killed between its last two steps
                shutil.rmtree(folder / "units", ignore_errors=True)
                return ExtractionResult(folder, document)
            if (folder / "settings.json").exists() and not resume:
                raise UsageError(
                    f"expected no unfinished extraction in {folder}, got one: go on with --resume, or remove the folder"
                )
            write_json(folder / "settings.json", {"schema": SCHEMA, **asked})
            found = run_extraction(
                run,
                in_force,
                chosen,
                searched,
                lengths,
                top_per_class,
                folder=folder / "units",
                batch_size=batch_size,
                workers=workers,
                reporter=reporter,
            )
            return ExtractionResult(folder, _finish(run, in_force, found, folder, asked))


def find_index(
    run: OpenedRun, index: str | os.PathLike[str] | IndexResult | None, judge: Judge, reporter: Reporter = SILENT
) -> EmbeddingIndex | None:
    """Open the index that was named, or else the training set's own where it was made; None without an embedder.

    Args:
        run: the run.
        index: folder of an index, or what ``index`` returned; None for the training set's own.
        judge: who decides; one that compares tokens searches nothing.
        reporter: is told where images are missing from the index, or the index itself.

    Raises: UsageError for an index without an embedder, of another one, or of other images;
    InputFileError for a damaged one.
    """
    path = index.path if isinstance(index, IndexResult) else index
    if not isinstance(judge, SSCDJudge):
        if path is not None:
            raise UsageError("expected an SSCD model with --index, got verdicts by tokens: leave it out")
        return None
    if path is None:
        # an index is of a whole folder, a run may have taken some of its images
        whole = Manifest.build(run.sources["train"])
        try:
            path = default_index_folder(whole, judge.embedder)
        except UsageError as error:
            reporter.note(f"no index of the training set: {error}")
            return None
        if not (path / "index.json").exists():
            reporter.note(
                "no index of the training set: what comes back is compared with its target alone (`fastmem index`)"
            )
            return None
    opened = EmbeddingIndex(Path(path), str(run.model.device), reporter.note)
    opened.check_embedder(judge.embedder)
    missing = int((~opened.contains(run.manifests["train"].ids)).sum())
    if missing == len(run.manifests["train"]):
        raise UsageError(
            f"expected an index of the training set, got {path}, which has none of its images: name another one, or "
            "leave it out"
        )
    if missing:
        reporter.note(f"{missing:,} of {len(run.manifests['train']):,} training images are not in the index {path}")
    return opened


def candidate_scores(run: OpenedRun, workers: int | None = None, reporter: Reporter = SILENT) -> dict[str, np.ndarray]:
    """Candidate scores of every image of a run by set, float [N]: of its scoring pass, or of a pass of their own.

    Raises: UsageError where that pass is missing and the model is edited.
    """
    missing = [split for split in run.manifests if run.losses(split) is None]
    if missing and run.model.edits:
        raise UsageError(
            "expected candidates of the unedited model, got none in the run: extract without an edit first"
        )
    if missing:
        count = sum(len(run.manifests[split]) for split in missing)
        reporter.planned(
            Work(
                count,
                sentence=f"looking for candidates among {count:,} images, because the run was scored without "
                "--per-image",
            )
        )
        for split in missing:
            collect_losses(
                run.model,
                run.sources[split],
                run.manifests[split],
                run.folder.losses_file(split),
                workers=workers,
                cache=run.cache,
                owner=run.owner(split),
                reporter=reporter,
            )
    for split in run.manifests:
        # a pass that was killed between its last two steps
        progress_file(run.folder.losses_file(split)).unlink(missing_ok=True)
    return {split: losses.hits for split in run.manifests if (losses := run.losses(split)) is not None}


def run_extraction(
    run: OpenedRun,
    edit: EditInForce,
    judge: Judge,
    index: EmbeddingIndex | None,
    prefixes: tuple[int, ...],
    top_per_class: int,
    *,
    folder: Path | None = None,
    batch_size: int = BATCH_ROWS,
    workers: int | None = None,
    reporter: Reporter = SILENT,
) -> Extraction:
    """Attack the candidates of a run.

    Args:
        run: the run, its model edited already.
        edit: the edit in force, whose images are left out.
        judge: who decides.
        index: in which completions are searched; None searches nothing.
        prefixes: lengths in tokens.
        top_per_class: candidates of every class.
        folder: where finished work units lie; None keeps them in memory.
        batch_size: rows of tokens that are completed at once.
        workers: processes that decode images.
        reporter: is told the plan and candidates that are done.

    Raises: as ``fastmem.extraction.extract.extract``.
    """
    scores = candidate_scores(run, workers, reporter)
    matched = None
    if "heldout" in run.manifests:
        matched, _ = run.manifests["train"].match(run.manifests["heldout"], run.identity["settings"]["seed"])
    return attack_and_judge(
        run.model,
        run.sources,
        run.manifests,
        scores,
        judge,
        index=index,
        prefixes=prefixes,
        top_per_class=top_per_class,
        matched=None if matched is None or matched.all() else matched,
        without=edit.chosen_on,
        folder=folder,
        batch_size=batch_size,
        cache=run.cache,
        workers=workers,
        reporter=reporter,
    )


def _finish(
    run: OpenedRun, edit: EditInForce, found: Extraction, folder: Path, settings: dict[str, Any]
) -> dict[str, Any]:
    """Write table, pictures and result.json; the work units go. Returns the document."""
    from fastmem.report.extraction_pictures import draw_extractions, draw_similarities

    associations = find_associations(found, run.train, run.heldout)
    table, grid, histogram = (folder / f for f in ("verdicts.parquet", "extracted.png", "similarities.png"))
    document = {
        "run": str(run.path),
        "run_id": run.id,
        "edit": edit.name,
        **describe(found, associations),
        "settings": settings,
        **edit.caution,
        "tables": [str(table)],
        "pictures": [str(grid), str(histogram)],
    }
    title = edit.title(run.model)
    write_verdicts(table, found, run.manifests, _table_owner(run.id, settings))
    write_completions(folder / COMPLETIONS, found, run.id)
    draw_extractions(grid, run.model, run.sources["train"], found, title)
    draw_similarities(histogram, found, title)
    write_json(folder / "result.json", {"schema": SCHEMA} | document)
    shutil.rmtree(folder / "units", ignore_errors=True)
    return document
