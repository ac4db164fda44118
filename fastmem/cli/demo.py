"""``fastmem demo``."""

from __future__ import annotations

from fastmem.cli.command import GENERAL, option
from fastmem.cli.command import command as make_command
from fastmem.cli.options import tell
from fastmem.cli.progress import terminal_reporter
from fastmem.cli.score import print_score
from fastmem.demo.controls import format_membership, format_ownership
from fastmem.demo.extraction import format_extraction
from fastmem.demo.memorisation import format_table
from fastmem.models.registry import SMALL_EXAMPLE
from fastmem.stages.demo import demo


@make_command("demo", "demo", f"demo --model {SMALL_EXAMPLE} --full")
@option("--model", GENERAL, "An embedded model.  [default: the first of them]", metavar="NAME")
@option("--full", GENERAL, "Also find what is known, owned and extracted of the images of each dose.", is_flag=True)
@option("--out", GENERAL, "Run folder.  [default: runs/MODEL-DATE]", metavar="RUN")
def command(model: str | None, full: bool, out: str | None) -> None:
    """Scores an embedded model on the embedded images: tables, pictures, and arrays in a run folder.

    The embedded models were trained on 823 of the 1,015 embedded pictures, some of them shown 2, 4, 8 or 16 times as
    often as the rest, so they memorise in graded doses. --full adds what is known of each dose: what comes back from a
    prefix, how well the loss tells it from held-out images, which share of the highest units it owns, and what SSCD
    finds extracted when every image is tried.
    """
    with terminal_reporter() as reporter:
        found = demo(model, full, out, reporter)
    print_score(found.scored.document, found.scored.findings, as_json=False)
    if found.extracted is None:
        return
    tell("", "Generated from the first eighth of every image's tokens:", "", *format_table(found.known).split("\n"))
    tell("", "Membership inference against held-out images:", "", *format_membership(found.membership).split("\n"))
    tell("", *format_ownership(found.owned).split("\n"))
    extracted = found.extracted
    tell("", f"Extracted when every image is tried, by {extracted.judge} above {extracted.threshold}:", "")
    tell(*format_extraction(extracted.counts, extracted.prefixes).split("\n"), "", extracted.picture)
