"""Evaluation as a stage: image quality of a scored model, edited or not, kept in the run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from fastmem.data.sources import EMBEDDED
from fastmem.files import write_json
from fastmem.mitigation.edit_file import EditPlan
from fastmem.models.registry import entries
from fastmem.quality.evaluate import Evaluation
from fastmem.quality.evaluate import evaluate as sample_and_compare
from fastmem.quality.features import FeatureExtractor, Reference
from fastmem.quality.losses import read_loss_images
from fastmem.quality.samples import BATCH
from fastmem.quality.sampling import EvaluationSettings
from fastmem.reporter import SILENT, Reporter
from fastmem.stages.opened_run import EditInForce, OpenedRun, edited
from fastmem.stages.options import USUAL_SSCD, SamplingOptions, SSCDOptions
from fastmem.stages.quality_inputs import FeatureOptions, find_references
from fastmem.stages.result import StageResult, read_document, settings_digest, settings_document
from fastmem.tokens.true_images import MOST_IMAGES, TrueImages

SCHEMA = "fastmem.evaluation/1"
PUBLISHED_SAMPLES, EMBEDDED_PER_CLASS = 50_000, 10
COPYING = (
    "the reference are training images: samples that copy them score better, so it cannot tell quality from memory"
)


@dataclass(frozen=True)
class EvaluateSettings:
    """What determines an evaluation; its file is named after a hash of this.

    Attributes:
        checkpoint: SHA-256 of the generator, with its edit.
        tokenizer: SHA-256 of the tokenizer.
        dtype: the generator's.
        device: kind of device.
        samples: how many.
        seed: of the samples.
        batch_size: how many are drawn at once.
        pictures: whether samples are written as PNG files, too.
        features: name and SHA-256 of each network.
        references: content hash of each reference.
        loss_images: how many images of each set give a loss, at the most.
    """

    checkpoint: str
    tokenizer: str
    dtype: str
    device: str
    samples: int
    seed: int
    batch_size: int
    pictures: bool
    features: tuple[tuple[str, str], ...]
    references: tuple[str, ...]
    loss_images: int


class DocumentShape(TypedDict):
    """The entries of an evaluation's document that are read again."""

    samples: int
    metrics: dict[str, float | None]
    settings: dict[str, Any]


class EvaluationResult(StageResult):
    """Image quality; ``path`` is the document's file in the run."""

    @property
    def metrics(self) -> dict[str, float]:
        """Numbers by name, such as fid, kd-sscd, loss_heldout."""
        return dict(self.document["metrics"])


