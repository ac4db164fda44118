"""``fastmem index``."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import click

from fastmem.cli.options import JSON, print_json, say
from fastmem.cli.progress import duration, image_progress, size
from fastmem.data.sources import ImageSource, embedded_source, open_source
from fastmem.errors import FastmemError, UsageError
from fastmem.index.build import IndexPlan, IndexReporter, build_index
from fastmem.index.embedding import PUBLISHED_SIZE, find_embedder
from fastmem.index.faiss_index import EXACT
from fastmem.index.files import IndexHeader
from fastmem.index.merge import merge_indexes


@click.command("index")
@click.option("--data", metavar="PATH", help="Training images: a folder per class, or a zip of them.")
@click.option("--classes", metavar="FILE", help="Class folders in the checkpoint's order, one name per line.")
@click.option("--out", metavar="INDEX", help="Folder of the index.  [default: the set's own in FASTMEM_HOME]")
@click.option("--factory", metavar="TEXT", help="faiss's string: Flat, HNSW32, IVF1024,Flat, ...  [default: Flat]")
@click.option("--merge", multiple=True, metavar="INDEX", help="Make --out from these indexes instead; give it twice.")
@click.option("--resume", is_flag=True, help="Go on where it was interrupted, or add the images that --out lacks.")
@click.option("--sscd", metavar="FILE", help="Meta's sscd_disc_mixup.torchscript.pt.  [default: in FASTMEM_HOME]")
@click.option("--trust-sscd", is_flag=True, help="Load a TorchScript file of unknown SHA-256, which can run any code.")
@click.option("--size", "side", type=int, default=PUBLISHED_SIZE, show_default=True, help="Side of a picture; or 288.")
@click.option("--device", default="auto", show_default=True, help="Of the TorchScript model: auto, cpu or cuda:N.")
@click.option("--batch-size", type=click.IntRange(1), help="Images of one pass.  [default: 16, on a GPU 128]")
@click.option("--workers", type=click.IntRange(0), help="Processes that decode images.  [default: by cores]")
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the images that recall is measured on."
)
@JSON
def command(
    data: str | None,
    classes: str | None,
    out: str | None,
    factory: str | None,
    merge: tuple[str, ...],
    resume: bool,
    sscd: str | None,
    trust_sscd: bool,
    side: int,
    device: str,
    batch_size: int | None,
    workers: int | None,
    seed: int,
    as_json: bool,
) -> None:
    """Embeds a training set with SSCD and makes the index that extraction searches.

    Every image is resized to 320x320 as published, whatever its shape, and becomes a vector of 512. Without --data the
    folder that FASTMEM_DATA names is taken, or else the embedded images. Vectors are kept whole, so cosines are those
    of the images with every factory; Flat compares with every image, HNSW32 and IVF1024,Flat with some, and their
    recall is measured and noted. HNSW is built by one thread, so that equal inputs make equal files. An image set that
    has grown is embedded only where it is new, with --resume.
    """
    if merge:
        refused = {"--data": data, "--classes": classes, "--sscd": sscd, "--resume": resume}
        document = _merge(merge, out, factory, seed, [name for name, value in refused.items() if value])
    else:
        source = open_images(data, classes)
        embedder, reason = find_embedder(sscd, trust=trust_sscd, size=side, device=device)
        if embedder is None:
            raise FastmemError(f"expected an SSCD model to embed images with, got none: {reason}")
        say(f"{reason}, as {embedder.name}")
        with image_progress() as (start, advance):

            def planned(plan: IndexPlan) -> None:
                say(describe(plan))
                start(plan.images)

            result = build_index(
                source,
                embedder,
                out,
                factory=factory,
                resume=resume,
                batch_size=batch_size,
                workers=workers,
                seed=seed,
                reporter=IndexReporter(planned, advance),
            )
        document = describe_index(result.path, result.header, result.seconds, result.embedded)
    if as_json:
        print_json(document)
    else:
        print_index(document)


def open_images(data: str | None, classes: str | None) -> ImageSource:
    """The images of --data, FASTMEM_DATA, or the package. Raises: UsageError for --classes with the last."""
    path = data or os.environ.get("FASTMEM_DATA")
    if path:
        return open_source(path, classes=classes)
    if classes is not None:
        raise UsageError("expected --classes together with --data, got the embedded images: leave it out")
    return embedded_source("train")


def describe(plan: IndexPlan) -> str:
    """One line before long work: images, bytes on disk, and how long at the measured speed."""
    images = f"{plan.images:,} images" + (f" ({plan.known:,} are done)" if plan.known else "")
    time_left = f", about {duration(plan.seconds)} at the measured speed" if plan.seconds is not None else ""
    return f"embedding {images} with {plan.embedder}, about {size(plan.disk_bytes)} on disk{time_left}"


def _merge(
    paths: tuple[str, ...], out: str | None, factory: str | None, seed: int, refused: list[str]
) -> dict[str, Any]:
    if refused:
        raise UsageError(f"expected --merge without images to embed, got {refused[0]}: leave it out")
    if out is None:
        raise UsageError("expected --out INDEX with --merge, got none: name the new index's folder")
    started = time.monotonic()
    header = merge_indexes(paths, out, factory or EXACT, seed)
    return describe_index(Path(out), header, time.monotonic() - started, 0)


def describe_index(path: Path, header: IndexHeader, seconds: float, embedded: int) -> dict[str, Any]:
    """What ``fastmem index --json`` prints."""
    return {
        "index": str(path),
        "images": header.count,
        "embedder": header.embedder,
        "factory": header.factory,
        "effort": header.effort,
        "recall": header.recall,
        "bytes": header.bytes,
        "embedded": embedded,
        "seconds": round(seconds, 3),
        "images_per_second": round(embedded / max(seconds, 1e-9), 3),
        "skipped": len(header.skipped),
        "skipped_images": list(header.skipped),
    }


def print_index(document: dict[str, Any]) -> None:
    """The index in words."""
    for skipped in document["skipped_images"][:5]:
        say(f"skipped {skipped['name']}: {skipped['reason']}")
    if document["skipped"] > 5:
        say(f"skipped {document['skipped'] - 5} more; all are named in {Path(document['index']) / 'index.json'}")
    recall = "exact" if document["effort"] == 0 else f"recall {document['recall']:.3f} of the 10 nearest others"
    click.echo(
        f"{document['images']:,} images as {document['embedder']}, {document['factory']} ({recall}), "
        f"{document['bytes'] / 1e6:,.1f} MB, {document['embedded']:,} embedded at "
        f"{document['images_per_second']:.3g} images/s"
    )
    click.echo(document["index"])
