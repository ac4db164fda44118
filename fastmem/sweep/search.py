"""Search for the edit that prevents a given share of the extractions at the least loss of quality.

A recipe is a selection of units with a factor, a scope and a number of rounds. For every recipe, bisection over a list
of fractions finds the smallest fraction of units that reaches the wanted reduction of extracted targets. The quality is
measured only at that fraction. The reduction is measured on the half of the targets that no units were chosen on, so
only the fraction is fitted to them. The reduction on the other half, which attribution uses, is reported as well.

The cheapest of many edits tends to look cheaper than it is, by chance. Therefore the cheapest few edits are measured
again on new samples, together with the unedited model and with halving the units of highest UnitMem and random units.
Only the new samples count for the result.
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

# fractions of all units that are tried
LADDER = (0.01, 0.02, 0.03, 0.05, 0.07, 0.10, 0.15, 0.20, 0.30, 0.40, 0.50, 0.70, 1.0)
FACTORS = (HALVED, 0.25, 0.0)
SEARCHED = ("unitmem", "within-class", "gap", ATTRIBUTION)
# edits are compared by means over this many seeds, because metrics of samples vary with the seed
SEEDS = 3
# number of cheapest edits that are measured again on new samples, and number of their seeds
FINALISTS = 5
FRESH_SEEDS = 8
# the finalists, the unedited model and the two recipes below
CONFIRMED = FINALISTS + 3
# recipes that every result is compared with: halving the units of highest UnitMem, and random units
PLAIN = Row("unitmem", 0.0, HALVED)
RANDOM = Row("random", 0.0, HALVED)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its uncertainty by Student's t distribution, which is NaN, undefined, for one value.

    Attributes:
        value: the mean.
        low: lower end of its 95 % interval.
        high: upper end of its 95 % interval.
        p_value: two-sided p-value of the hypothesis that the mean is 0.
    """

    value: float
    low: float
    high: float
    p_value: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Return the mean of values with its uncertainty."""
        if len(values) < 2:
            return cls(float(np.mean(values)), math.nan, math.nan, math.nan)
        mean, error = float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))
        law = stats.t(len(values) - 1)
        reach = float(law.ppf((1 + LEVEL) / 2)) * error
        p_value = 2 * float(law.sf(abs(mean) / error)) if error else float(mean == 0)
        return cls(mean, mean - reach, mean + reach, p_value)


@dataclass(frozen=True)
class Confirmation:
    """The loss of quality of an edit, measured on new samples that had no influence on its choice.

    Attributes:
        seeds: number of seeds of the new samples.
        cost: loss of quality against the unedited model.
        beside_plain: this cost minus the cost of halving by UnitMem, compared seed by seed; None where halving by
            UnitMem does not reach the reduction, or is this edit.
        beside_half: this cost minus half the cost of halving by UnitMem; None in the same cases.
        holm: p-value of ``beside_plain``, corrected by Holm's method over all edits that were measured again.
    """

    seeds: int
    cost: Estimate
    beside_plain: Estimate | None
    beside_half: Estimate | None
    holm: float | None = None


@dataclass(frozen=True, eq=False)
class Reached:
    """The smallest edit of a recipe that reaches the wanted reduction of extracted targets.

    Reductions and cost are means over the seeds.

    Attributes:
        measured: the edit's rows, one for each seed; the search itself used the first.
        reduction: share of the extracted targets that are no longer extracted, among the targets that no units were
            chosen on.
        seen_reduction: the same share among the other half of the targets, on which attribution chooses units.
        cost: loss of quality against the unedited model.
        confirmation: loss of quality on new samples; None where the edit was not measured again.
    """

    measured: tuple[Measured, ...]
    reduction: float
    seen_reduction: float
    cost: float
    confirmation: Confirmation | None = None

    @property
    def row(self) -> Row:
        """The edit, with its first seed."""
        return self.measured[0].row

    def record(self) -> dict[str, Any]:
        """Return the edit and its results as a dictionary for a JSON document."""
        return asdict(self.row) | {
            "units": self.measured[0].units,
            "reduction": self.reduction,
            "seen_reduction": self.seen_reduction,
            "cost": self.cost,
            "metrics": {name: mean_of(self.measured, name) for name in self.measured[0].values},
            "confirmation": None if self.confirmation is None else asdict(self.confirmation),
        }


def recipes(by: Sequence[str] = SEARCHED) -> list[Row]:
    """Return the recipes to search: those of the selections ``by``, and halving by UnitMem and at random.

    A recipe is a row with the fraction 0, which stands for any fraction.
    """
    chosen = [name for name in SEARCHED if name in by]
    plain = [Row(name, 0.0, factor) for name in chosen for factor in FACTORS]
    graded = [Row(name, 0.0, 0.0, graded=True) for name in chosen]
    per_layer = [Row(name, 0.0, HALVED, scope="per-layer") for name in chosen]
    again = [Row(ATTRIBUTION, 0.0, factor, rounds=2) for factor in FACTORS[:2] if ATTRIBUTION in chosen]
    return list(dict.fromkeys([PLAIN, RANDOM, *plain, *graded, *per_layer, *again]))


def check_reduction(reduction: float) -> None:
    """Check the wanted reduction, a share. Raises: UsageError where it is not in (0,1]."""
    if not 0 < reduction <= 1:
        raise UsageError(f"expected a reduction above 0 and up to 1, got {reduction}")


def most_work(rows: Sequence[Row]) -> tuple[int, int]:
    """Return the greatest numbers of attacks and of measurements of quality that a search of these recipes takes."""
    attacks = math.ceil(math.log2(len(LADDER) + 1))
    # random units are other units with every seed, so each seed is attacked
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
    """Return the smallest edit of every recipe that reaches a reduction, cheapest first.

    Recipes that do not reach the reduction with any fraction are left out.

    Args:
        table: measures rows, and saves them.
        targets: the targets, and which of them are reported.
        reduction: wanted share, in (0,1], of the extracted targets that are no longer extracted; counted are the
            targets that no units were chosen on.
        cost: the metric whose rise is the loss of quality.
        rows: the recipes.
        reporter: is told when a recipe is done, and then of ``CONFIRMED`` more steps.

    Raises: UsageError where ``reduction`` is out of range, or no target of a half is extracted from the unedited model.
    """
    check_reduction(reduction)
    unedited = unedited_rows(table)
    base = _counts(targets, unedited[0])
    if 0 in base:
        raise UsageError(
            f"expected a model from which targets of both halves are extracted, got {base[0]} and {base[1]} of them: "
            "there is nothing to reduce"
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
    """Return the rows of the unedited model, with the same seeds as the edits of a search."""
    return _sampled(table, NO_EDIT)


def _sampled(table: Table, row: Row, seeds: Sequence[int] = range(SEEDS)) -> list[Measured]:
    """Return a row measured with several seeds."""
    return [table.measure(replace(row, seed=seed)) for seed in seeds]


def _confirmed(table: Table, reached: Sequence[Reached], cost: str, reporter: Reporter) -> list[Reached]:
    """Return the edits, of which the cheapest few and the two halvings are measured again on new samples."""
    seeds = range(SEEDS, SEEDS + FRESH_SEEDS)
    plain = plain_halving(reached)
    controls = [r for r in reached if replace(r.row, fraction=0.0) in (PLAIN, RANDOM)]
    finalists = [*controls, *[r for r in reached if r not in controls][:FINALISTS]]
    costs: dict[Row, np.ndarray] = {}
    for row in (NO_EDIT, *(r.row for r in finalists)):
        costs[row] = np.array([m.values[cost] for m in _sampled(table, row, seeds)])
        reporter.advance(1)
    reporter.advance(CONFIRMED - len(costs))
    made = {r: _confirmation(costs, r, plain) for r in finalists}
    beside = {r: c.beside_plain.p_value for r, c in made.items() if c.beside_plain is not None}
    corrected = dict(zip(beside, holm(list(beside.values())), strict=True))
    return [replace(r, confirmation=replace(made[r], holm=corrected.get(r))) if r in made else r for r in reached]


def _confirmation(costs: Mapping[Row, np.ndarray], edit: Reached, plain: Reached | None) -> Confirmation:
    """Return the confirmation of an edit, from the costs of every row by seed, float64 [seeds]."""
    rise = costs[edit.row] - costs[NO_EDIT]
    if plain is None or edit is plain:
        return Confirmation(len(rise), Estimate.of(rise), None, None)
    usual = costs[plain.row] - costs[NO_EDIT]
    return Confirmation(len(rise), Estimate.of(rise), Estimate.of(rise - usual), Estimate.of(rise - usual / 2))


def plain_halving(reached: Sequence[Reached]) -> Reached | None:
    """Return halving by UnitMem, which other edits are compared with, or None where it does not reach the reduction."""
    return next((r for r in reached if replace(r.row, fraction=0.0) == PLAIN), None)


def beats(edit: Reached) -> bool:
    """Return whether an edit costs significantly less than halving by UnitMem, on new samples."""
    found = edit.confirmation
    if found is None or found.beside_plain is None or found.holm is None:
        return False
    return found.beside_plain.value < 0 and found.holm <= 1 - LEVEL


def _counts(targets: TargetSet, measured: Measured) -> tuple[int, int]:
    """Return how many reported targets, and how many others, are extracted from the longest prefix."""
    extracted = targets.extracted(measured)[-1]
    return int(np.count_nonzero(extracted & targets.reported)), int(np.count_nonzero(extracted & ~targets.reported))


def _smallest(table: Table, targets: TargetSet, recipe: Row, allowed: int) -> Row | None:
    """Return the recipe at the smallest fraction with at most ``allowed`` extracted targets, or None without one."""
    # bisection assumes that more units never leave more targets extracted
    low, high = 0, len(LADDER)
    while low < high:
        middle = (low + high) // 2
        measured = table.measure(replace(recipe, fraction=LADDER[middle]), with_quality=False)
        # where this many units cannot be chosen, more cannot be chosen either
        if measured.missing or _counts(targets, measured)[0] <= allowed:
            high = middle
        else:
            low = middle + 1
    if low == len(LADDER):
        return None
    row = replace(recipe, fraction=LADDER[low])
    return None if table.measure(row, with_quality=False).missing else row
