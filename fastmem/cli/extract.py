"""``fastmem extract``."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np

from fastmem.cli.options import JSON, print_json, say
from fastmem.cli.progress import image_progress
from fastmem.data.manifest import Manifest
from fastmem.errors import UsageError
from fastmem.extraction.attack import BATCH_ROWS
from fastmem.extraction.candidates import TOP_PER_CLASS, collect_losses
from fastmem.extraction.extract import Extraction, ExtractReporter, check_prefixes, extract
from fastmem.extraction.verdicts import Count, Judge, SSCDJudge, TokenMatch
from fastmem.files import read_json, write_json
from fastmem.index.build import default_index_folder
from fastmem.index.embedding import PUBLISHED_SIZE, find_embedder
from fastmem.index.search import EmbeddingIndex
from fastmem.report.extraction_report import describe, find_associations, write_verdicts
from fastmem.stages.opened_run import CAUTION, OpenedRun, open_run, run_options
from fastmem.tokens.cache import AUTO, TokenCache

SCHEMA = "fastmem.extraction/1"
JUDGES = ("auto", "sscd", "tokens")
BROKEN_BOUND = 1


@click.command("extract")
@run_options
@click.option("--edit", metavar="NAME", help="Attack the model with this edit of the run, a name or a file.")
@click.option("--index", metavar="INDEX", help="Index of the training set.  [default: the set's own in FASTMEM_HOME]")
@click.option("--prefix", "prefixes", metavar="P,...", help="Prefix lengths in tokens.  [default: the model's ladder]")
@click.option("--top-per-class", type=click.IntRange(1), default=TOP_PER_CLASS, show_default=True, help="Candidates.")
@click.option("--judge", default="auto", show_default=True, help="sscd, tokens (without an embedder), or auto.")
@click.option("--threshold", type=float, help="Extracted above this similarity.  [default: 0.75, of tokens 0.9]")
@click.option("--fail-above", type=click.IntRange(0), metavar="N", help="Exit with 1 when more than N are extracted.")
@click.option("--sscd", metavar="FILE", help="Meta's sscd_disc_mixup.torchscript.pt.  [default: in FASTMEM_HOME]")
@click.option("--trust-sscd", is_flag=True, help="Load a TorchScript file of unknown SHA-256, which can run any code.")
@click.option("--size", "side", type=int, default=PUBLISHED_SIZE, show_default=True, help="Side of a picture; or 288.")
@click.option("--resume", is_flag=True, help="Go on with an extraction that was interrupted.")
@click.option("--batch-size", type=click.IntRange(1), default=BATCH_ROWS, show_default=True, help="Rows of one batch.")
@click.option("--workers", type=click.IntRange(0), help="Processes that decode images.  [default: by cores]")
@JSON
@click.pass_context
def command(
    ctx: click.Context,
    run: str,
    data: str | None,
    heldout: str | None,
    classes: str | None,
    checkpoint: str | None,
    tokenizer: str | None,
    device: str,
    dtype: str | None,
    edit: str | None,
    index: str | None,
    prefixes: str | None,
    top_per_class: int,
    judge: str,
    threshold: float | None,
    fail_above: int | None,
    sscd: str | None,
    trust_sscd: bool,
    side: int,
    resume: bool,
    batch_size: int,
    workers: int | None,
    as_json: bool,
) -> dict[str, Any]:
    """Pulls training images out of a scored model: candidates, greedy completion of prefixes, verdicts.

    Candidates are the images of every class that the model predicts best. Each is completed from its first tokens,
    without guidance or sampling, and counts as extracted when SSCD finds the completion more alike the tokenizer's
    reconstruction of the image than the threshold. The same is done with the run's held-out images. With an index
    every completion is also compared with the whole training set. The count of the longest prefix is the published one.
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
    lengths = opened.model.prefixes if prefixes is None else parse_prefixes(prefixes)
    check_prefixes(opened.model, lengths)
    chosen = choose_judge(judge, threshold, sscd, trust_sscd, side, device)
    searched = open_index(index, opened, chosen, device)
    settings = {
        "prefixes": list(lengths),
        "top_per_class": top_per_class,
        "judge": chosen.name,
        "threshold": chosen.threshold,
        "index": None if searched is None else searched.header.vectors_file,
        "batch_size": batch_size,
        "dtype": str(opened.model.dtype).removeprefix("torch."),
        "device": opened.model.device.type,
        **opened.model.fingerprint(),
    }
    name = f"{Path(edit).name.removesuffix('.safetensors') if edit else 'unedited'}-{_digest(settings)}"
    folder = opened.folder.extraction_folder(name)
    if (folder / "result.json").exists():
        say(f"{folder} has this extraction already")
        document = {k: v for k, v in read_json(folder / "result.json", SCHEMA).items() if k != "schema"}
    else:
        if folder.exists() and not resume:
            raise UsageError(
                f"expected no unfinished extraction in {folder}, got one: go on with --resume, or remove the folder"
            )
        write_json(folder / "settings.json", {"schema": SCHEMA, **settings})
        found = run_extraction(opened, chosen, searched, lengths, top_per_class, folder / "units", batch_size, workers)
        document = finish(opened, found, folder, settings)
    if as_json:
        print_json(document)
    else:
        print_extraction(document)
    reached = document["extracted"][str(max(document["prefixes"]))]
    if fail_above is not None and reached > fail_above:
        say(f"{reached} images were extracted, more than the {fail_above} that --fail-above allows")
        ctx.exit(BROKEN_BOUND)
    return document