def evaluate(
    run: OpenedRun,
    edit: str | EditPlan | None = None,
    reference: str | os.PathLike[str] | None = None,
    samples: int | None = None,
    resume: bool = False,
    *,
    features: str = "auto",
    inception: str | None = None,
    sscd: SSCDOptions = USUAL_SSCD,
    loss_images: int = MOST_IMAGES,
    png: bool = False,
    seed: int = 0,
    batch_size: int = BATCH,
    workers: int | None = None,
    reporter: Reporter = SILENT,
) -> EvaluationResult:
    """Measure image quality: samples against real images, and how well real images are predicted.

    Samples are drawn as published, with the model's own guidance, in the proportions of the reference's classes or,
    against a statistics file, as many of every class. An evaluation that the run has already is read.

    Args:
        run: the run.
        edit: the edit to evaluate: a name in the run, a file, or a plan; None for the unedited model.
        reference: "heldout", "train", a folder or zip of images, or a .npz file with arrays mu and sigma; None for
            "heldout".
        samples: how many; None for 50,000, of an embedded model 10 of every class.
        resume: go on from samples that are there.
        features: by which networks samples are compared; see ``FeatureOptions``.
        inception: file of torch-fidelity's Inception weights; None for the one in FASTMEM_HOME.
        sscd: which SSCD model.
        loss_images: how many images of each set give a loss, at the most.
        png: write every sample as a PNG file, too.
        seed: of the samples.
        batch_size: samples that are drawn at once, which changes the draws.
        workers: processes that decode images; None chooses by cores.
        reporter: is told plans, what is done, and what a person should know.

    Raises: UsageError for options that do not fit, a reference that the run lacks, or unfinished samples where
    ``resume`` is off; InputFileError for a missing or damaged file. KeyboardInterrupt keeps the samples that were made.
    """
    sampling = SamplingOptions(samples, seed, batch_size)
    options = FeatureOptions(features, inception, sscd)
    with edited(run, edit, reporter) as in_force:
        extractors = options.find(str(run.model.device), reporter)
        named = None if reference is None else os.fspath(reference)
        references = find_references(run, named, extractors, workers=workers, reporter=reporter)
        for description in dict.fromkeys(r.description for r in references):
            reporter.note(f"reference: {description}")
        if any(r.train for r in references):
            reporter.note(COPYING)
        own = EvaluationSettings(sampling.samples or default_samples(run), seed, batch_size, png)
        weights = run.weights()
        settings = EvaluateSettings(
            weights["checkpoint"],
            weights["tokenizer"],
            weights["dtype"],
            weights["device"],
            own.samples,
            seed,
            batch_size,
            png,
            features=tuple((e.name, e.digest) for e in extractors),
            references=tuple(r.content for r in references),
            loss_images=loss_images,
        )
        asked = settings_document(settings)
        file = run.folder.evaluation_file(f"{in_force.label}-{settings_digest(asked)}")
        if file.exists():
            reporter.note(f"{file} has this evaluation already")
            return EvaluationResult(
                file, read_document(file, SCHEMA, DocumentShape, {"run_id": run.id, "settings": asked})
            )
        losses = {
            split: read_loss_images(
                run.model,
                run.sources[split],
                manifest,
                loss_images,
                cache=run.cache,
                workers=workers,
                reporter=reporter,
            )
            for split, manifest in run.manifests.items()
        }
        found = sample_and_compare(
            run.model,
            run.folder.samples_folder,
            in_force.label,
            weights,
            own,
            extractors,
            references,
            losses=losses,
            groups=_loss_groups(run, in_force),
            resume=resume,
            reporter=reporter,
        )
        reporter.note(", ".join(f"{part} took {seconds:.1f} s" for part, seconds in found.seconds.items()))
        return EvaluationResult(file, _finish(run, in_force, file, found, extractors, references, losses, asked))


def default_samples(run: OpenedRun) -> int:
    """50,000 as published; of an embedded model, 10 per class."""
    entry = entries().get(run.model.name)
    embedded = entry is not None and entry.embedded
    return EMBEDDED_PER_CLASS * run.model.num_classes if embedded else PUBLISHED_SAMPLES


def image_doses(run: OpenedRun) -> dict[str, np.ndarray]:
    """Ids of the embedded training images by how often they were shown, int64 each; empty for other images."""
    source = run.sources["train"]
    if (source.place, source.split) != (EMBEDDED, "train"):
        return {}
    from fastmem.demo.controls import dose_groups, place

    manifest = run.manifests["train"]
    group = dose_groups(manifest)
    names = sorted(set(group.tolist()), key=place)
    return {name if name == "twins" else f"dose-{name}": manifest.ids[group == name] for name in names}


def _loss_groups(run: OpenedRun, edit: EditInForce) -> dict[str, np.ndarray]:
    """Image ids by group: the doses of the embedded images, and the images of either set that an edit has not seen."""
    groups = image_doses(run)
    for split, seen in (("train", edit.chosen_on), ("heldout", edit.chosen_against)):
        if len(seen):
            ids = run.manifests[split].ids
            groups[f"{split}-not-chosen-on"] = ids[~np.isin(ids, seen)]
    return groups


def _finish(
    run: OpenedRun,
    edit: EditInForce,
    file: Path,
    found: Evaluation,
    extractors: list[FeatureExtractor],
    references: list[Reference],
    losses: dict[str, TrueImages],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Write the document, and a sheet of samples beside it; returns the document."""
    document = {
        "run": str(run.path),
        "run_id": run.id,
        "edit": edit.name,
        "samples": settings["samples"] if extractors else 0,
        "metrics": found.metrics,
        "features": [e.name for e in extractors],
        "reference": "; ".join(dict.fromkeys(r.description for r in references)) or None,
        "notes": list(found.notes),
        **edit.caution,
        "loss_images": {name: images.count for name, images in losses.items()},
        "settings": settings,
    }
    if extractors:
        from fastmem.report.sample_pictures import draw_samples

        picture = file.with_suffix(".png")
        title = f"{edit.title(run.model)}: samples"
        draw_samples(picture, run.model, found.samples, run.sources["train"].classes, title)
        document |= {"sample_folder": str(found.samples.path), "pictures": [str(picture)]}
    write_json(file, {"schema": SCHEMA} | document)
    return document
