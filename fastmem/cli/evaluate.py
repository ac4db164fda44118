"""``fastmem evaluate``."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import click
import numpy as np

from fastmem.cli.options import JSON, print_json, say
from fastmem.cli.progress import duration, image_progress, size
from fastmem.data.sources import embedded_source
from fastmem.files import read_json, write_json
from fastmem.models.registry import find_entry
from fastmem.quality.evaluate import Evaluation, evaluate
from fastmem.quality.features import FeatureExtractor, Reference
from fastmem.quality.inception import fetch_inception
from fastmem.quality.losses import MOST_IMAGES, TrueImages, read_true_images
from fastmem.quality.samples import BATCH
from fastmem.quality.sampling import EvaluationPlan, EvaluationReporter, EvaluationSettings
from fastmem.stages.opened_run import CAUTION, OpenedRun, open_run, run_options
from fastmem.stages.quality_inputs import choose_extractors, find_references

SCHEMA = "fastmem.evaluation/1"
PUBLISHED_SAMPLES, EMBEDDED_PER_CLASS = 50_000, 10
COPYING = (
    "the reference are training images: samples that copy them score better, so it cannot tell quality from memory"
)


@click.command("evaluate")
@run_options
@click.option("--edit", metavar="NAME", help="Evaluate the model with this edit of the run, a name or a file.")
@click.option(
    "--reference", metavar="R", help="heldout, train, a folder or zip, or STATS.npz (mu, sigma).  [default: heldout]"
)
@click.option("--samples", type=click.IntRange(1), help="Images to sample.  [default: 50000; embedded: 10 per class]")
@click.option("--features", default="auto", show_default=True, help="inception, sscd, both, none (losses), or auto.")
@click.option("--inception", metavar="FILE", help="torch-fidelity's Inception weights.  [default: in FASTMEM_HOME]")
@click.option("--fetch-inception", "fetch", is_flag=True, help="Download these weights into FASTMEM_HOME first.")
@click.option("--sscd", metavar="FILE", help="Meta's sscd_disc_mixup.torchscript.pt.  [default: in FASTMEM_HOME]")
@click.option("--trust-sscd", is_flag=True, help="Load a TorchScript file of unknown SHA-256, which can run any code.")
@click.option("--loss-images", type=click.IntRange(1), default=MOST_IMAGES, show_default=True, help="Of each set.")
@click.option("--png", is_flag=True, help="Write every sample as a PNG file, too.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the samples.")
@click.option("--batch-size", type=click.IntRange(1), default=BATCH, show_default=True, help="Samples of a batch.")
@click.option("--workers", type=click.IntRange(0), help="Processes that decode images.  [default: by cores]")
@click.option("--resume", is_flag=True, help="Go on from samples that are there.")
@JSON
def command(
    run: str,
    data: str | None,
    heldout: str | None,
    classes: str | None,
    checkpoint: str | None,
    tokenizer: str | None,
    device: str,
    dtype: str | None,
    edit: str | None,
    reference: str | None,
    samples: int | None,
    features: str,
    inception: str | None,
    fetch: bool,
    sscd: str | None,
    trust_sscd: bool,
    loss_images: int,
    png: bool,
    seed: int,
    batch_size: int,
    workers: int | None,
    resume: bool,
    as_json: bool,
) -> dict[str, Any]:
    """Measures image quality: samples against real images, and how well real images are predicted.

    Samples are drawn as published, with the model's own guidance, in the proportions of the reference's classes or,
    against a statistics file, as many of every class. With Inception weights the metrics are fid, kid, is, precision
    and recall; without them kd-sscd, the same unbiased kernel distance over SSCD embeddings. The loss is that of the
    run's training and held-out images. The same seed and batch size draw the same samples on the same device.
    """
    opened = open_run(
        run,
        data=data,
        heldout=heldout,
        classes=classes,
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        edit=edit,
    )
    if fetch:
        say(f"Inception weights in {fetch_inception()}")
    extractors = choose_extractors(features, inception, sscd, trust_sscd, device)
    references = find_references(opened, reference, extractors, workers)
    for description in dict.fromkeys(r.description for r in references):
        say(f"reference: {description}")
    if any(r.train for r in references):
        say(COPYING)
    settings = EvaluationSettings(samples or default_samples(opened), seed, batch_size, png)
    document = find_document(opened, extractors, references, settings, loss_images, workers, resume)
    if as_json:
        print_json(document)
    else:
        print_evaluation(document)
    return document


def default_samples(opened: OpenedRun) -> int:
    """50,000 as published; of an embedded model, 10 per class."""
    embedded = find_entry(opened.model.name).embedded
    return EMBEDDED_PER_CLASS * opened.model.num_classes if embedded else PUBLISHED_SAMPLES


def find_document(
    opened: OpenedRun,
    extractors: list[FeatureExtractor],
    references: list[Reference],
    settings: EvaluationSettings,
    loss_images: int,
    workers: int | None,
    resume: bool,
) -> dict[str, Any]:
    """The document of an evaluation: the one that is there already, or a new one that is written down."""
    edit = None if opened.edit is None else Path(opened.edit).name.removesuffix(".safetensors")
    identity = {
        **opened.model.fingerprint(),
        "dtype": str(opened.model.dtype).removeprefix("torch."),
        "device": opened.model.device.type,
    }
    asked = {
        **identity,
        **vars(settings),
        "features": [[e.name, e.digest] for e in extractors],
        "references": [r.content for r in references],
        "loss_images": loss_images,
    }
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]
    name = f"{edit or 'unedited'}-{digest}"
    file = opened.folder.evaluation_file(name)
    if file.exists():
        say(f"{file} has this evaluation already")
        return {k: v for k, v in read_json(file, SCHEMA).items() if k != "schema"}
    losses = read_losses(opened, loss_images, workers)
    found = run_evaluation(opened, edit or "unedited", identity, settings, extractors, references, losses, resume)
    document = {
        "run": str(opened.folder.path),
        "edit": opened.edit,
        "samples": settings.samples if extractors else 0,
        "metrics": found.metrics,
        "features": [e.name for e in extractors],
        "reference": "; ".join(dict.fromkeys(r.description for r in references)) or None,
        "notes": list(found.notes),
        **({} if opened.edit is None else {"caution": CAUTION}),
        "loss_images": {name: images.count for name, images in losses.items()},
        "settings": asked,
        "seconds": found.seconds,
    }
    if extractors:
        from fastmem.report.sample_pictures import draw_samples

        picture = file.with_suffix(".png")
        title = opened.model.name + (f", edit {opened.edit}" if opened.edit else "")
        draw_samples(picture, opened.model, found.samples, opened.sources["train"].classes, f"{title}: samples")
        document |= {"sample_folder": str(found.samples.path), "pictures": [str(picture)]}
    write_json(file, {"schema": SCHEMA} | document)
    return document


def read_losses(opened: OpenedRun, most: int, workers: int | None) -> dict[str, TrueImages]:
    """The run's images whose loss is taken, by set."""
    found = {}
    for split, manifest in opened.manifests.items():
        with image_progress() as (start, advance):
            start(min(most, len(manifest)))
            found[split] = read_true_images(opened.model, opened.sources[split], manifest, most, workers, advance)
    return found


