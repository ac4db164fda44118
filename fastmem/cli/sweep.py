"""``fastmem sweep``."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from fastmem.cli.evaluate import image_doses
from fastmem.cli.extract import candidate_scores, choose_judge
from fastmem.cli.mitigate import default_name, keep, parse_share
from fastmem.cli.opening import CAUTION, OpenedRun, open_run, run_options
from fastmem.cli.options import JSON, print_json, say
from fastmem.cli.progress import duration, image_progress
from fastmem.cli.sweep_output import print_document
from fastmem.data.token_cache import AUTO, TokenCache
from fastmem.errors import UsageError
from fastmem.extraction.candidates import TOP_PER_CLASS
from fastmem.extraction.embedding import PUBLISHED_SIZE
from fastmem.extraction.verdicts import Judge, SSCDJudge
from fastmem.files import write_json
from fastmem.mitigation.edit_file import edit_path
from fastmem.models.registry import home
from fastmem.quality.features import SSCDFeatures
from fastmem.quality.samples import BATCH
from fastmem.runs import RunFolder
from fastmem.sweep.findings import COSTS, SAMPLED_COST, find, write_table
from fastmem.sweep.plan import ATTRIBUTION, NO_EDIT, SELECTED, Row, SweepSettings, percent, plan_hash, plan_rows
from fastmem.sweep.plot import draw_sweep
from fastmem.sweep.prepare import BenchSettings, Prepared, prepare
from fastmem.sweep.reattack import Attacker, ReAttack, attack_edits_again
from fastmem.sweep.search import (
    CONFIRMED,
    beats,
    check_reduction,
    most_work,
    plain_halving,
    recipes,
    search,
    unedited_rows,
)
from fastmem.sweep.table import SweepPlan, SweepReporter, Table, measure_rows

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


def identify(opened: OpenedRun, bench: BenchSettings, judge: Judge) -> dict[str, Any]:
    """What all rows of a table have in common, for a sweep that goes on."""
    return {
        "stage": "sweep",
        "model": opened.model.name,
        **opened.model.fingerprint(),
        "dtype": str(opened.model.dtype).removeprefix("torch."),
        "device": opened.model.device.type,
        "manifests": {split: manifest.hash for split, manifest in opened.manifests.items()},
        "statistics": {
            split: hashlib.sha256(opened.folder.stats_file(split).read_bytes()).hexdigest()
            for split in opened.manifests
        },
        "judge": judge.name,
        "threshold": judge.threshold,
        # as a file has it: lists for tuples
        "bench": {name: list(v) if isinstance(v, tuple) else v for name, v in vars(bench).items()},
    }


def prepare_bench(opened: OpenedRun, settings: BenchSettings, judge: Judge) -> Prepared:
    """The bench of an opened run; without an embedder quality is measured by losses, said aloud."""
    extractor = SSCDFeatures(judge.embedder) if isinstance(judge, SSCDJudge) else None
    if extractor is None:
        say("quality by the loss of held-out images alone, at its best temperature, because there is no embedder")
    return prepare(
        opened.model,
        opened.sources,
        opened.manifests,
        {split: opened.stats(split) for split in opened.manifests},
        candidate_scores(opened, None)["train"],
        judge,
        extractor,
        settings,
        image_doses(opened),
        home() / "features",
    )


def choose_cost(named: str | None, table: Table) -> str:
    """The metric whose rise is the loss of quality. Raises: UsageError for one that there are too few images for."""
    known = [name for name in COSTS if name in table.measure(NO_EDIT).metrics]
    if named is not None and named not in known:
        raise UsageError(f"expected --cost as one of {', '.join(known)}, which were measured, got {named!r}")
    return named or known[0]


def run_plan(
    opened: OpenedRun, folder: RunFolder, table: Table, prepared: Prepared, rows: Sequence[Row], cost: str
) -> dict[str, Any]:
    """Measure every row, and write table and picture; returns the document."""
    with image_progress("rows") as (start, advance):

        def planned(plan: SweepPlan) -> None:
            say(describe(plan, prepared))
            start(plan.rows)

        measured = measure_rows(table, rows, SweepReporter(planned, advance))
    found = find(measured, prepared.counted, cost)
    files = folder.path / "sweep.parquet", folder.path / "sweep.png"
    write_table(files[0], found)
    draw_sweep(files[1], found, title(opened, prepared))
    return found.document() | {"plan": plan_hash(rows), "tables": [str(files[0])], "pictures": [str(files[1])]}


def describe(plan: SweepPlan, prepared: Prepared) -> str:
    """One line before long work: rows, generations and samples of each, and how long at the first row's speed."""
    done = f" ({plan.done:,} are done)" if plan.done > 1 else ""
    generations = len(prepared.targets) * len(prepared.bench.prefixes)
    return (
        f"{plan.rows:,} rows{done} with {generations:,} generations and {prepared.settings.samples:,} samples each, "
        f"about {duration(plan.seconds)} at the speed of the first"
    )


