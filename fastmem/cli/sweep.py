"""``fastmem sweep``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from fastmem.cli.extract import choose_judge
from fastmem.cli.mitigate import parse_share
from fastmem.cli.options import JSON, print_json, say
from fastmem.cli.sweep_output import print_document
from fastmem.errors import UsageError
from fastmem.extraction.candidates import TOP_PER_CLASS
from fastmem.extraction.verdicts import SSCDJudge
from fastmem.files import write_json
from fastmem.index.embedding import PUBLISHED_SIZE
from fastmem.quality.samples import BATCH
from fastmem.runs.folder import RunFolder
from fastmem.stages.opened_run import CAUTION, open_run, run_options
from fastmem.stages.sweep import choose_cost, identify, prepare_bench, run_again, run_plan, run_search
from fastmem.sweep.findings import COSTS, SAMPLED_COST
from fastmem.sweep.plan import ATTRIBUTION, SELECTED, Row, SweepSettings, percent, plan_rows
from fastmem.sweep.prepare import BenchSettings
from fastmem.sweep.search import check_reduction
from fastmem.sweep.table import Table

SCHEMA = "fastmem.sweep/1"
SAMPLES_PER_CLASS = 4
# of a plan, not of a search, which goes through its own
PLAN_OPTIONS = ("fractions", "factors", "scope", "merge", "seeds", "declared_seeds", "equal_quality", "re_attack")


@click.command("sweep")
@run_options
@click.option("--fractions", default="1%,2%,5%,10%,20%", show_default=True, help="Shares of all units.")
@click.option("--factors", default="0.5", show_default=True, help="What the units' rows are multiplied by.")
@click.option("--by", default=",".join(SELECTED), show_default=True, help="Selections, controls among them.")
@click.option("--scope", default="global", show_default=True, help="global or per-layer.")
@click.option("--merge", default="max", show_default=True, help="Segments to one score: max, mean or sum.")
@click.option("--seeds", type=int, default=3, show_default=True, help="Of random and matched units.")
@click.option("--declared-seeds", type=int, default=20, show_default=True, help="At the model's declared fraction.")
@click.option("--equal-quality", metavar="SHARES", help="Random at equal quality there.  [default: the declared one]")
@click.option("--re-attack", metavar="SHARE", help="Attack the edits of this share again, by other ways.")
@click.option("--target-reduction", type=float, metavar="R", help="Search the best edit that leaves 1-R extracted.")
@click.option("--samples", type=click.IntRange(3), help="Of which quality is measured.  [default: 4 of every class]")
@click.option("--all-prefixes", is_flag=True, help="Attack with the model's whole ladder, not the longest alone.")
@click.option("--top-per-class", type=click.IntRange(1), default=TOP_PER_CLASS, show_default=True, help="Targets.")
@click.option("--judge", default="auto", show_default=True, help="sscd, tokens (without an embedder), or auto.")
@click.option("--threshold", type=float, help="Extracted above this similarity.  [default: 0.75, of tokens 0.9]")
@click.option("--sscd", metavar="FILE", help="Meta's sscd_disc_mixup.torchscript.pt.  [default: in FASTMEM_HOME]")
@click.option("--trust-sscd", is_flag=True, help="Load a TorchScript file of unknown SHA-256, which can run any code.")
@click.option("--size", "side", type=int, default=PUBLISHED_SIZE, show_default=True, help="Side of a picture; or 288.")
@click.option("--cost", metavar="METRIC", help="Whose rise is the loss of quality.  [default: kd-sscd, else by losses]")
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of samples, and of the halves of targets."
)
@click.option("--batch-size", type=click.IntRange(1), default=BATCH, show_default=True, help="Samples of a batch.")
@click.option("--out", metavar="FOLDER", help="Where the table is kept.  [default: RUN/sweep]")
@click.option("--resume", is_flag=True, help="Go on with a table, which may have other rows before.")
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
    samples: int | None,
    all_prefixes: bool,
    top_per_class: int,
    judge: str,
    threshold: float | None,
    sscd: str | None,
    trust_sscd: bool,
    side: int,
    cost: str | None,
    seed: int,
    batch_size: int,
    out: str | None,
    resume: bool,
    as_json: bool,
) -> dict[str, Any]:
    """Edits of many sizes and selections beside their controls: what is still extracted, and what quality they cost.

    Every row is one edit: its units are scaled, the same targets attacked, the same number of images sampled, and the
    edit undone. Units by attribution are chosen on one half of the targets; every comparison is of the other half.
    Rows are kept as they are finished: after an interruption --resume goes on.
    """
    if target_reduction is not None:
        refuse_plan_options(ctx)
        check_reduction(target_reduction)
    opened = open_run(
        run,
        data=data,
        heldout=heldout,
        classes=classes,
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
    )
    settings = SweepSettings(
        declared=opened.model.declared_fraction,
        fractions=parse_shares("--fractions", fractions),
        factors=parse_factors(factors),
        by=tuple(part.strip() for part in by.split(",")),
        seeds=seeds,
        declared_seeds=declared_seeds,
        equal_quality=None if equal_quality is None else parse_shares("--equal-quality", equal_quality),
        scope=scope,
        merge=merge,
    )
    again = () if re_attack is None else edits_at(plan_rows(settings), parse_shares("--re-attack", re_attack))
    chosen = choose_judge(judge, threshold, sscd, trust_sscd, side, device)
    bench = BenchSettings(
        opened.model.prefixes if all_prefixes else opened.model.prefixes[-1:],
        # without an embedder no feature of a sample could be had
        (samples or SAMPLES_PER_CLASS * opened.model.num_classes) if isinstance(chosen, SSCDJudge) else 0,
        # a search chooses by one half of the targets, whatever it searches
        halved=ATTRIBUTION in settings.by or target_reduction is not None,
        top_per_class=top_per_class,
        seed=seed,
        batch_size=batch_size,
    )
    metrics = COSTS if isinstance(chosen, SSCDJudge) else tuple(name for name in COSTS if name != SAMPLED_COST)
    if cost is not None and cost not in metrics:
        raise UsageError(f"expected --cost as one of {', '.join(metrics)}, got {cost!r}")
    folder = RunFolder(Path(out) if out is not None else opened.folder.path / "sweep")
    identity = identify(opened, bench, chosen)
    if not folder.check(identity, resume):
        folder.start(identity)
    say("tokenizing targets and held-out images, and measuring the model without an edit")
    prepared = prepare_bench(opened, bench, chosen)
    table = Table(folder.path / "rows", prepared.bench)
    metric = choose_cost(cost, table)
    if target_reduction is None:
        document = run_plan(opened, folder, table, prepared, plan_rows(settings), metric)
    else:
        document = run_search(opened, table, prepared, target_reduction, metric, settings.by)
    document = {"run": str(opened.folder.path), "judge": chosen.name, "threshold": chosen.threshold} | document
    document["caution"] = CAUTION
    document["re_attacks"] = [found.record() for found in run_again(opened, folder, prepared, again)]
    name = "sweep" if target_reduction is None else "search"
    write_json(folder.path / f"{name}.json", {"schema": SCHEMA} | document)
    if as_json:
        print_json(document)
    else:
        print_document(document)
    say(CAUTION)
    return document


def refuse_plan_options(ctx: click.Context) -> None:
    """Raises: UsageError where an option was given that a search decides itself."""
    given = [name for name in PLAN_OPTIONS if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE]
    if given:
        option = given[0].replace("_", "-")
        raise UsageError(f"expected --target-reduction without --{option}, which the search decides: leave it out")


def parse_shares(option: str, text: str) -> tuple[float, ...]:
    """Shares of the units such as 1%,0.05. Raises: UsageError for anything else."""
    return tuple(parse_share(part, option) for part in text.split(","))


def parse_factors(text: str) -> tuple[float, ...]:
    """--factors as numbers. Raises: UsageError for anything else."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"expected --factors as numbers such as 0.5,0.25, got {text!r}") from error


def edits_at(rows: Sequence[Row], fractions: Sequence[float]) -> tuple[Row, ...]:
    """The rows of these fractions at the plan's first factor, a seed of each selection.

    Raises: UsageError for a fraction that the plan lacks.
    """
    found = []
    for fraction in fractions:
        edits = [row for row in rows if row.fraction == fraction and row.seed == 0]
        if not edits:
            raise UsageError(f"expected --re-attack as one of --fractions, got {percent(fraction)}: add it there")
        found += [row for row in edits if row.factor == edits[0].factor]
    return tuple(found)