def loss_groups(opened: OpenedRun) -> dict[str, np.ndarray]:
    """Image ids by group: the doses of the embedded images, and the images of either set that an edit has not seen."""
    groups = image_doses(opened)
    for split, seen in (("train", opened.chosen_on), ("heldout", opened.chosen_against)):
        if len(seen):
            ids = opened.manifests[split].ids
            groups[f"{split}-not-chosen-on"] = ids[~np.isin(ids, seen)]
    return groups


def image_doses(opened: OpenedRun) -> dict[str, np.ndarray]:
    """Ids of the embedded training images by dose; empty for other images."""
    if opened.sources["train"].description != embedded_source("train").description:
        return {}
    from fastmem.demo.controls import dose_groups

    manifest = opened.manifests["train"]
    group = dose_groups(manifest)
    names = sorted(set(group.tolist()), key=lambda name: (not name.isdecimal(), name.zfill(9)))
    return {name if name == "twins" else f"dose-{name}": manifest.ids[group == name] for name in names}


def run_evaluation(
    opened: OpenedRun,
    name: str,
    identity: dict[str, str],
    settings: EvaluationSettings,
    extractors: list[FeatureExtractor],
    references: list[Reference],
    losses: dict[str, TrueImages],
    resume: bool,
) -> Evaluation:
    """The evaluation of an opened run, with progress on stderr."""
    with image_progress() as (start, advance):

        def planned(plan: EvaluationPlan) -> None:
            say(describe(plan))
            start(plan.samples)

        return evaluate(
            opened.model,
            opened.folder.samples_folder,
            name,
            identity,
            settings,
            extractors,
            references,
            losses=losses,
            groups=loss_groups(opened),
            resume=resume,
            reporter=EvaluationReporter(planned, advance),
        )


def describe(plan: EvaluationPlan) -> str:
    """One line before sampling: how many, bytes on disk, and how long at the measured speed."""
    if plan.done == plan.samples:
        return f"all {plan.samples:,} samples are there already"
    done = f" ({plan.done:,} are there)" if plan.done else ""
    time_left = f", about {duration(plan.seconds)} at the measured speed" if plan.seconds is not None else ""
    return f"sampling {plan.samples:,} images{done}, about {size(plan.disk_bytes)} on disk{time_left}"


def print_evaluation(document: dict[str, Any]) -> None:
    """The evaluation in words."""
    features = ", ".join(document["features"]) or "no features"
    click.echo(
        f"{document['edit'] or 'unedited'}: {document['samples']:,} samples by {features}, against "
        f"{document['reference'] or 'nothing'}\n"
    )
    metrics = document["metrics"]
    for name, value in metrics.items():
        if name.endswith(("-low", "-high")):
            continue
        ends = [metrics.get(f"{name}{end}") for end in ("-low", "-high")]
        interval = "" if None in ends else f"  ({ends[0]:.6g} to {ends[1]:.6g})"
        click.echo(f"{name:<26}{value:>12.6g}{interval}")
    for note in document["notes"]:
        click.echo(note)
    for path in document.get("pictures", ()):
        click.echo(path)