def title(opened: OpenedRun, prepared: Prepared) -> str:
    """What the picture is of."""
    bench = prepared.bench
    return f"{opened.model.name}: targets extracted from {bench.prefixes[-1]} tokens, judged by {bench.judge.name}"


def run_search(
    opened: OpenedRun, table: Table, prepared: Prepared, reduction: float, cost: str, by: Sequence[str]
) -> dict[str, Any]:
    """Search the recipes of the selections ``by``, and keep the confirmed ones as edits of the run; returns the
    document, cheapest edit first."""
    rows = recipes(by)
    attacks, qualities = most_work(rows)
    # either takes less than the first row, which is both
    seconds = table.measure(NO_EDIT).seconds * max(attacks, qualities)
    say(
        f"searching {len(rows)} recipes for a reduction of {reduction:.0%}: at most {attacks} attacks and quality "
        f"{qualities} times, at most about {duration(seconds)} at the speed of the first row"
    )
    with image_progress("steps") as (start, advance):
        start(len(rows) + CONFIRMED)
        reached = search(table, prepared.counted, reduction, cost, rows, advance)
    found = find([*unedited_rows(table), *(m for r in reached for m in r.measured)], prepared.counted, cost)
    plain = plain_halving(reached)
    edits = {r.row: keep_edit(opened, prepared, r.row) for r in reached if r.confirmation is not None}
    # recipes differ in more than the selection, so that the comparisons of a plan say nothing of them
    return found.document() | {
        "comparisons": [],
        "target_reduction": reduction,
        "reached": [r.record() | {"beats_plain": beats(r), "edit": edits.get(r.row)} for r in reached],
        "plain_halving": None if plain is None else plain.record(),
    }


def keep_edit(opened: OpenedRun, prepared: Prepared, row: Row) -> str:
    """Write a row's edit into the run's edits folder, for --edit of the other commands; returns its name."""
    name = default_name(row.by, row.fraction, row.scope, row.merge, row.factor, row.seed)
    name = "-".join(["search", name, *["graded"] * row.graded, *[f"{row.rounds}rounds"] * (row.rounds > 1)])
    # halves, draws and statistics are the sweep's: another one's edit of the same recipe is another edit
    plan = prepared.bench.plan(row)
    digest = hashlib.sha256(plan.unit.numpy().tobytes() + plan.factor.numpy().tobytes()).hexdigest()[:8]
    keep(plan, edit_path(opened.folder, f"{name}-{digest}"))
    return f"{name}-{digest}"


def run_again(opened: OpenedRun, folder: RunFolder, prepared: Prepared, rows: Sequence[Row]) -> list[ReAttack]:
    """Attack edits again, on the targets that are reported; none where there are no rows."""
    if not rows:
        return []
    images = len(opened.manifests["train"])
    say(f"attacking {len(rows)} edits again, each with a pass over {images:,} images for the edited model's candidates")
    reported = prepared.counted.reported

    def make_attacker() -> Attacker:
        return Attacker(
            opened.model,
            opened.sources["train"],
            opened.manifests["train"],
            prepared.bench.judge,
            prepared.targets.take(reported),
            prepared.targets.ids[~reported],
            prepared.bench.prefixes[-1],
            TokenCache.open(AUTO, opened.model),
        )

    with image_progress() as (start, advance):
        start(len(rows) * images)
        return attack_edits_again(make_attacker, rows, prepared.bench, folder.path / "re-attacks", advance)
