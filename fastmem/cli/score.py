"""``fastmem score``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from fastmem.cli.options import JSON, MODEL, loading_options, print_json, running_options, say
from fastmem.cli.progress import report_progress
from fastmem.data.sources import ImageSource, embedded_source, open_source
from fastmem.errors import InputFileError, UsageError
from fastmem.models.checkpoints import load_model
from fastmem.models.model import Model
from fastmem.models.registry import find_entry
from fastmem.report.score_report import ScoreFindings, write_report
from fastmem.runs.folder import RunFolder, RunInputs, default_folder
from fastmem.scoring import ScoreResult, score

PRINTED_UNITS = 10


@click.command("score")
@MODEL
@click.option("--data", metavar="PATH", help="Training images: a folder per class, or a zip of them.")
@click.option("--heldout", metavar="PATH", help="Images that were not trained on, as a control.")
@click.option("--out", metavar="RUN", help="Run folder.  [default: runs/MODEL-DATE]")
@click.option("--views", default="10", show_default=True, help="Views of each image: a number, or center.")
@click.option("--per-class", type=click.IntRange(1), help="Images of each class, drawn evenly.  [default: all]")
@click.option("--classes", metavar="FILE", help="Class folders in the checkpoint's order, one name per line.")
@click.option("--resume", is_flag=True, help="Go on in a run folder that was interrupted.")
@click.option(
    "--activation", default="post", show_default=True, help="post or pre: responses after or before the GELU."
)
@click.option("--class-rows", default="auto", show_default=True, help="keep, drop, or auto: kept up to 2 GiB.")
@click.option("--per-image", is_flag=True, help="Keep every image's loss and hits: membership inference, candidates.")
@click.option("--cfg", is_flag=True, help="With --per-image, which it implies: the loss without a class too.")
@click.option("--workers", type=click.IntRange(0), help="Processes that decode images.  [default: by cores]")
@click.option(
    "--token-cache",
    default="auto",
    show_default=True,
    metavar="PATH",
    help="Folder of tokens for later passes, or off.",
)
@loading_options
@running_options
@JSON
def command(
    model: str,
    data: str | None,
    heldout: str | None,
    out: str | None,
    views: str,
    per_class: int | None,
    classes: str | None,
    resume: bool,
    activation: str,
    class_rows: str,
    per_image: bool,
    cfg: bool,
    workers: int | None,
    token_cache: str,
    checkpoint: str | None,
    tokenizer: str | None,
    device: str,
    dtype: str,
    backend: str,
    batch_size: int | None,
    segments: str | None,
    seed: int,
    no_class_check: bool,
    as_json: bool,
) -> ScoreResult:
    """One pass over a training set: statistics and UnitMem of every unit, as a table, pictures and arrays.

    Without --data a tiny model takes the embedded images, any other the folder that FASTMEM_DATA names. Tokens are kept
    in FASTMEM_HOME/tokens, by the images' content, and a later pass over the same images takes them from there.
    """
    if resume and out is None:
        raise UsageError("expected --out RUN with --resume, got none: name the run folder to go on in")
    find_entry(model)
    sources = open_sources(model, data, heldout, classes)
    loaded = load_model(model, checkpoint, tokenizer, device, dtype)
    folder = RunFolder(Path(out) if out is not None else default_folder(model))
    with report_progress() as reporter:
        result = score(
            loaded,
            sources["train"],
            heldout=sources.get("heldout"),
            views=parse_views(views),
            segments=[name.strip() for name in segments.split(",")] if segments else None,
            per_class=per_class,
            batch_size=batch_size,
            backend=backend,
            out=folder.path,
            resume=resume,
            seed=seed,
            check_classes=not no_class_check,
            activation=activation,
            class_rows=class_rows,
            per_image=per_image or cfg,
            unconditional=cfg,
            workers=workers,
            token_cache=token_cache,
            reporter=reporter,
        )
    where_from(model, checkpoint, tokenizer, data, heldout, classes).save(folder)
    finish(loaded, sources["train"], folder, result, parse_views(views), as_json)
    return result


def parse_views(text: str) -> int | str:
    """--views as a number or "center". Raises: UsageError for anything else."""
    if text == "center":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"expected --views as a number of at least 1 or center, got {text!r}")
    return int(text)


def where_from(
    model: str,
    checkpoint: str | None,
    tokenizer: str | None,
    data: str | None,
    heldout: str | None,
    classes: str | None,
) -> RunInputs:
    """What a later stage needs to find weights and images again, wherever it is called from."""
    if data is None and not find_entry(model).embedded:
        data = os.environ.get("FASTMEM_DATA")
    paths = (checkpoint, tokenizer, data, heldout, classes)
    return RunInputs(model, *(None if path is None else os.path.abspath(path) for path in paths))


def open_sources(model: str, data: str | None, heldout: str | None, classes: str | None) -> dict[str, ImageSource]:
    """The image sets "train" and, where there is one, "heldout".

    Raises: UsageError where no images are named for a model that has none embedded; see ``open_source`` for the rest.
    """
    embedded = find_entry(model).embedded and data is None
    if embedded:
        if classes is not None:
            raise UsageError("expected --classes together with --data, got the embedded images: leave it out")
        sources = {split: embedded_source(split) for split in ("train", "heldout")}
    else:
        path = data or os.environ.get("FASTMEM_DATA")
        if not path:
            raise UsageError(
                f"expected training images for {model}, got none: name a folder with one folder per class with --data "
                "PATH, or in the environment variable FASTMEM_DATA"
            )
        sources = {"train": open_source(path, classes=classes)}
    if heldout is not None:
        order = classes if classes is not None else sources["train"].classes
        sources["heldout"] = open_source(heldout, classes=order)
    return sources


def finish(
    model: Model, source: ImageSource, folder: RunFolder, result: ScoreResult, views: int | str, as_json: bool
) -> None:
    """Write table, pictures and result.json, and print what was found.

    Raises: InputFileError where not one image could be read.
    """
    if not result.train.count:
        first = result.skipped[0]
        raise InputFileError(
            f"expected images that can be read in {source.description}, got {len(result.skipped)} that cannot, the "
            f"first {first.name} ({first.reason}): copy them again"
        )
    document, found = write_report(model, source, folder, result, views)
    for skipped in result.skipped[:5]:
        say(f"skipped {skipped.name}: {skipped.reason}")
    if len(result.skipped) > 5:
        say(f"skipped {len(result.skipped) - 5} more; all are named in {folder.result_file}")
    if as_json:
        print_json(document)
    else:
        _print_summary(document, found)


def _print_summary(document: dict[str, Any], found: ScoreFindings) -> None:
    heldout = f" + {document['heldout_images']:,} held-out" if document["heldout_images"] else ""
    click.echo(
        f"{document['model']}: {document['images']:,}{heldout} images, {document['layers']} blocks x "
        f"{document['units']:,} units, {document['images_per_second']:.3g} images/s, backend {document['backend']}"
    )
    if found.top:
        click.echo(
            f"\n{'block':>5} {'unit':>6}  {'segment':<14}{'UnitMem':>8}{'class sel.':>12}  largest response from"
        )
        for unit in found.top[:PRINTED_UNITS]:
            click.echo(
                f"{unit.layer:>5} {unit.unit:>6}  {unit.segment:<14}{unit.unitmem:>8.3f}{unit.class_selectivity:>12.3f}"
                f"  {found.names[unit.image_ids[0]]}"
            )
        click.echo()
    for reliable in found.reliability.values():
        click.echo(reliable)
    if document["gap"]:
        click.echo(_gap_sentence(document["gap"]))
    for by, sentence in (
        ("loss", "membership by loss"),
        ("guided", "membership by loss without a class minus with it"),
    ):
        if by in found.membership:
            click.echo(f"{sentence}: {found.membership[by]}")
    for path in (*document["tables"], *document["pictures"]):
        click.echo(path)


def _gap_sentence(gap: dict[str, Any]) -> str:
    means = ", ".join(
        f"{name} {row['mean']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})" for name, row in gap["mean"].items()
    )
    return (
        f"UnitMem on training minus held-out images, {gap['images']:,} matched images each, mean over units and folds: "
        f"{means}; {gap['called']:,} of {gap['tested']:,} units stand out at a false-discovery rate of "
        f"{gap['false_discovery_rate']:.0%}"
    )
