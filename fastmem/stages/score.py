"""Scoring as a stage: the pass over the images, and what a run folder keeps of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fastmem.data.sources import ImageSource
from fastmem.errors import UsageError
from fastmem.files import read_json
from fastmem.models.model import Model
from fastmem.report.score_report import ScoreFindings, find, write_report
from fastmem.reporter import QUIET, SILENT, Reporter
from fastmem.runs.folder import RESULT_SCHEMA, RunFolder, RunInputs, run_id
from fastmem.runs.ranks import current_ranks, shared, was_restarted
from fastmem.scoring.score import ScoreResult, score_images
from fastmem.scoring.settings import BATCH_VIEWS, ScoreSettings
from fastmem.scoring.shard import Shard
from fastmem.tokens.cache import AUTO, OFF


@dataclass(frozen=True, eq=False)
class ScoredRun(ScoreResult):
    """What a scoring pass found and left in its run folder.

    Attributes:
        findings: the highest units, and the controls.
        document: what ``fastmem score --json`` prints.
    """

    findings: ScoreFindings
    document: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """What ``fastmem score --json`` prints."""
        return dict(self.document)


def score(
    model: Model,
    source: ImageSource,
    *,
    heldout: ImageSource | None = None,
    views: int | str = 10,
    segments: Sequence[str] | None = None,
    per_class: int | None = None,
    batch_size: int | None = None,
    backend: str = "auto",
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    seed: int = 0,
    check_classes: bool = True,
    activation: str = "post",
    class_rows: str = "auto",
    per_image: bool = False,
    unconditional: bool = False,
    workers: int | None = None,
    token_cache: str | os.PathLike[str] | None = None,
    pictures: bool = True,
    shard: tuple[int, int] | None = None,
    reporter: Reporter = QUIET,
) -> ScoreResult:
    """Statistics of every unit's response to the images of a training set, and to held-out images beside them.

    A held-out set is cut to the classes of the training set and, per class, to the number of images that it has; the
    training images that match it are also kept apart in ``train.matched``.

    Args:
        model: the model.
        source: the training images.
        heldout: images that were not trained on.
        views: how many views of each image, or "center" for the centre view alone.
        segments: names of segments; None for the model's default ones.
        per_class: images of each class, drawn evenly; None for all.
        batch_size: views of one forward pass, rounded down to whole images, at least one; None for 80.
        backend: "auto", or the name of one: "torch", "cpp", "triton".
        out: run folder, which ``open_run`` opens; None keeps the result in memory.
        resume: go on in a run folder whose pass was interrupted.
        seed: draws the folds and the images taken of each class.
        check_classes: refuse images whose class order does not fit the checkpoint.
        activation: "post" takes responses after the GELU, "pre" before it.
        class_rows: "keep" keeps the statistics of every class, "drop" only their summary; "auto" keeps them up to
            2 GiB.
        per_image: keep each image's loss and candidate hits on its centre view, for membership inference and
            extraction.
        unconditional: keep its loss without a class too.
        workers: processes that decode images; None chooses by cores.
        token_cache: folder where tokens are kept for later passes; "auto" takes the one in ``FASTMEM_HOME``, None and
            "off" keep none.
        pictures: draw the run folder's pictures, too.
        shard: (i, n) scores only the i-th of n slices of the classes, from 1, for ``merge``; None scores all images.
        reporter: is told the plan, images that are done, and what a person should know.

    Raises: UsageError for options that do not fit model or data, a folder that cannot be written or holds another run;
    InputFileError for a damaged run folder, or where a run folder was asked for and not one image can be read.
    KeyboardInterrupt leaves a folder from which ``resume`` goes on.
    """
    settings = ScoreSettings(
        views,
        tuple(segments) if segments else None,
        per_class,
        batch_size or BATCH_VIEWS,
        activation,
        class_rows,
        seed,
        per_image,
        unconditional,
    )
    part = None if shard is None else Shard(*_pair(shard))
    if out is None and current_ranks() is not None:
        raise UsageError("expected a run folder that all ranks of the job share, got none: name it with out=")
    with shared(Path(out), "score") if out is not None else nullcontext() as ranks:
        resume = resume or was_restarted()
        found = score_images(
            model,
            {"train": source} | ({} if heldout is None else {"heldout": heldout}),
            settings,
            backend=backend,
            out=None if out is None else Path(out),
            resume=resume,
            check_classes=check_classes,
            workers=workers,
            token_cache=None if token_cache is None else os.fspath(token_cache),
            reporter=reporter if ranks is None or ranks.leads else SILENT,
            ranks=ranks,
            shard=part,
        )
        if out is None:
            return found
        folder = RunFolder(Path(out))
        if ranks is not None and not ranks.leads:
            ranks.wait_for(ranks.key("end"))
            return ScoredRun(
                **{f.name: getattr(found, f.name) for f in fields(found)},
                findings=find(found),
                document=read_json(folder.result_file, RESULT_SCHEMA),
            )
        _inputs(model, source, heldout, token_cache).save(folder, run_id(folder.identity()))
        document, findings = write_report(model.name, source, folder, found, settings.views, pictures)
        return ScoredRun(
            **{f.name: getattr(found, f.name) for f in fields(found)}, findings=findings, document=document
        )


def _pair(shard: object) -> tuple[int, int]:
    if not isinstance(shard, (tuple, list)) or len(shard) != 2:
        raise UsageError(f"expected shard as (i, n), the i-th of n slices from 1, got {shard!r}")
    return shard[0], shard[1]


def _inputs(
    model: Model, source: ImageSource, heldout: ImageSource | None, token_cache: str | os.PathLike[str] | None
) -> RunInputs:
    """What a later stage needs to find weights and images again, wherever it is called from."""
    checkpoint, tokenizer = model.checkpoint_file, model.tokenizer_file
    return RunInputs(
        model.name,
        None if checkpoint is None else os.path.abspath(checkpoint),
        None if tokenizer is None else os.path.abspath(tokenizer),
        source.place,
        None if heldout is None else heldout.place,
        data_split=source.split,
        heldout_split=None if heldout is None else heldout.split,
        token_cache=_cache_of_later_stages(token_cache),
    )


def _cache_of_later_stages(where: str | os.PathLike[str] | None) -> str:
    # a caller who says nothing has not asked that later stages encode everything again
    if where is None:
        return AUTO
    return os.fspath(where) if where in (AUTO, OFF) else os.path.abspath(where)
