"""``fastmem sweep``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from fastmem.cli.command import command as make_command
from fastmem.cli.command import option
from fastmem.cli.options import (
    ATTACK,
    JSON,
    WORK,
    RunOptions,
    attack_options,
    parse_share,
    print_document,
    run_options,
    sampling_options,
    say,
    sscd_options,
    tell,
)
from fastmem.cli.progress import terminal_reporter
from fastmem.errors import UsageError
from fastmem.report.sweep_tables import (
    attack_table,
    comparison_table,
    row_table,
    search_sentence,
    search_table,
    told_comparisons,
)
from fastmem.stages.opened_run import CAUTION
from fastmem.stages.options import AttackOptions, SamplingOptions, SSCDOptions
from fastmem.stages.sweep import sweep
from fastmem.sweep.plan import SELECTED
from fastmem.sweep.search import check_reduction

PLAN, COMPARED = "Which edits", "What they are compared by"
# options of a plan, not of a search, which goes through its own
PLAN_OPTIONS = ("fractions", "factors", "scope", "merge", "seeds", "declared_seeds", "equal_quality", "re_attack")


@make_command("sweep", "sweep --run runs/xxl --re-attack 5%", "sweep --run runs/xxl --resume --target-reduction 0.8")
@run_options
@option("--fractions", PLAN, "Shares of all units.", default="1%,2%,5%,10%,20%")
@option("--factors", PLAN, "What the units' rows are multiplied by.", default="0.5")
@option("--by", PLAN, "Selections, controls among them.", default=",".join(SELECTED))
@option("--scope", PLAN, "global, or per-layer.", default="global")
@option("--merge", PLAN, "How scores of segments become one: max, mean, sum.", default="max")
@option("--seeds", PLAN, "Draws of random and matched units.", type=int, default=3)
@option("--declared-seeds", PLAN, "Draws at the share that is declared for the model's family.", type=int, default=20)
@option(
    "--equal-quality",
    PLAN,
    "Shares at which random units are tuned to cost as much.  [default: the declared share]",
    metavar="SHARES",
)
@option("--re-attack", PLAN, "Attack the edits of these shares again, by other ways.", metavar="SHARES")
@option(
    "--target-reduction",
    PLAN,
    "Search instead for the cheapest edit that leaves 1-R of the extracted images.",
    type=float,
    metavar="R",
)
@attack_options
@option("--all-prefixes", ATTACK, "Use the model's whole ladder, not the longest prefix alone.", is_flag=True)
@option(
    "--cost",
    COMPARED,
    "Metric whose rise is the loss of quality.  [default: kd-sscd, without SSCD a loss]",
    metavar="METRIC",
)
@sampling_options("4 of every class")
@sscd_options
@option("--out", WORK, "Folder of the table.  [default: RUN/sweep]", metavar="FOLDER")
@option("--resume", WORK, "Go on with the table that is there; it may have other rows.", is_flag=True)
@JSON
@click.pass_context
def command(
    ctx: click.Context,
    where: RunOptions,
    fractions: str,
    factors: str,
    by: str,
    scope: str,
    merge: str,
    seeds: int,
    declared_seeds: int,
    equal_quality: str | None,
    re_attack: str | None,
    target_reduction: float | None,
    attack: AttackOptions,
    all_prefixes: bool,
    cost: str | None,
    sampling: SamplingOptions,
    sscd: SSCDOptions,
    out: str | None,
    resume: bool,
    as_json: bool,
) -> None:
    """Measures edits of many sizes and selections beside their controls: what is still extracted, and what they cost.

    Every row is one edit: its units are scaled, the same images attacked, the same number of images sampled, and the
    edit undone. Units by attribution are chosen on one half of the attacked images; every comparison is of the other
    half. Finished rows are kept, and --resume goes on after an interruption.
    """
    if target_reduction is not None:
        refuse_plan_options(ctx)
        check_reduction(target_reduction)
    with terminal_reporter() as reporter:
        found = sweep(
            where.open(reporter),
            fractions=parse_shares("--fractions", fractions),
            factors=parse_factors(factors),
            by=tuple(part.strip() for part in by.split(",")),
            scope=scope,
            merge=merge,
            seeds=seeds,
            declared_seeds=declared_seeds,
            equal_quality=None if equal_quality is None else parse_shares("--equal-quality", equal_quality),
            re_attack=() if re_attack is None else parse_shares("--re-attack", re_attack),
            target_reduction=target_reduction,
            all_prefixes=all_prefixes,
            cost=cost,
            sscd=sscd,
            out=out,
            resume=resume,
            reporter=reporter,
            **vars(attack),
            **vars(sampling),
        )
    print_document(found.document, as_json, print_sweep)
    say(CAUTION)


def refuse_plan_options(ctx: click.Context) -> None:
    """Raises: UsageError where an option was given that a search decides itself."""
    given = [name for name in PLAN_OPTIONS if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE]
    if given:
        name = given[0].replace("_", "-")
        raise UsageError(f"expected --target-reduction without --{name}, which the search decides: leave it out")


def parse_shares(name: str, text: str) -> tuple[float, ...]:
    """Shares of the units such as 1%,0.05. Raises: UsageError for anything else."""
    return tuple(parse_share(part, name) for part in text.split(","))


def parse_factors(text: str) -> tuple[float, ...]:
    """--factors as numbers. Raises: UsageError for anything else."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"expected --factors as numbers such as 0.5,0.25, got {text!r}") from error


def print_sweep(document: Mapping[str, Any]) -> None:
    """Counts and costs of every row, comparisons, what a search reached, re-attacks."""
    targets = f"{document['reported_targets']:,} of {document['targets']:,} targets"
    tell(f"counts are of the {targets} that no units were chosen by, judged by {document['judge']}", "")
    if "reached" in document:
        tell(*search_table(document).split("\n"), "", search_sentence(document))
    else:
        tell(*row_table(document).split("\n"))
    if document["comparisons"]:
        shown = told_comparisons(document["comparisons"])
        tell("", *comparison_table(shown).split("\n"))
        if len(shown) < len(document["comparisons"]):
            tell("", f"{len(document['comparisons']) - len(shown)} more comparisons are in sweep.json")
    for found in document["re_attacks"]:
        tell("", *attack_table(found).split("\n"))
    kept = [r["edit"] for r in document.get("reached", ()) if r["edit"]]
    if kept:
        tell("", "edits of the run, for --edit:", *kept)
    for path in (*document.get("tables", ()), *document.get("pictures", ())):
        tell(path)
