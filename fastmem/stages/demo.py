"""The demo as a stage: a whole study of an embedded model, and what it knows of each dose of its images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastmem.data.sources import embedded_source
from fastmem.demo.controls import membership_by_dose, ownership
from fastmem.demo.extraction import ALL_IMAGES, extraction_by_dose, totals
from fastmem.demo.lessons import lessons
from fastmem.demo.memorisation import GroupRow, an_eighth, dose_table
from fastmem.errors import UsageError
from fastmem.extraction.candidates import TOP_PER_CLASS
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
from fastmem.stages.evaluate import evaluate
from fastmem.stages.extract import extract, run_extraction
from fastmem.stages.mitigate import mitigate
from fastmem.stages.opened_run import EditInForce, OpenedRun, open_run
from fastmem.stages.options import USUAL_SSCD, AttackOptions
from fastmem.stages.report import read_story, report
from fastmem.stages.score import ScoredRun, score
from fastmem.tokens.cache import AUTO
from fastmem.tokens.true_images import MOST_IMAGES


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
class Doses:
    """What a model knows of the images of each dose.

    Attributes:
        known: what greedy generation knows.
        membership: how well the loss tells images of each dose from held-out ones.
        owned: what images of each dose own of the highest units, by ranking.
        extracted: what comes back when every image is tried.
    """

    known: list[GroupRow]
    membership: dict[str, dict[str, Membership]]
    owned: dict[str, list[GroupShare]]
    extracted: DoseExtraction


@dataclass(frozen=True, eq=False)
class DemoResult:
    """What the demo found with one model.

    Attributes:
        scored: what the pass found.
        lessons: five sentences.
        page: the HTML page with everything.
        doses: what is known of each dose; None where not everything was asked for.
    """

    scored: ScoredRun
    lessons: list[str]
    page: Path
    doses: Doses | None = None


@dataclass(frozen=True)
class DemoSettings:
    """How much a demo does.

    Attributes:
        views: of each image.
        top_per_class: how many images of each class are attacked.
        longest_only: attack from the longest prefix alone.
        samples: images that are sampled to measure quality.
        loss_images: images of each set whose loss is taken.
    """

    views: int | str
    top_per_class: int
    longest_only: bool
    samples: int | None
    loss_images: int


# a few minutes on two cores, or all there is
QUICK = DemoSettings("center", 2, True, 123, 192)
FULL = DemoSettings(10, TOP_PER_CLASS, False, None, MOST_IMAGES)
# the edit, and as many random units as its control
EDITS = {"top-halved": "unitmem", "random-halved": "random"}


def demo(
    model: str | None = None,
    full: bool = False,
    out: str | os.PathLike[str] | None = None,
    reporter: Reporter = QUIET,
) -> DemoResult:
    """Go through a whole study of an embedded model: score, extract, mitigate, extract again, evaluate, report.

    Args:
        model: name of an embedded model; None takes the first.
        full: use all views and prefixes, and also find what the model knows of the images of each dose.
        out: run folder; None makes one below the current folder.
        reporter: is told plans, what is done, and what a person should know.

    Raises: UsageError for a model that is not embedded; else as the stages.
    """
    name = _choose(model)
    settings = FULL if full else QUICK
    loaded = load_model(name)
    sources = {split: embedded_source(split) for split in ("train", "heldout")}
    with out_folder(name, out) as folder:
        scored = score(
            loaded,
            sources["train"],
            heldout=sources["heldout"],
            views=settings.views,
            out=folder,
            per_image=True,
            unconditional=full,
            token_cache=AUTO,
            reporter=reporter,
        )
    # a pass with a run folder leaves a document
    assert isinstance(scored, ScoredRun)
    run = open_run(
        scored.document["run"], data=sources["train"], heldout=sources["heldout"], model=loaded, reporter=reporter
    )
    _study(run, settings, reporter)
    doses = _find_doses(run, scored, reporter) if full else None
    page = report(run, reporter=reporter)
    return DemoResult(scored, lessons(read_story(run), loaded.num_tokens), page, doses)


def _study(run: OpenedRun, settings: DemoSettings, reporter: Reporter) -> None:
    """Extract, mitigate, extract again, and evaluate, with as many random units as a control beside the edit."""
    prefixes = run.model.prefixes[-1:] if settings.longest_only else run.model.prefixes
    judge = AttackOptions().choose_judge(USUAL_SSCD, str(run.model.device), reporter)
    if isinstance(judge, SSCDJudge):
        reporter.note("embedding the training images, where they are not yet")
        build_index(run.sources["train"], judge.embedder, reporter=reporter)
    plans = [mitigate(run, by=by, name=name, reporter=reporter) for name, by in EDITS.items()]
    for plan in (None, *plans):
        reporter.note(f"extracting {'from the model as it is' if plan is None else f'under the edit {plan.name}'}")
        edit = None if plan is None else plan.name
        extract(run, edit, prefixes=prefixes, top_per_class=settings.top_per_class, reporter=reporter)
    for plan in (None, *plans):
        reporter.note(f"sampling {'the model as it is' if plan is None else f'under the edit {plan.name}'}")
        edit = None if plan is None else plan.name
        evaluate(run, edit, samples=settings.samples, loss_images=settings.loss_images, reporter=reporter)


def _find_doses(run: OpenedRun, scored: ScoredRun, reporter: Reporter) -> Doses:
    model = run.model
    reporter.note(f"generating from the first {an_eighth(model)} of the {model.num_tokens} tokens of every image")
    return Doses(
        dose_table(model, cache=run.cache),
        membership_by_dose(scored, run.manifests["train"]),
        ownership(scored, run.manifests),
        extract_everything(run, AttackOptions(ALL_IMAGES), reporter),
    )


def embedded_models() -> list[str]:
    """Names of the models that come with the package."""
    return [entry.name for entry in entries().values() if entry.embedded]


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
    embedded = embedded_models()
    if name is None:
        return embedded[0]
    if name not in embedded:
        raise UsageError(f"expected an embedded model out of {', '.join(embedded)}, got {name!r}")
    return name
