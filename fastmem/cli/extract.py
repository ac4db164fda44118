"""``fastmem extract``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from fastmem.cli.command import FROM_0, FROM_1, option
from fastmem.cli.command import command as make_command
from fastmem.cli.options import (
    ATTACK,
    EDIT,
    JSON,
    RESUME,
    THE_RUN,
    WORK,
    WORKERS,
    RunOptions,
    attack_options,
    print_document,
    run_options,
    say,
    sscd_options,
    tell,
)
from fastmem.cli.progress import terminal_reporter
from fastmem.errors import UsageError
from fastmem.extraction.attack import BATCH_ROWS
from fastmem.extraction.verdicts import Count
from fastmem.stages.extract import extract
from fastmem.stages.options import AttackOptions, SSCDOptions

BROKEN_BOUND = 1


@make_command("extract", "extract --run runs/xxl", "extract --run runs/xxl --edit unitmem-5pct-x0.5 --fail-above 30")
@run_options
@EDIT
@option("--index", THE_RUN, "Index of the training set.  [default: in FASTMEM_HOME]", metavar="INDEX")
@option(("--prefix", "prefixes"), ATTACK, "Prefix lengths in tokens.  [default: the model's]", metavar="P,...")
@attack_options
@option("--fail-above", ATTACK, "Exit with status 1 if more than N images are extracted.", type=FROM_0, metavar="N")
@sscd_options
@option("--batch-size", WORK, "Rows of tokens that are completed at once.", type=FROM_1, default=BATCH_ROWS)
@WORKERS
@RESUME
@JSON
@click.pass_context
def command(
    ctx: click.Context,
    where: RunOptions,
    edit: str | None,
    index: str | None,
    prefixes: str | None,
    attack: AttackOptions,
    fail_above: int | None,
    sscd: SSCDOptions,
    batch_size: int,
    workers: int | None,
    resume: bool,
    as_json: bool,
) -> None:
    """Pulls training images out of a scored model and judges what comes back.

    Candidates are the images of every class that the model predicts best. Each is completed from its first tokens,
    without guidance or sampling. It counts as extracted if the completion is more alike the tokenizer's reconstruction
    of the image than the threshold. The run's held-out images are attacked beside them. With an index every completion
    is also compared with the whole training set. Published counts are those of the longest prefix.
    """
    lengths = None if prefixes is None else parse_prefixes(prefixes)
    with terminal_reporter() as reporter:
        run = where.open(reporter)
        found = extract(
            run,
            edit,
            index,
            lengths,
            resume=resume,
            sscd=sscd,
            batch_size=batch_size,
            workers=workers,
            reporter=reporter,
            **vars(attack),
        )
    print_document(found.document, as_json, print_extraction)
    reached = found.extracted[max(found.extracted)]
    if fail_above is not None and reached > fail_above:
        say(f"{reached} images were extracted, more than the {fail_above} that --fail-above allows")
        ctx.exit(BROKEN_BOUND)


def parse_prefixes(text: str) -> tuple[int, ...]:
    """--prefix as numbers. Raises: UsageError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"expected --prefix as numbers of tokens such as 0,5,30, got {text!r}")
    return tuple(map(int, parts))


def print_extraction(document: Mapping[str, Any]) -> None:
    """The extraction in words."""
    tell(
        f"{document['candidates']:,} candidates and {document['heldout_candidates']:,} held-out ones, extracted above "
        f"{document['threshold']} by {document['embedder']}",
        "",
    )
    tell(
        f"{'prefix':>6}  {'extracted':<28}{'distinct':>8}{'of the image':>14}  {'held-out':<28}{'1 % false alarms':>18}"
    )
    for prefix in map(str, document["prefixes"]):
        own = Count(document["extracted"][prefix], document["candidates"])
        other = Count(document["heldout_extracted"][prefix], document["heldout_candidates"])
        original = document["extracted_original"][prefix]
        threshold, at = document["false_alarm_threshold"][prefix], document["extracted_at_false_alarms"][prefix]
        alarms = "-" if threshold is None else f"{at} above {threshold:.3f}"
        tell(
            f"{prefix:>6}  {own!s:<28}{document['extracted_distinct'][prefix]:>8}"
            f"{'-' if original is None else original:>14}  {other!s:<28}{alarms:>18}"
        )
    if document["ceiling"] is not None:
        tell("", f"ceiling: the reconstructions of {document['ceiling']} candidates pass against their own images")
    for by, found in document["associations"].items():
        odds = "none" if found["odds_ratio"] is None else f"{found['odds_ratio']:.2f}"
        ends = ["infinite" if found[end] is None else f"{found[end]:.2f}" for end in ("low", "high")]
        ratio = f"odds ratio {odds} ({ends[0]} to {ends[1]})"
        if found["odds_ratio"] is found["low"] is found["high"] is None:
            ratio = "no odds ratio"
        tell(
            f"owners of the top 5 % by {by}: {found['owners_extracted']} of {found['owners']} extracted, others "
            f"{found['others_extracted']} of {found['others']}; {ratio}"
        )
    for path in (*document["tables"], *document["pictures"]):
        tell(path)
