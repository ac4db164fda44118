"""The search for the edit that reaches a reduction at the least loss of quality.

For every recipe (a selection with its factor, scope and rounds) the smallest fraction of units that reaches the
reduction is found by bisection on a ladder; only that edit's quality is measured. The reduction is that of the targets
which no units were chosen by, so that all recipes are compared at one that holds for targets unseen; the ladder is all
that is fitted to them. The other half, which attribution saw, stands beside it.

The cheapest of many edits looks cheaper than it is, by the chance of its samples: the best few are sampled anew, beside
halving by UnitMem, at random and the unedited model, and stated by those samples alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

from fastmem.errors import UsageError
from fastmem.reporter import SILENT, Reporter
from fastmem.sweep.bootstrap import LEVEL, holm
from fastmem.sweep.plan import ATTRIBUTION, HALVED, NO_EDIT, Row
from fastmem.sweep.table import Measured, Table, TargetSet, mean_of

LADDER = (0.01, 0.02, 0.03, 0.05, 0.07, 0.10, 0.15, 0.20, 0.30, 0.40, 0.50, 0.70, 1.0)
FACTORS = (HALVED, 0.25, 0.0)
SEARCHED = ("unitmem", "within-class", "gap", ATTRIBUTION)
# a metric of samples varies with their seed: of what is compared, a mean is taken
SEEDS = 3
# so many of the cheapest edits are sampled anew, with so many seeds
FINALISTS = 5
FRESH_SEEDS = 8
# with the unedited model and both halvings
CONFIRMED = FINALISTS + 3
# what every result stands beside
PLAIN = Row("unitmem", 0.0, HALVED)
RANDOM = Row("random", 0.0, HALVED)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, with its 95 % interval and the p value of 0 by Student's t."""

    value: float
    low: float
    high: float
    p_value: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """The mean of at least two values."""
        mean, error = float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))
        law = stats.t(len(values) - 1)
        reach = float(law.ppf((1 + LEVEL) / 2)) * error
        p_value = 2 * float(law.sf(abs(mean) / error)) if error else float(mean == 0)
        return cls(mean, mean - reach, mean + reach, p_value)


@dataclass(frozen=True)
class Confirmation:
    """An edit's loss of quality by samples that had no part in its choice.

    seeds: of the samples; cost: against the unedited model; beside_plain: that cost minus the cost of halving by
    UnitMem; beside_half: minus half of it, which is the goal; None without such an edit; differences are by seed. holm:
    the p value of beside_plain, corrected over all edits that were confirmed.
    """

    seeds: int
    cost: Estimate
    beside_plain: Estimate | None
    beside_half: Estimate | None
    holm: float | None = None


@dataclass(frozen=True, eq=False)
class Reached:
    """The smallest edit of a recipe that reaches the reduction.

    measured: with every seed, the first of which was searched with; reduction: of the targets that no units were chosen
    by; seen_reduction: of the half that attribution saw, unseen by all else; cost: loss of quality; all are means over
    the seeds. confirmation: of the best few.
    """

    measured: tuple[Measured, ...]
    reduction: float
    seen_reduction: float
    cost: float
    confirmation: Confirmation | None = None

    @property
    def row(self) -> Row:
        """The edit, with the first seed."""
        return self.measured[0].row

    def record(self) -> dict[str, Any]:
        """As ``--json`` has it."""
        return asdict(self.row) | {
            "units": self.measured[0].units,
            "reduction": self.reduction,
            "seen_reduction": self.seen_reduction,
            "cost": self.cost,
            "metrics": {name: mean_of(self.measured, name) for name in self.measured[0].metrics},
            "confirmation": None if self.confirmation is None else asdict(self.confirmation),
        }


def recipes(by: Sequence[str] = SEARCHED) -> list[Row]:
    """What is searched: halving by UnitMem and at random, and recipes of the selections ``by``; fractions are open."""
    chosen = [name for name in SEARCHED if name in by]
    plain = [Row(name, 0.0, factor) for name in chosen for factor in FACTORS]
    graded = [Row(name, 0.0, 0.0, graded=True) for name in chosen]
    per_layer = [Row(name, 0.0, HALVED, scope="per-layer") for name in chosen]
    again = [Row(ATTRIBUTION, 0.0, factor, rounds=2) for factor in FACTORS[:2] if ATTRIBUTION in chosen]
    return list(dict.fromkeys([PLAIN, RANDOM, *plain, *graded, *per_layer, *again]))


def check_reduction(reduction: float) -> None:
    """Raises: UsageError for a reduction outside (0, 1]."""
    if not 0 < reduction <= 1:
        raise UsageError(f"expected a reduction above 0 and up to 1, got {reduction}")


def most_work(rows: Sequence[Row]) -> tuple[int, int]:
    """How many attacks and how many measurements of quality a search of these recipes takes at most."""
    attacks = math.ceil(math.log2(len(LADDER) + 1))
    # of random units each seed is attacked by itself
    drawn = SEEDS - 1 + FRESH_SEEDS
    return 1 + len(rows) * attacks + drawn, (1 + len(rows)) * SEEDS + CONFIRMED * FRESH_SEEDS


