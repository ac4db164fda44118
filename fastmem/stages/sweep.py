"""A sweep as a stage: edits of many sizes and selections beside their controls, as one table that can be resumed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastmem.errors import UsageError
from fastmem.extraction.candidates import TOP_PER_CLASS
from fastmem.extraction.verdicts import Judge, SSCDJudge
from fastmem.files import write_json
from fastmem.home import home
from fastmem.mitigation.edit_file import edit_path
from fastmem.quality.features import SSCDFeatures
from fastmem.quality.samples import BATCH
from fastmem.report.sweep_pictures import draw_sweep
from fastmem.reporter import QUIET, Reporter, Work, duration
from fastmem.runs.folder import RunFolder, run_id
from fastmem.runs.owner import owned
from fastmem.stages.evaluate import image_doses
from fastmem.stages.extract import candidate_scores
from fastmem.stages.mitigate import default_name, keep_edit
from fastmem.stages.opened_run import CAUTION, OpenedRun
from fastmem.stages.options import USUAL_SSCD, AttackOptions, SamplingOptions, SSCDOptions
from fastmem.stages.result import StageResult, settings_document
from fastmem.sweep.findings import COSTS, SAMPLED_COST, find, write_sweep_table
from fastmem.sweep.plan import (
    ATTRIBUTION,
    FRACTIONS,
    HALVED,
    NO_EDIT,
    SELECTED,
    Row,
    SweepSettings,
    percent,
    plan_hash,
    plan_rows,
)
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
from fastmem.sweep.table import Table, measure_rows

SCHEMA = "fastmem.sweep/1"
SAMPLES_PER_CLASS = 4


class SweepResult(StageResult):
    """The table of a sweep, or what a search reached; ``path`` is its folder."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A record of every row: its settings, counts, metrics and costs."""
        return list(self.document["rows"])

    @property
    def pareto(self) -> list[int]:
        """Positions of the rows that no other row beats in both what is extracted and what it costs."""
        return list(self.document["pareto"])


@dataclass(frozen=True)
class _Sweep:
    """One sweep of a run: where its table lies, what its rows share, and whom it tells."""

    run: OpenedRun
    folder: RunFolder
    table: Table
    prepared: Prepared
    cost: str
    reporter: Reporter


