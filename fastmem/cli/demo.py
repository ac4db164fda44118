"""``fastmem demo``."""

from __future__ import annotations

from pathlib import Path

from fastmem.cli.command import GENERAL, option
from fastmem.cli.command import command as make_command
from fastmem.cli.options import tell
from fastmem.cli.progress import terminal_reporter
from fastmem.cli.score import print_score
from fastmem.demo.controls import format_membership, format_ownership
from fastmem.demo.extraction import format_extraction
from fastmem.demo.memorisation import format_table
from fastmem.models.registry import SMALL_EXAMPLE
from fastmem.stages.demo import DemoResult, Doses, demo, embedded_models


@make_command("demo", "demo", f"demo --model {SMALL_EXAMPLE} --full")
@option("--model", GENERAL, "An embedded model.  [default: the first; with --full, all]", metavar="NAME")
@option("--full", GENERAL, "All models, views and prefixes, and what is known of each dose.", is_flag=True)
@option("--out", GENERAL, "Run folder.  [default: runs/MODEL-DATE]", metavar="RUN")
def command(model: str | None, full: bool, out: str | None) -> None:
    """Goes through a whole study of an embedded model: score, extract, mitigate, extract again, evaluate, report.

    It ends with what was learnt and the path of a page to open in a browser. The embedded models were trained on 823 of
    the 1,015 embedded pictures, some of them shown 2, 4, 8 or 16 times as often as the rest, so they memorise in graded
    doses. --full adds what is known of each dose: what comes back from a prefix, how well the loss tells it from
    held-out images, which share of the highest units it owns, and what SSCD finds extracted when every image is tried.
    """
    every = full and model is None
    for name in embedded_models() if every else [model]:
        folder = str(Path(out) / name) if every and out is not None and name is not None else out
        with terminal_reporter() as reporter:
            found = demo(name, full, folder, reporter)
        print_demo(found)


def print_demo(found: DemoResult) -> None:
    """What was learnt, and where the page is; with the tables by dose, where there are any."""
    if found.doses is not None:
        print_score(found.scored.document, found.scored.findings, as_json=False)
        print_doses(found.doses)
        tell("")
    tell("What was learnt:", "", *found.lessons, "", f"Open in a browser: {found.page}")


def print_doses(doses: Doses) -> None:
    """The tables by dose."""
    tell("", "Generated from the first eighth of every image's tokens:", "", *format_table(doses.known).split("\n"))
    tell("", "Membership inference against held-out images:", "", *format_membership(doses.membership).split("\n"))
    tell("", *format_ownership(doses.owned).split("\n"))
    extracted = doses.extracted
    tell("", f"Extracted when every image is tried, by {extracted.judge} above {extracted.threshold}:", "")
    tell(*format_extraction(extracted.counts, extracted.prefixes).split("\n"), "", extracted.picture)
