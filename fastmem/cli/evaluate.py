"""``fastmem evaluate``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastmem.cli.command import FROM_1, option
from fastmem.cli.command import command as make_command
from fastmem.cli.options import (
    EDIT,
    JSON,
    RESUME,
    SAMPLING,
    WORKERS,
    RunOptions,
    print_document,
    run_options,
    sampling_options,
    sscd_options,
    tell,
)
from fastmem.cli.progress import terminal_reporter
from fastmem.quality.inception import fetch_inception
from fastmem.stages.evaluate import evaluate
from fastmem.stages.options import SamplingOptions, SSCDOptions
from fastmem.tokens.true_images import MOST_IMAGES

MEASURE = "What is measured"


@make_command("evaluate", "evaluate --run runs/xxl --samples 50000", "evaluate --run runs/xxl --edit unitmem-5pct-x0.5")
@run_options
@EDIT
@option(
    "--reference",
    MEASURE,
    "heldout, train, a folder or zip of images, or a .npz file with mu and sigma or images.  [default: heldout]",
    metavar="R",
)
@option(
    "--features", MEASURE, "inception, sscd, both, none for losses alone, or auto for what there is.", default="auto"
)
@option("--inception", MEASURE, "torch-fidelity's weights.  [default: in FASTMEM_HOME]", metavar="FILE")
@option(("--fetch-inception", "fetch"), MEASURE, "Download these weights into FASTMEM_HOME.", is_flag=True)
@option(
    "--loss-images",
    MEASURE,
    "Largest number of images of each set whose loss is taken.",
    type=FROM_1,
    default=MOST_IMAGES,
)
@sampling_options("50000; of an embedded model 10 of every class")
@option("--png", SAMPLING, "Write every sample as a PNG file, too.", is_flag=True)
@sscd_options
@WORKERS
@RESUME
@JSON
def command(
    where: RunOptions,
    edit: str | None,
    reference: str | None,
    features: str,
    inception: str | None,
    fetch: bool,
    loss_images: int,
    sampling: SamplingOptions,
    png: bool,
    sscd: SSCDOptions,
    workers: int | None,
    resume: bool,
    as_json: bool,
) -> None:
    """Measures image quality: samples against real images, and how well real images are predicted.

    Samples are drawn as published, with the model's own guidance, in the proportions of the reference's classes. With
    Inception weights the metrics are fid, kid, is, precision and recall; without them kd-sscd, an unbiased kernel
    distance over SSCD embeddings. Losses are those of the run's training and held-out images. The same seed and batch
    size draw the same samples on the same device.
    """
    with terminal_reporter() as reporter:
        run = where.open(reporter)
        if fetch:
            reporter.note(f"Inception weights in {fetch_inception()}")
        found = evaluate(
            run,
            edit,
            reference,
            resume=resume,
            features=features,
            inception=inception,
            sscd=sscd,
            loss_images=loss_images,
            png=png,
            workers=workers,
            reporter=reporter,
            **vars(sampling),
        )
    print_document(found.document, as_json, print_evaluation)


def print_evaluation(document: Mapping[str, Any]) -> None:
    """The evaluation in words."""
    features = ", ".join(document["features"]) or "no features"
    tell(
        f"{document['edit'] or 'unedited'}: {document['samples']:,} samples by {features}, against "
        f"{document['reference'] or 'nothing'}",
        "",
    )
    metrics = document["metrics"]
    for name, value in metrics.items():
        if name.endswith(("-low", "-high")):
            continue
        ends = [metrics.get(f"{name}{end}") for end in ("-low", "-high")]
        interval = "" if None in ends else f"  ({ends[0]:.6g} to {ends[1]:.6g})"
        tell(f"{name:<26}{value:>12.6g}{interval}")
    for note in document["notes"]:
        tell(note)
    for path in document.get("pictures", ()):
        tell(path)
