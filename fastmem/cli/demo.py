"""``fastmem demo``."""

from __future__ import annotations

import click

from fastmem.cli.extract import choose_judge, run_extraction
from fastmem.cli.options import say
from fastmem.cli.score import command as score_command
from fastmem.data.manifest import Manifest
from fastmem.demo.controls import format_membership, format_ownership, membership_by_dose, ownership
from fastmem.demo.extraction import ALL_IMAGES, extraction_by_dose, format_extraction, totals
from fastmem.demo.memorisation import an_eighth, dose_table, format_table
from fastmem.errors import UsageError
from fastmem.extraction.verdicts import SSCDJudge
from fastmem.index.build import build_index
from fastmem.index.embedding import PUBLISHED_SIZE
from fastmem.index.search import EmbeddingIndex
from fastmem.models.checkpoints import load_model
from fastmem.models.registry import entries
from fastmem.runs.folder import RunFolder
from fastmem.stages.opened_run import open_run


@click.command("demo")
@click.option("--model", metavar="NAME", help="An embedded model.  [default: the first of them]")
@click.option("--full", is_flag=True, help="Also what is known and owned by images of each dose.")
@click.option("--out", metavar="RUN", help="Run folder.  [default: runs/MODEL-DATE]")
@click.pass_context
def command(ctx: click.Context, model: str | None, full: bool, out: str | None) -> None:
    """Scores an embedded model on the embedded images: tables, pictures, and arrays in a run folder.

    The embedded models were trained on 823 of the 1,015 embedded pictures, some of them shown 2, 4, 8 or 16 times as
    often as the rest, so they memorise in graded doses. --full adds what is known of each dose: what comes back from a
    prefix, how well the loss tells it from held-out images, which share of the highest units it owns, and what SSCD
    finds extracted when every image is tried.
    """
    name = _choose(model)
    result = ctx.invoke(score_command, model=name, out=out, cfg=True)
    if not full:
        return
    folder = RunFolder(result.run)
    manifests = {split: Manifest.load(folder.manifest_file(split)) for split in ("train", "heldout")}
    loaded = load_model(name)
    say(f"\ngenerating from the first {an_eighth(loaded)} of the {loaded.num_tokens} tokens of every image")
    click.echo(format_table(dose_table(loaded)))
    known = membership_by_dose(result, manifests["train"])
    click.echo(f"\nMembership inference against held-out images:\n\n{format_membership(known)}")
    click.echo(f"\n{format_ownership(ownership(result, manifests))}")
    _extract_everything(folder)


def _extract_everything(folder: RunFolder) -> None:
    from fastmem.report.extraction_pictures import draw_dose_response

    opened = open_run(str(folder.path))
    judge = choose_judge("auto", None, None, False, PUBLISHED_SIZE, "auto")
    index = None
    if isinstance(judge, SSCDJudge):
        say("embedding the training images, where they are not yet")
        index = EmbeddingIndex(build_index(opened.sources["train"], judge.embedder).path)
    found = run_extraction(opened, judge, index, opened.model.prefixes, ALL_IMAGES, None)
    by_dose = extraction_by_dose(found, opened.manifests["train"])
    click.echo(f"\nExtracted when every image is tried, by {found.judge} above {found.threshold}:\n")
    click.echo(format_extraction(by_dose | totals(found), found.prefixes))
    picture = folder.path / "dose-response.png"
    draw_dose_response(picture, by_dose, found.prefixes, f"{opened.model.name}: extracted, by {found.judge}")
    click.echo(f"\n{picture}")


def _choose(name: str | None) -> str:
    embedded = [entry.name for entry in entries().values() if entry.embedded]
    if name is None:
        return embedded[0]
    if name not in embedded:
        raise UsageError(f"expected an embedded model out of {', '.join(embedded)}, got {name!r}")
    return name
