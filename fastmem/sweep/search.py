"""The search for the edit that reaches a reduction at the least loss of quality.

For every recipe (a selection with its factor, scope and rounds) the smallest fraction of units that reaches the
reduction on one half of the targets is found by bisection on a ladder; only that edit's quality is measured. Counts are
reported on the other half.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from fastmem.errors import UsageError
from fastmem.sweep.plan import ATTRIBUTION, HALVED, NO_EDIT, Row
from fastmem.sweep.table import Measured, Table, mean_of
from fastmem.sweep.targets import TargetSet

LADDER = (0.01, 0.02, 0.03, 0.05, 0.07, 0.10, 0.15, 0.20, 0.30, 0.40, 0.50, 0.70, 1.0)
FACTORS = (HALVED, 0.25, 0.0)
SEARCHED = ("unitmem", "within-class", "gap", ATTRIBUTION)
# a metric of samples varies with their seed: of what is compared, a mean is taken
SEEDS = 3
# what every result stands beside
PLAIN = Row("unitmem", 0.0, HALVED)
RANDOM = Row("random", 0.0, HALVED)


@dataclass(frozen=True, eq=False)
class Reached:
    """The smallest edit of a recipe that reaches the reduction.

    measured: with every seed, the first of which was searched with; chosen_reduction, reduction: on the half that it
    was chosen by, and on the other; cost: loss of quality; all are means over the seeds.
    """

    measured: tuple[Measured, ...]
    chosen_reduction: float
    reduction: float
    cost: float

    @property
    def row(self) -> Row:
        """The edit, with the first seed."""
        return self.measured[0].row

    def record(self) -> dict[str, Any]:
        """As ``--json`` has it."""
        return asdict(self.row) | {
            "units": self.measured[0].units,
            "chosen_reduction": self.chosen_reduction,
            "reduction": self.reduction,
            "cost": self.cost,
            "metrics": {name: mean_of(self.measured, name) for name in self.measured[0].metrics},
        }


def recipes(by: Sequence[str] = SEARCHED) -> list[Row]:
    """What is searched: halving by UnitMem and at random, and recipes of the selections ``by``; fractions are open."""
    chosen = [name for name in SEARCHED if name in by]
    plain = [Row(name, 0.0, factor) for name in chosen for factor in FACTORS]
    graded = [Row(name, 0.0, 0.0, graded=True) for name in chosen]
    per_layer = [Row(name, 0.0, HALVED, scope="per-layer") for name in chosen]
    again = [Row(ATTRIBUTION, 0.0, factor, rounds=2) for factor in FACTORS[:2] if ATTRIBUTION in chosen]
    return list(dict.fromkeys([PLAIN, RANDOM, *plain, *graded, *per_layer, *again]))


def search(
    table: Table,
    targets: TargetSet,
    reduction: float,
    cost: str,
    rows: Sequence[Row],
    advance: Callable[[int], None] = lambda recipes: None,
) -> list[Reached]:
    """The smallest edit of every recipe that reaches ``reduction``, cheapest first; recipes that never do are left out.

    reduction: of the targets extracted on the half that edits are chosen by, in (0, 1]; cost: a metric that rises as
    quality falls; rows: recipes, whose fraction is open.

    Raises: UsageError for a reduction outside (0, 1], or where the unedited model gives nothing away on either half.
    """
    if not 0 < reduction <= 1:
        raise UsageError(f"expected a reduction above 0 and up to 1, got {reduction}")
    unedited = _sampled(table, NO_EDIT)
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
            chosen, other = (1 - left / base).tolist()
            found.append(Reached(tuple(measured), chosen, other, mean_of(measured, cost) - mean_of(unedited, cost)))
        advance(1)
    return sorted(found, key=lambda r: r.cost)


def _sampled(table: Table, row: Row) -> list[Measured]:
    """A row with several seeds, of its samples or of its units where these are drawn."""
    return [table.measure(replace(row, seed=seed)) for seed in range(SEEDS)]


def plain_halving(reached: Sequence[Reached]) -> Reached | None:
    """Halving by UnitMem among what was reached, by which the others are measured."""
    return next((r for r in reached if replace(r.row, fraction=0.0) == PLAIN), None)


def _counts(targets: TargetSet, measured: Measured) -> tuple[int, int]:
    """Targets extracted with the longest prefix on the half that edits are chosen by, and on the other."""
    extracted = targets.extracted(measured)[-1]
    return int(np.count_nonzero(extracted & ~targets.reported)), int(np.count_nonzero(extracted & targets.reported))


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
