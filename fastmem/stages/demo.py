"""The demo as a stage: the embedded model on the embedded images, and what it knows of each dose of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastmem.data.sources import embedded_source
from fastmem.demo.controls import membership_by_dose, ownership
from fastmem.demo.extraction import ALL_IMAGES, extraction_by_dose, totals
from fastmem.demo.memorisation import GroupRow, an_eighth, dose_table
from fastmem.errors import UsageError
from fastmem.extraction.extract import Extraction
from fastmem.extraction.verdicts import Count, SSCDJudge
from fastmem.index.build import build_index
from fastmem.index.search import EmbeddingIndex
from fastmem.models.checkpoints import load_model
from fastmem.models.registry import entries
from fastmem.ranking.ownership import GroupShare
from fastmem.reporter import QUIET, SILENT, Reporter
from fastmem.runs.folder import out_folder
from fastmem.scoring.membership import Membership
from fastmem.stages.extract import run_extraction
from fastmem.stages.opened_run import EditInForce, OpenedRun, open_run
from fastmem.stages.options import USUAL_SSCD, AttackOptions
from fastmem.stages.score import ScoredRun, score
from fastmem.tokens.cache import AUTO


@dataclass(frozen=True, eq=False)
class DoseExtraction:
    """What comes back when every image is tried.

    Attributes:
        judge: who decided.
        threshold: above this similarity an image counts as extracted.
        prefixes: lengths in tokens.
        counts: extracted of every group of images, for each prefix.
        picture: where the shares by dose are drawn.
    """

    judge: str
    threshold: float
    prefixes: Sequence[int]
    counts: dict[str, list[Count]]
    picture: Path


@dataclass(frozen=True, eq=False)
class DemoResult:
    """What the demo found; all but the scores only where everything was asked for.

    Attributes:
        scored: what the pass found.
        known: what greedy generation knows of each dose.
        membership: how well the loss tells images of each dose from held-out ones.
        owned: what images of each dose own of the highest units, by ranking.
        extracted: what comes back when every image is tried.
    """

    scored: ScoredRun
    known: list[GroupRow] = field(default_factory=list)
    membership: dict[str, dict[str, Membership]] = field(default_factory=dict)
    owned: dict[str, list[GroupShare]] = field(default_factory=dict)
    extracted: DoseExtraction | None = None


def demo(
    model: str | None = None,
    full: bool = False,
    out: str | os.PathLike[str] | None = None,
    reporter: Reporter = QUIET,
) -> DemoResult:
    """Score an embedded model on the embedded images.

    Args:
        model: name of an embedded model; None takes the first.
        full: also find what the model knows of the images of each dose, and try to extract every image.
        out: run folder; None makes one below the current folder.
        reporter: is told plans, what is done, and what a person should know.

    Raises: UsageError for a model that is not embedded; else as ``score``.
    """
    name = _choose(model)
    loaded = load_model(name)
    sources = {split: embedded_source(split) for split in ("train", "heldout")}
    with out_folder(name, out) as folder:
        scored = score(
            loaded,
            sources["train"],
            heldout=sources["heldout"],
            out=folder,
            per_image=True,
            unconditional=True,
            token_cache=AUTO,
            reporter=reporter,
        )
    # a pass with a run folder leaves a document
    assert isinstance(scored, ScoredRun)
    if not full:
        return DemoResult(scored)
    run = open_run(
        scored.document["run"], data=sources["train"], heldout=sources["heldout"], model=loaded, reporter=reporter
    )
    reporter.note(f"generating from the first {an_eighth(loaded)} of the {loaded.num_tokens} tokens of every image")
    return DemoResult(
        scored,
        dose_table(loaded, cache=run.cache),
        membership_by_dose(scored, run.manifests["train"]),
        ownership(scored, run.manifests),
        extract_everything(run, AttackOptions(ALL_IMAGES), reporter),
    )


def extract_everything(run: OpenedRun, attack: AttackOptions, reporter: Reporter = SILENT) -> DoseExtraction:
    """Try to extract every image of a run over the embedded images, and draw the shares by dose."""
    from fastmem.report.extraction_pictures import draw_dose_response

    judge = attack.choose_judge(USUAL_SSCD, str(run.model.device), reporter)
    index = None
    if isinstance(judge, SSCDJudge):
        reporter.note("embedding the training images, where they are not yet")
        index = EmbeddingIndex(build_index(run.sources["train"], judge.embedder, reporter=reporter).path)
    prefixes = run.model.prefixes
    found: Extraction = run_extraction(
        run, EditInForce(), judge, index, prefixes, attack.top_per_class, reporter=reporter
    )
    by_dose = extraction_by_dose(found, run.manifests["train"])
    picture = run.path / "dose-response.png"
    draw_dose_response(picture, by_dose, found.prefixes, f"{run.model.name}: extracted, by {found.judge}")
    return DoseExtraction(found.judge, found.threshold, found.prefixes, by_dose | totals(found), picture)


def _choose(name: str | None) -> str:
    embedded = [entry.name for entry in entries().values() if entry.embedded]
    if name is None:
        return embedded[0]
    if name not in embedded:
        raise UsageError(f"expected an embedded model out of {', '.join(embedded)}, got {name!r}")
    return name