def search(
    table: Table,
    targets: TargetSet,
    reduction: float,
    cost: str,
    rows: Sequence[Row],
    reporter: Reporter = SILENT,
) -> list[Reached]:
    """The smallest edit of every recipe that reaches ``reduction``, cheapest first; recipes that never do are left out.

    Args:
        table: where measured rows are kept.
        targets: what is counted.
        reduction: the share of the extracted targets that are no longer extracted, in (0, 1]; counted are those that no
            units were chosen by.
        cost: a metric that rises as quality falls.
        rows: recipes, whose fraction is open.
        reporter: is told of every recipe that is done, and of ``CONFIRMED`` steps more.

    Raises: UsageError for a reduction outside (0, 1], or where the unedited model gives nothing away on either half.
    """
    check_reduction(reduction)
    unedited = unedited_rows(table)
    base = _counts(targets, unedited[0])
    if 0 in base:
        raise UsageError(
            f"expected a model that gives targets away in both halves, got {base[0]} and {base[1]} of them: there is "
            "nothing to reduce"
        )
    found = []
    for recipe in rows:
        row = _smallest(table, targets, recipe, math.floor(base[0] * (1 - reduction) + 1e-9))
        if row is not None:
            measured = _sampled(table, row)
            left = np.mean([_counts(targets, m) for m in measured], axis=0)
            reported, seen = (1 - left / base).tolist()
            found.append(Reached(tuple(measured), reported, seen, mean_of(measured, cost) - mean_of(unedited, cost)))
        reporter.advance(1)
    return _confirmed(table, sorted(found, key=lambda r: r.cost), cost, reporter)


def unedited_rows(table: Table) -> list[Measured]:
    """The unedited model with the seeds that edits are searched with."""
    return _sampled(table, NO_EDIT)


def _sampled(table: Table, row: Row, seeds: Sequence[int] = range(SEEDS)) -> list[Measured]:
    """A row with several seeds of its samples, and of its units where these are drawn."""
    return [table.measure(replace(row, seed=seed)) for seed in seeds]


def _confirmed(table: Table, reached: Sequence[Reached], cost: str, reporter: Reporter) -> list[Reached]:
    """What was reached, with confirmations of the cheapest few and of halving by UnitMem and at random."""
    seeds = range(SEEDS, SEEDS + FRESH_SEEDS)
    plain = plain_halving(reached)
    controls = [r for r in reached if replace(r.row, fraction=0.0) in (PLAIN, RANDOM)]
    finalists = [*controls, *[r for r in reached if r not in controls][:FINALISTS]]
    costs: dict[Row, np.ndarray] = {}
    for row in (NO_EDIT, *(r.row for r in finalists)):
        costs[row] = np.array([m.metrics[cost] for m in _sampled(table, row, seeds)])
        reporter.advance(1)
    reporter.advance(CONFIRMED - len(costs))
    made = {r: _confirmation(costs, r, plain) for r in finalists}
    beside = {r: c.beside_plain.p_value for r, c in made.items() if c.beside_plain is not None}
    corrected = dict(zip(beside, holm(list(beside.values())), strict=True))
    return [replace(r, confirmation=replace(made[r], holm=corrected.get(r))) if r in made else r for r in reached]


def _confirmation(costs: Mapping[Row, np.ndarray], edit: Reached, plain: Reached | None) -> Confirmation:
    """From costs by seed, float64 [seeds] each, of the edit, of halving by UnitMem and of the unedited model."""
    rise = costs[edit.row] - costs[NO_EDIT]
    if plain is None or edit is plain:
        return Confirmation(len(rise), Estimate.of(rise), None, None)
    usual = costs[plain.row] - costs[NO_EDIT]
    return Confirmation(len(rise), Estimate.of(rise), Estimate.of(rise - usual), Estimate.of(rise - usual / 2))


def plain_halving(reached: Sequence[Reached]) -> Reached | None:
    """Halving by UnitMem among what was reached, by which the others are measured."""
    return next((r for r in reached if replace(r.row, fraction=0.0) == PLAIN), None)


def beats(edit: Reached) -> bool:
    """Whether an edit surely costs less than halving by UnitMem at the same reduction, by fresh samples."""
    found = edit.confirmation
    return bool(found and found.beside_plain and found.beside_plain.value < 0 and found.holm <= 1 - LEVEL)


def _counts(targets: TargetSet, measured: Measured) -> tuple[int, int]:
    """Targets extracted with the longest prefix of the half that no units were chosen by, and of the other."""
    extracted = targets.extracted(measured)[-1]
    return int(np.count_nonzero(extracted & targets.reported)), int(np.count_nonzero(extracted & ~targets.reported))


def _smallest(table: Table, targets: TargetSet, recipe: Row, allowed: int) -> Row | None:
    """The recipe at the smallest fraction of the ladder with at most ``allowed`` targets extracted; None without one.

    More units are taken to leave fewer targets.
    """
    low, high = 0, len(LADDER)
    while low < high:
        middle = (low + high) // 2
        measured = table.measure(replace(recipe, fraction=LADDER[middle]), with_quality=False)
        # a selection that cannot be made of these units cannot be made of more
        if measured.missing or _counts(targets, measured)[0] <= allowed:
            high = middle
        else:
            low = middle + 1
    if low == len(LADDER):
        return None
    row = replace(recipe, fraction=LADDER[low])
    return None if table.measure(row, with_quality=False).missing else row