def sweep(
    run: OpenedRun,
    *,
    fractions: Sequence[float] = FRACTIONS,
    factors: Sequence[float] = (HALVED,),
    by: Sequence[str] = SELECTED,
    scope: str = "global",
    merge: str = "max",
    seeds: int = 3,
    declared_seeds: int = 20,
    equal_quality: Sequence[float] | None = None,
    re_attack: Sequence[float] = (),
    target_reduction: float | None = None,
    all_prefixes: bool = False,
    top_per_class: int = TOP_PER_CLASS,
    judge: str = "auto",
    threshold: float | None = None,
    sscd: SSCDOptions = USUAL_SSCD,
    cost: str | None = None,
    samples: int | None = None,
    seed: int = 0,
    batch_size: int = BATCH,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    reporter: Reporter = QUIET,
) -> SweepResult:
    """Measure edits of many sizes and selections beside their controls: what is still extracted, and what they cost.

    Every row is one edit: its units are scaled, the same targets attacked, the same number of images sampled, and the
    edit undone. Units by attribution are chosen on one half of the targets; every comparison is of the other half.

    Args:
        run: the run.
        fractions: shares of all units.
        factors: what the units' rows are multiplied by.
        by: selections, controls among them.
        scope: "global" or "per-layer".
        merge: how scores of several segments become one: "max", "mean" or "sum".
        seeds: how many draws of random and matched units.
        declared_seeds: how many at the share that is declared for the model's family.
        equal_quality: shares at which random units are tuned to cost as much; None for the declared share.
        re_attack: shares whose edits are attacked again by other ways.
        target_reduction: search instead for the cheapest edit that leaves 1 - R of the extracted targets.
        all_prefixes: attack with the model's whole ladder, rather than with the longest prefix alone.
        top_per_class: how many images of every class are targets.
        judge: "sscd", "tokens" or "auto"; see ``AttackOptions``.
        threshold: see ``AttackOptions``.
        sscd: which SSCD model compares pictures, and makes the features of samples.
        cost: the metric whose rise is the loss of quality; None takes kd-sscd, and without an SSCD model a loss.
        samples: images that are sampled for every row; None for 4 of every class.
        seed: of the samples, and of the halves of the targets.
        batch_size: samples that are drawn at once, which changes the draws.
        out: folder of the table; None for RUN/sweep.
        resume: go on with the table that is there, which may have other rows.
        reporter: is told plans, rows that are done, and what a person should know.

    Raises: UsageError for options that do not fit, a run without held-out images, or a folder that holds another table;
    InputFileError for a missing or damaged file. KeyboardInterrupt keeps the rows that were measured.
    """
    if target_reduction is not None:
        check_reduction(target_reduction)
    attacks, sampling = AttackOptions(top_per_class, judge, threshold), SamplingOptions(samples, seed, batch_size)
    settings = SweepSettings(
        run.model.declared_fraction,
        tuple(fractions),
        tuple(factors),
        tuple(by),
        seeds,
        declared_seeds,
        None if equal_quality is None else tuple(equal_quality),
        scope,
        merge,
    )
    again = _edits_at(plan_rows(settings), re_attack)
    chosen = attacks.choose_judge(sscd, str(run.model.device), reporter)
    with_samples = isinstance(chosen, SSCDJudge)
    metrics = COSTS if with_samples else tuple(name for name in COSTS if name != SAMPLED_COST)
    if cost is not None and cost not in metrics:
        raise UsageError(f"expected --cost as one of {', '.join(metrics)}, got {cost!r}")
    bench = BenchSettings(
        run.model.prefixes if all_prefixes else run.model.prefixes[-1:],
        # without an embedder no feature of a sample could be had
        (sampling.samples or SAMPLES_PER_CLASS * run.model.num_classes) if with_samples else 0,
        # a search chooses by one half of the targets, whatever it searches
        halved=ATTRIBUTION in settings.by or target_reduction is not None,
        top_per_class=top_per_class,
        seed=seed,
        batch_size=batch_size,
    )
    folder = RunFolder(Path(out) if out is not None else run.path / "sweep")
    with owned(folder.path, "sweep"):
        identity = _identify(run, bench, chosen)
        if not folder.check(identity, resume):
            folder.start(identity)
        prepared = _prepare(run, bench, chosen, reporter)
        table = Table(folder.path / "rows", prepared.bench, run_id(identity))
        work = _Sweep(run, folder, table, prepared, _choose_cost(cost, table), reporter)
        if target_reduction is None:
            document = _measure_plan(work, plan_rows(settings))
        else:
            document = _search(work, target_reduction, settings.by)
        named = {"run": str(run.path), "run_id": run.id, "judge": chosen.name, "threshold": chosen.threshold}
        document = named | document
        document["caution"] = CAUTION
        document["re_attacks"] = [found.record() for found in _attack_again(work, again)]
        name = "sweep" if target_reduction is None else "search"
        write_json(folder.path / f"{name}.json", {"schema": SCHEMA} | document)
        return SweepResult(folder.path, document)


def _edits_at(rows: Sequence[Row], fractions: Sequence[float]) -> tuple[Row, ...]:
    """The rows of these fractions at the plan's first factor, with the first seed of each selection."""
    found = []
    for fraction in fractions:
        edits = [row for row in rows if row.fraction == fraction and row.seed == 0]
        if not edits:
            raise UsageError(f"expected --re-attack as one of --fractions, got {percent(fraction)}: add it there")
        found += [row for row in edits if row.factor == edits[0].factor]
    return tuple(found)


def _identify(run: OpenedRun, bench: BenchSettings, judge: Judge) -> dict[str, Any]:
    """What all rows of a table have in common, for a sweep that goes on."""
    return {
        "stage": "sweep",
        "model": run.model.name,
        **run.weights(),
        "manifests": {split: manifest.hash for split, manifest in run.manifests.items()},
        "statistics": {
            split: hashlib.sha256(run.folder.stats_file(split).read_bytes()).hexdigest() for split in run.manifests
        },
        "judge": judge.name,
        "threshold": judge.threshold,
        "bench": settings_document(bench),
    }


def _prepare(run: OpenedRun, settings: BenchSettings, judge: Judge, reporter: Reporter) -> Prepared:
    """The bench of a run; without an embedder quality is measured by losses alone."""
    extractor = SSCDFeatures(judge.embedder) if isinstance(judge, SSCDJudge) else None
    if extractor is None:
        reporter.note(
            "quality by the loss of held-out images alone, at its best temperature, because there is no embedder"
        )
    scores = candidate_scores(run, reporter=reporter)["train"]
    reporter.note("tokenizing targets and held-out images, and measuring the model without an edit")
    return prepare(
        run.model,
        run.sources,
        run.manifests,
        run.stats(),
        scores,
        judge,
        extractor,
        settings,
        image_doses(run),
        tokens=run.cache,
        features=home() / "features",
        reporter=reporter,
    )