def parse_prefixes(text: str) -> tuple[int, ...]:
    """--prefix as numbers. Raises: UsageError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"expected --prefix as numbers of tokens such as 0,5,30, got {text!r}")
    return tuple(map(int, parts))


def choose_judge(
    judge: str, threshold: float | None, sscd: str | None, trust_sscd: bool, side: int, device: str
) -> Judge:
    """The embedder where there is one, else the match of tokens, said aloud.

    Raises: UsageError for an unknown judge, a threshold outside -1..1, or where SSCD is asked for by name and missing.
    """
    if judge not in JUDGES:
        raise UsageError(f"expected a judge out of {', '.join(JUDGES)}, got {judge!r}")
    if threshold is not None and not -1 <= threshold <= 1:
        raise UsageError(f"expected a threshold from -1 to 1, got {threshold}")
    embedder = None
    if judge != "tokens":
        embedder, reason = find_embedder(sscd, trust=trust_sscd, size=side, device=device)
        if embedder is None and judge == "sscd":
            raise UsageError(f"expected an SSCD model for --judge sscd, got none: {reason}")
        say(f"{reason}, as {embedder.name}" if embedder else f"verdicts by tokens alone, because there is {reason}")
    if embedder is None:
        return TokenMatch() if threshold is None else TokenMatch(threshold)
    return SSCDJudge(embedder) if threshold is None else SSCDJudge(embedder, threshold)


def open_index(path: str | None, opened: OpenedRun, judge: Judge, device: str) -> EmbeddingIndex | None:
    """The index that was named, or else the training set's own where it is there; None without an embedder.

    Raises: UsageError for an index without an embedder, or of another one; InputFileError for a damaged one.
    """
    if not isinstance(judge, SSCDJudge):
        if path is not None:
            raise UsageError("expected an SSCD model with --index, got verdicts by tokens: leave it out")
        return None
    if path is None:
        # an index is of a whole folder, a run may have taken some of its images
        whole = Manifest.build(opened.sources["train"])
        own = default_index_folder(whole, judge.embedder)
        if not (own / "index.json").exists():
            say("no index of the training set: what comes back is compared with its target alone (`fastmem index`)")
            return None
        path = str(own)
    index = EmbeddingIndex(path, device, say)
    index.check_embedder(judge.embedder)
    missing = int((~index.contains(opened.manifests["train"].ids)).sum())
    if missing:
        say(f"{missing:,} of {len(opened.manifests['train']):,} training images are not in the index {path}")
    return index


def candidate_scores(opened: OpenedRun, workers: int | None) -> dict[str, np.ndarray]:
    """Candidate scores of every image of the run, by set: from its scoring pass, or from a pass of their own.

    Raises: UsageError where the pass is missing and the model is edited.
    """
    missing = [split for split in opened.manifests if opened.losses(split) is None]
    if missing and opened.edit is not None:
        raise UsageError(
            "expected candidates of the unedited model, got none in the run: run `fastmem extract` without --edit first"
        )
    if missing:
        count = sum(len(opened.manifests[split]) for split in missing)
        say(f"looking for candidates among {count:,} images, because the run was scored without --per-image")
        cache = TokenCache.open(AUTO, opened.model)
        with image_progress() as (start, advance):
            start(count)
            for split in missing:
                file = opened.folder.losses_file(split)
                source, manifest = opened.sources[split], opened.manifests[split]
                collect_losses(opened.model, source, manifest, file, workers=workers, cache=cache, advance=advance)
    return {split: opened.losses(split).hits for split in opened.manifests}


@contextmanager
def _progress(judge: Judge) -> Iterator[ExtractReporter]:
    with image_progress() as (start, advance):

        def planned(targets: int, completions: int) -> None:
            say(f"{targets:,} candidates, {completions:,} completions, judged by {judge.name} above {judge.threshold}")
            start(targets)

        yield ExtractReporter(say, planned, advance)


def run_extraction(
    opened: OpenedRun,
    judge: Judge,
    index: EmbeddingIndex | None,
    prefixes: tuple[int, ...],
    top_per_class: int,
    units: Path | None,
    batch_size: int = BATCH_ROWS,
    workers: int | None = None,
) -> Extraction:
    """The attack on an opened run, with progress on stderr."""
    scores = candidate_scores(opened, workers)
    matched = None
    if "heldout" in opened.manifests:
        matched, _ = opened.manifests["train"].match(opened.manifests["heldout"], opened.identity["settings"]["seed"])
    with _progress(judge) as reporter:
        return extract(
            opened.model,
            opened.sources,
            opened.manifests,
            scores,
            judge,
            index=index,
            prefixes=prefixes,
            top_per_class=top_per_class,
            matched=None if matched is None or matched.all() else matched,
            without=opened.chosen_on,
            folder=units,
            batch_size=batch_size,
            workers=workers,
            reporter=reporter,
        )


def finish(opened: OpenedRun, found: Extraction, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Write table, pictures and result.json; the work units go. Returns the document."""
    from fastmem.report.extraction_pictures import draw_extractions, draw_similarities

    heldout = opened.stats("heldout") if "heldout" in opened.manifests else None
    associations = find_associations(found, opened.stats(), heldout)
    document = {"run": str(opened.folder.path), "edit": opened.edit, **describe(found, associations)}
    document["settings"] = settings
    if opened.edit is not None:
        document["caution"] = CAUTION
    table, grid, histogram = (folder / f for f in ("verdicts.parquet", "extracted.png", "similarities.png"))
    title = opened.model.name + (f", edit {opened.edit}" if opened.edit else "")
    write_verdicts(table, found, opened.manifests)
    draw_extractions(grid, opened.model, opened.sources["train"], found, title)
    draw_similarities(histogram, found, title)
    document |= {"tables": [str(table)], "pictures": [str(grid), str(histogram)]}
    write_json(folder / "result.json", {"schema": SCHEMA} | document)
    shutil.rmtree(folder / "units")
    return document


