"""``fastmem score``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastmem.cli.command import FROM_0, FROM_1, option
from fastmem.cli.command import command as make_command
from fastmem.cli.options import (
    CHECKPOINT,
    DEVICE,
    IMAGES,
    JSON,
    RESUME,
    TOKENIZER,
    WEIGHTS,
    WORK,
    WORKERS,
    model_option,
    print_json,
    say,
    tell,
)
from fastmem.cli.progress import terminal_reporter
from fastmem.errors import UsageError
from fastmem.models.checkpoints import load_model
from fastmem.models.registry import LARGE_EXAMPLE, SMALL_EXAMPLE, find_entry
from fastmem.report.score_report import ScoreFindings
from fastmem.runs.folder import out_folder
from fastmem.stages.opened_run import open_sources
from fastmem.stages.score import ScoredRun, score

PRINTED_UNITS, PRINTED_SKIPPED = 10, 5
SCORES, RESULT = "What is measured", "The result"


@make_command(
    "score",
    f"score --model {SMALL_EXAMPLE}",
    f"score --model {LARGE_EXAMPLE} --data imagenet/train --heldout imagenet/val",
)
@model_option()
@option("--data", IMAGES, "Training images: a folder with one folder per class, a zip, or shards.", metavar="PATH")
@option("--heldout", IMAGES, "Images that the model was not trained on, as a control.", metavar="PATH")
@option("--per-class", IMAGES, "Images of each class, drawn evenly.  [default: all]", type=FROM_1)
@option("--classes", IMAGES, "Class folders in the checkpoint's order, one name per line.", metavar="FILE")
@option("--no-class-check", IMAGES, "Accept a class order that may not fit the checkpoint.", is_flag=True)
@CHECKPOINT
@TOKENIZER
@DEVICE
@option("--dtype", WEIGHTS, "Generator as float32, bfloat16, float16.", default="float32")
@option("--views", SCORES, "Views of each image: a number, or center.", default="10")
@option("--segments", SCORES, "Positions to score, by name.  [default: the model's own]", metavar="A,B")
@option("--activation", SCORES, "post takes responses after the GELU, pre before it.", default="post")
@option("--per-image", SCORES, "Keep every image's loss and hits, for membership and candidates.", is_flag=True)
@option("--cfg", SCORES, "Keep every image's loss without a class too; implies --per-image.", is_flag=True)
@option("--seed", SCORES, "Seed that deals images to folds and draws those of --per-class.", type=FROM_0, default=0)
@option("--out", RESULT, "Run folder.  [default: runs/MODEL-DATE]", metavar="RUN")
@option(
    "--class-rows", RESULT, "keep the statistics of every class, drop them, or auto: keep up to 2 GiB.", default="auto"
)
@RESUME
@option("--backend", WORK, "auto, torch, cpp or triton.", default="auto")
@option("--batch-size", WORK, "Views of one forward pass.  [default: 80]", type=FROM_1)
@WORKERS
@option(
    "--token-cache",
    WORK,
    "Folder where tokens are kept for later passes; off keeps none, auto takes FASTMEM_HOME/tokens.",
    default="auto",
    metavar="PATH",
)
@JSON
def command(
    model: str,
    data: str | None,
    heldout: str | None,
    classes: str | None,
    no_class_check: bool,
    checkpoint: str | None,
    tokenizer: str | None,
    device: str,
    dtype: str,
    views: str,
    segments: str | None,
    activation: str,
    per_image: bool,
    cfg: bool,
    per_class: int | None,
    seed: int,
    out: str | None,
    class_rows: str,
    resume: bool,
    backend: str,
    batch_size: int | None,
    workers: int | None,
    token_cache: str,
    as_json: bool,
) -> None:
    """Scores every unit of a model in one pass over its training images.

    Leaves a run folder with statistics, UnitMem and controls of every unit as tables, pictures and arrays. Shards are
    tar or parquet files, here or elsewhere: 'train-{000..146}.tar', 'data/train-*.parquet', 's3://bucket/train-*.tar'.
    Without --data a tiny model takes the embedded images, and any other the folder that FASTMEM_DATA names.
    """
    if resume and out is None:
        raise UsageError("expected --out RUN with --resume, got none: name the run folder to go on in")
    find_entry(model)
    sources = open_sources(model, data, heldout, classes)
    loaded = load_model(model, checkpoint, tokenizer, device, dtype)
    with terminal_reporter() as reporter, out_folder(model, out) as run:
        found = score(
            loaded,
            sources["train"],
            heldout=sources.get("heldout"),
            views=parse_views(views),
            segments=[name.strip() for name in segments.split(",")] if segments else None,
            activation=activation,
            per_image=per_image or cfg,
            unconditional=cfg,
            per_class=per_class,
            seed=seed,
            class_rows=class_rows,
            backend=backend,
            batch_size=batch_size,
            workers=workers,
            token_cache=token_cache,
            out=run,
            resume=resume,
            check_classes=not no_class_check,
            reporter=reporter,
        )
    # a pass with a run folder leaves a document
    assert isinstance(found, ScoredRun)
    print_score(found.document, found.findings, as_json)


def parse_views(text: str) -> int | str:
    """--views as a number or "center". Raises: UsageError for anything else."""
    if text == "center":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"expected --views as a number of at least 1 or center, got {text!r}")
    return int(text)


def print_score(document: Mapping[str, Any], found: ScoreFindings, as_json: bool) -> None:
    """What a pass found, as JSON or in words; skipped files are named on stderr."""
    for skipped in document["skipped_images"][:PRINTED_SKIPPED]:
        say(f"skipped {skipped['name']}: {skipped['reason']}")
    if document["skipped"] > PRINTED_SKIPPED:
        say(f"skipped {document['skipped'] - PRINTED_SKIPPED} more; {document['run']}/result.json names all")
    if as_json:
        print_json(document)
        return
    heldout = f" + {document['heldout_images']:,} held-out" if document["heldout_images"] else ""
    tell(
        f"{document['model']}: {document['images']:,}{heldout} images, {document['layers']} blocks x "
        f"{document['units']:,} units, {document['images_per_second']:.3g} images/s, backend {document['backend']}"
    )
    if found.top:
        tell("", f"{'block':>5} {'unit':>6}  {'segment':<14}{'UnitMem':>8}{'class sel.':>12}  largest response from")
        for unit in found.top[:PRINTED_UNITS]:
            selectivity = "undefined" if unit.class_selectivity is None else f"{unit.class_selectivity:.3f}"
            tell(
                f"{unit.layer:>5} {unit.unit:>6}  {unit.segment:<14}{unit.unitmem:>8.3f}{selectivity:>12}"
                f"  {found.names[unit.image_ids[0]]}"
            )
        tell("")
    for score_name, need in document["undefined"].items():
        tell(f"{score_name} is undefined: it needs {need}")
    for reliable in found.reliability.values():
        tell(reliable)
    if document["gap"]:
        tell(_gap_sentence(document["gap"]))
    for by, sentence in (
        ("loss", "membership by loss"),
        ("guided", "membership by loss without a class minus with it"),
    ):
        if by in found.membership:
            tell(f"{sentence}: {found.membership[by]}")
    for path in (*document["tables"], *document["pictures"]):
        tell(path)


def _gap_sentence(gap: Mapping[str, Any]) -> str:
    means = ", ".join(
        f"{name} {row['mean']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})" for name, row in gap["mean"].items()
    )
    return (
        f"UnitMem on training minus held-out images, {gap['images']:,} matched images each, mean over units and folds: "
        f"{means}; {gap['called']:,} of {gap['tested']:,} units stand out at a false-discovery rate of "
        f"{gap['false_discovery_rate']:.0%}"
    )
