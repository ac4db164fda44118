"""Every selection of a table beside its controls, and beside random units that cost as much quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fastmem.sweep.bootstrap import (
    Difference,
    Outcomes,
    equal_quality,
    equal_quality_bootstrap,
    holm,
    paired_bootstrap,
)
from fastmem.sweep.plan import NO_EDIT
from fastmem.sweep.table import Measured, TargetSet, unedited_cost

# whom every selection is compared with, at the same fraction and factor; matched units are matched with UnitMem's
RIVALS = ("random", "matched", "lowest", "unitmem")
MATCHED_WITH = "unitmem"
# random units of the same number whose factor is tuned to the same cost
EQUAL_QUALITY = "random at equal quality"

# (selection, fraction, factor)
Point = tuple[str, float, float]


@dataclass(frozen=True, eq=False)
class Side:
    """One side of a comparison, with its seeds, of its units or of its samples.

    by_seed: bool [S,n] over the reported targets; costs: float64 [S], loss of quality against the unedited model's
    mean; factor: of its units.
    """

    by_seed: np.ndarray
    costs: np.ndarray
    factor: float

    @property
    def extracted(self) -> np.ndarray:
        """The mean over seeds, float64 [n]."""
        return self.by_seed.mean(0)

    @property
    def cost(self) -> float:
        """The mean over seeds."""
        return float(self.costs.mean())

    @property
    def outcomes(self) -> Outcomes:
        return Outcomes(self.by_seed, self.costs)


@dataclass(frozen=True)
class Comparison:
    """A selection beside a rival, in reported targets.

    extracted, rival_extracted: how many of them; cost, rival_cost: loss of quality; rival_factor: of the rival's units;
    seeds: that the rival is a mean over; difference: extracted minus rival_extracted, with the uncertainty of targets'
    classes, of seeds and, at equal quality, of the cost that is tuned to; holm: its p value, corrected over
    the selections beside this rival at this fraction and factor; reached: False where even the strongest factor that
    was measured costs the rival less.
    """

    by: str
    fraction: float
    factor: float
    rival: str
    rival_factor: float
    seeds: int
    extracted: float
    rival_extracted: float
    cost: float
    rival_cost: float
    difference: Difference
    holm: float
    reached: bool


def sides_of(measured: Sequence[Measured], targets: TargetSet, cost: str) -> dict[Point, Side]:
    """Every selection, fraction and factor with its seeds; the first rows are the unedited model.

    cost: a metric that rises as quality falls.
    """
    groups: dict[Point, list[Measured]] = {}
    for m in measured:
        if not m.missing:
            groups.setdefault((m.row.by, m.row.fraction, m.row.factor), []).append(m)
    before = unedited_cost(measured, cost)
    return {
        (by, fraction, factor): Side(
            np.stack([targets.extracted(m)[-1, targets.reported] for m in rows]),
            np.array([m.metrics[cost] - before for m in rows]),
            factor,
        )
        for (by, fraction, factor), rows in groups.items()
    }


def compare_all(sides: Mapping[Point, Side], classes: np.ndarray) -> list[Comparison]:
    """Every selection beside every rival that was measured, by fraction, factor and rival.

    classes: int64 [n] of the reported targets.
    """
    found = []
    for fraction, factor in dict.fromkeys((f, x) for by, f, x in sides if by != NO_EDIT.by):
        tested = [
            by for by, f, x in sides if (f, x) == (fraction, factor) and by not in ("random", "matched", "lowest")
        ]
        mine = {by: sides[by, fraction, factor] for by in tested}
        for rival in RIVALS:
            other = sides.get((rival, fraction, factor))
            if other is not None:
                beside = {by: side for by, side in mine.items() if _is_rival(rival, by)}
                found += _beside(fraction, rival, beside, other, classes)
        found += _at_equal_quality(sides, fraction, mine, classes)
    return found


def _is_rival(rival: str, by: str) -> bool:
    return by == MATCHED_WITH if rival == "matched" else by != rival


def _beside(
    fraction: float, rival: str, mine: Mapping[str, Side], other: Side, classes: np.ndarray
) -> list[Comparison]:
    differences = [paired_bootstrap(side.by_seed, other.by_seed, classes) for side in mine.values()]
    corrected = holm([d.p_value for d in differences])
    return [
        Comparison(
            by,
            fraction,
            side.factor,
            rival,
            other.factor,
            len(other.costs),
            float(side.extracted.sum()),
            float(other.extracted.sum()),
            side.cost,
            other.cost,
            difference,
            p_value,
            True,
        )
        for (by, side), difference, p_value in zip(mine.items(), differences, corrected, strict=True)
    ]


def _at_equal_quality(
    sides: Mapping[Point, Side], fraction: float, mine: Mapping[str, Side], classes: np.ndarray
) -> list[Comparison]:
    """Beside random units at each selection's cost; none where they were measured at one factor alone."""
    factors = sorted({x for by, f, x in sides if by == "random" and f == fraction}, reverse=True)
    if len(factors) < 2:
        return []
    grid = [sides[NO_EDIT.by, NO_EDIT.fraction, NO_EDIT.factor], *(sides["random", fraction, x] for x in factors)]
    factors = [NO_EDIT.factor, *factors]
    differences = [
        equal_quality_bootstrap(side.outcomes, factors, [g.outcomes for g in grid], classes) for side in mine.values()
    ]
    corrected = holm([d.p_value for d in differences])
    found = []
    for (by, side), difference, p_value in zip(mine.items(), differences, corrected, strict=True):
        tuned = equal_quality(side.cost, factors, [g.cost for g in grid], [g.extracted for g in grid])
        found.append(
            Comparison(
                by,
                fraction,
                side.factor,
                EQUAL_QUALITY,
                tuned.factor,
                min(len(g.costs) for g in grid[1:]),
                float(side.extracted.sum()),
                float(tuned.extracted.sum()),
                side.cost,
                tuned.cost,
                difference,
                p_value,
                tuned.reached,
            )
        )
    return found
