"""The work of ``fastmem sweep``: its bench, the plan's rows, a search, and edits attacked again, with progress."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from fastmem.cli.evaluate import image_doses
from fastmem.cli.extract import candidate_scores
from fastmem.cli.mitigate import default_name, keep
from fastmem.cli.options import say
from fastmem.cli.progress import duration, image_progress
from fastmem.errors import UsageError
from fastmem.extraction.verdicts import Judge, SSCDJudge
from fastmem.mitigation.edit_file import edit_path
from fastmem.models.registry import home
from fastmem.quality.features import SSCDFeatures
from fastmem.report.sweep_pictures import draw_sweep
from fastmem.runs.folder import RunFolder
from fastmem.stages.opened_run import OpenedRun
from fastmem.sweep.findings import COSTS, find, write_table
from fastmem.sweep.plan import NO_EDIT, Row, plan_hash
from fastmem.sweep.prepare import BenchSettings, Prepared, prepare
from fastmem.sweep.reattack import Attacker, ReAttack, attack_edits_again
from fastmem.sweep.search import CONFIRMED, beats, most_work, plain_halving, recipes, search, unedited_rows
from fastmem.sweep.table import SweepPlan, SweepReporter, Table, measure_rows
from fastmem.tokens.cache import AUTO, TokenCache


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