def _choose_cost(named: str | None, table: Table) -> str:
    """The metric whose rise is the loss of quality. Raises: UsageError for one that there are too few images for."""
    measured = table.measure(NO_EDIT).metrics or {}
    known = [name for name in COSTS if name in measured]
    if named is not None and named not in known:
        raise UsageError(f"expected --cost as one of {', '.join(known)}, which were measured, got {named!r}")
    return named or known[0]


def _measure_plan(work: _Sweep, rows: Sequence[Row]) -> dict[str, Any]:
    """Measure every row, and write table and picture; returns the document."""
    bench = work.prepared.bench
    generations = len(work.prepared.targets) * len(bench.prefixes)
    each = f" with {generations:,} generations and {work.prepared.settings.samples:,} samples each"
    measured = measure_rows(work.table, rows, work.reporter, each)
    found = find(measured, work.prepared.counted, work.cost)
    files = work.folder.path / "sweep.parquet", work.folder.path / "sweep.png"
    title = f"{work.run.model.name}: targets extracted from {bench.prefixes[-1]} tokens, judged by {bench.judge.name}"
    write_sweep_table(files[0], found)
    draw_sweep(files[1], found, title)
    return found.document() | {"plan": plan_hash(rows), "tables": [str(files[0])], "pictures": [str(files[1])]}


def _search(work: _Sweep, reduction: float, by: Sequence[str]) -> dict[str, Any]:
    """Search the recipes of the selections ``by``, and keep the confirmed ones as edits of the run.

    Returns the document, whose edits are ordered by what they cost.
    """
    rows = recipes(by)
    attacks, qualities = most_work(rows)
    # either takes less than the first row, which is both
    seconds = work.table.measure(NO_EDIT).seconds * max(attacks, qualities)
    sentence = (
        f"searching {len(rows)} recipes for a reduction of {reduction:.0%}: at most {attacks} attacks and quality "
        f"{qualities} times, at most about {duration(seconds)} at the speed of the first row"
    )
    work.reporter.planned(Work(len(rows) + CONFIRMED, "steps", sentence))
    counted = work.prepared.counted
    reached = search(work.table, counted, reduction, work.cost, rows, work.reporter)
    found = find([*unedited_rows(work.table), *(m for r in reached for m in r.measured)], counted, work.cost)
    plain = plain_halving(reached)
    edits = {r.row: _keep_row(work, r.row) for r in reached if r.confirmation is not None}
    # recipes differ in more than the selection, so that the comparisons of a plan say nothing of them
    return found.document() | {
        "comparisons": [],
        "target_reduction": reduction,
        "reached": [r.record() | {"beats_plain": beats(r), "edit": edits.get(r.row)} for r in reached],
        "plain_halving": None if plain is None else plain.record(),
    }


def _keep_row(work: _Sweep, row: Row) -> str:
    """Write a row's edit into the run's edits folder, for the other stages; returns its name."""
    name = default_name(row.by, row.fraction, row.scope, row.merge, row.factor, row.seed)
    name = "-".join(["search", name, *["graded"] * row.graded, *[f"{row.rounds}rounds"] * (row.rounds > 1)])
    # halves, draws and statistics are the sweep's: another one's edit of the same recipe is another edit
    plan = replace(work.prepared.bench.plan(row), run=work.run.id)
    digest = hashlib.sha256(plan.unit.numpy().tobytes() + plan.factor.numpy().tobytes()).hexdigest()[:8]
    keep_edit(plan, edit_path(work.run.folder, f"{name}-{digest}"))
    return f"{name}-{digest}"


def _attack_again(work: _Sweep, rows: Sequence[Row]) -> list[ReAttack]:
    """Attack edits again, on the targets that are reported; none where there are no rows."""
    if not rows:
        return []
    run, prepared = work.run, work.prepared
    images = len(run.manifests["train"])
    sentence = (
        f"attacking {len(rows)} edits again, each with a pass over {images:,} images for the edited model's candidates"
    )
    work.reporter.planned(Work(len(rows) * images, sentence=sentence))
    reported = prepared.counted.reported

    def make_attacker() -> Attacker:
        return Attacker(
            run.model,
            run.sources["train"],
            run.manifests["train"],
            prepared.bench.judge,
            prepared.targets.take(reported),
            prepared.targets.ids[~reported],
            prepared.bench.prefixes[-1],
            run.cache,
        )

    folder = work.folder.path / "re-attacks"
    return attack_edits_again(make_attacker, rows, prepared.bench, folder, work.reporter, work.table.sweep)
