"""``fastmem index``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastmem.cli.command import FROM_0, FROM_1, option
from fastmem.cli.command import command as make_command
from fastmem.cli.options import DEVICE, IMAGES, JSON, RESUME, WORK, WORKERS, print_document, say, sscd_options, tell
from fastmem.cli.progress import terminal_reporter
from fastmem.data.sources import ImageSource, embedded_source, open_source
from fastmem.errors import UsageError
from fastmem.stages.index import index, merge_into_one
from fastmem.stages.options import SSCDOptions

INDEX, PRINTED_SKIPPED = "The index", 5


@make_command("index", "index --data imagenet/train", "index --merge first --merge second --out both")
@option("--data", IMAGES, "Training images: a folder with one folder per class, a zip, or shards.", metavar="PATH")
@option("--classes", IMAGES, "Class folders in the checkpoint's order, one name per line.", metavar="FILE")
@option("--out", INDEX, "Folder of the index.  [default: the set's own in FASTMEM_HOME]", metavar="INDEX")
@option("--factory", INDEX, "faiss's string: Flat, HNSW32, IVF1024,Flat.  [default: Flat]", metavar="TEXT")
@option("--merge", INDEX, "Make --out from these indexes; give it twice.", multiple=True, metavar="INDEX")
@option("--seed", INDEX, "Seed that draws the images on which recall is measured.", type=FROM_0, default=0)
@sscd_options
@DEVICE
@option("--batch-size", WORK, "Images of one pass.  [default: 16, on a GPU 128]", type=FROM_1)
@WORKERS
@RESUME
@JSON
def command(
    data: str | None,
    classes: str | None,
    out: str | None,
    factory: str | None,
    merge: tuple[str, ...],
    seed: int,
    sscd: SSCDOptions,
    device: str,
    batch_size: int | None,
    workers: int | None,
    resume: bool,
    as_json: bool,
) -> None:
    """Embeds a training set with SSCD and makes the index that extraction searches.

    Every image is resized to 320x320, whatever its shape, and becomes a vector of 512 numbers. Vectors are kept whole:
    Flat compares with every image; HNSW32 and IVF1024,Flat compare with some, and their recall is measured. With
    --resume, images that --out lacks are added. Without --data the folder that FASTMEM_DATA names is taken, or else the
    embedded images.
    """
    if merge:
        refused = {"--data": data, "--classes": classes, "--sscd": sscd.sscd, "--resume": resume}
        given = [name for name, value in refused.items() if value]
        if given:
            raise UsageError(f"expected --merge without images to embed, got {given[0]}: leave it out")
        if out is None:
            raise UsageError("expected --out INDEX with --merge, got none: name the new index's folder")
        made = merge_into_one(merge, out, factory, seed)
    else:
        source = open_images(data, classes)
        with terminal_reporter() as reporter:
            made = index(
                source,
                out,
                factory,
                resume,
                sscd=sscd,
                device=device,
                batch_size=batch_size,
                workers=workers,
                seed=seed,
                reporter=reporter,
            )
    print_document(made.document, as_json, print_index)


def open_images(data: str | None, classes: str | None) -> ImageSource:
    """The images of --data, FASTMEM_DATA, or the package. Raises: UsageError for --classes with the last."""
    path = data or os.environ.get("FASTMEM_DATA")
    if path:
        return open_source(path, classes=classes)
    if classes is not None:
        raise UsageError("expected --classes together with --data, got the embedded images: leave it out")
    return embedded_source("train")


def print_index(document: Mapping[str, Any]) -> None:
    """The index in words."""
    for skipped in document["skipped_images"][:PRINTED_SKIPPED]:
        say(f"skipped {skipped['name']}: {skipped['reason']}")
    if document["skipped"] > PRINTED_SKIPPED:
        file = Path(document["index"]) / "index.json"
        say(f"skipped {document['skipped'] - PRINTED_SKIPPED} more; all are named in {file}")
    recall = "exact" if document["effort"] == 0 else f"recall {document['recall']:.3f} of the 10 nearest others"
    tell(
        f"{document['images']:,} images as {document['embedder']}, {document['factory']} ({recall}), "
        f"{document['bytes'] / 1e6:,.1f} MB, {document['embedded']:,} embedded at "
        f"{document['images_per_second']:.3g} images/s"
    )
    tell(document["index"])