def print_extraction(document: dict[str, Any]) -> None:
    """The extraction in words."""
    click.echo(
        f"{document['candidates']:,} candidates and {document['heldout_candidates']:,} held-out ones, extracted above "
        f"{document['threshold']} by {document['embedder']}\n"
    )
    click.echo(
        f"{'prefix':>6}  {'extracted':<28}{'distinct':>8}{'of the image':>14}  {'held-out':<28}{'1 % false alarms':>18}"
    )
    for prefix in map(str, document["prefixes"]):
        own = Count(document["extracted"][prefix], document["candidates"])
        other = Count(document["heldout_extracted"][prefix], document["heldout_candidates"])
        original = document["extracted_original"][prefix]
        threshold, at = document["false_alarm_threshold"][prefix], document["extracted_at_false_alarms"][prefix]
        alarms = "-" if threshold is None else f"{at} above {threshold:.3f}"
        click.echo(
            f"{prefix:>6}  {own!s:<28}{document['extracted_distinct'][prefix]:>8}"
            f"{'-' if original is None else original:>14}  {other!s:<28}{alarms:>18}"
        )
    if document["ceiling"] is not None:
        click.echo(f"\nceiling: the reconstructions of {document['ceiling']} candidates pass against their own images")
    for by, found in document["associations"].items():
        odds = "none" if found["odds_ratio"] is None else f"{found['odds_ratio']:.2f}"
        ends = ["infinite" if found[end] is None else f"{found[end]:.2f}" for end in ("low", "high")]
        click.echo(
            f"owners of the top 5 % by {by}: {found['owners_extracted']} of {found['owners']} extracted, others "
            f"{found['others_extracted']} of {found['others']}; odds ratio {odds} ({ends[0]} to {ends[1]})"
        )
    for path in (*document["tables"], *document["pictures"]):
        click.echo(path)


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
