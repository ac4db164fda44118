"""Compare every selection of units with its controls, and with random units that cost as much quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fastmem.sweep.bootstrap import (
    Difference,
    EqualQuality,
    Outcomes,
    equal_quality,
    equal_quality_bootstrap,
    holm,
    paired_bootstrap,
)
from fastmem.sweep.plan import NO_EDIT
from fastmem.sweep.table import Measured, TargetSet, unedited_cost

# selections that every other selection is compared with, at the same fraction and factor
RIVALS = ("random", "matched", "lowest", "unitmem")
# the selection whose units have similar mean responses to those of "matched"
MATCHED_WITH = "unitmem"
# name of a rival: equally many random units, at the factor where they cost as much quality
EQUAL_QUALITY = "random at equal quality"

# a selection with its fraction and its factor
Point = tuple[str, float, float]


@dataclass(frozen=True, eq=False)
class Side:
    """Results of one selection at one fraction and factor, with several seeds.

    ``by_seed``, bool [S,n], says whether each of the n reported targets is extracted. ``costs``, float64 [S], is the
    loss of quality against the mean of the unedited model. ``factor`` is the factor of the scaled rows.
    """

    by_seed: np.ndarray
    costs: np.ndarray
    factor: float

    @property
    def extracted(self) -> np.ndarray:
        """Share of seeds that extract each target, float64 [n]."""
        return self.by_seed.mean(0)

    @property
    def cost(self) -> float:
        """Mean loss of quality over the seeds."""
        return float(self.costs.mean())

    @property
    def outcomes(self) -> Outcomes:
        """Targets and costs by seed, in the form that the bootstrap functions take."""
        return Outcomes(self.by_seed, self.costs)


@dataclass(frozen=True)
class Comparison:
    """A selection of units compared with a rival: another selection, or random units that cost as much quality.

    Attributes:
        by: the selection.
        fraction: share of all units that both scale.
        factor: factor of the selection's units.
        rival: the selection that it is compared with, or "random at equal quality".
        rival_factor: factor of the rival's units.
        seeds: number of seeds that the rival's results are a mean over.
        extracted: number of reported targets extracted under the selection's edit.
        rival_extracted: number of reported targets extracted under the rival's edit.
        cost: loss of quality of the selection's edit.
        rival_cost: loss of quality of the rival's edit.
        difference: ``extracted`` minus ``rival_extracted``; its interval covers the choice of classes and seeds and, at
            equal quality, the uncertainty of the costs.
        holm: p-value of the difference, corrected by Holm's method over all selections that are compared with this
            rival at this fraction and factor.
        reached: False where random units at equal quality cost less than the selection even at the smallest measured
            factor.
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
    """Return the results of the reported targets by selection, fraction and factor.

    ``measured`` are the rows of a table, among them the unedited model. ``targets`` says which targets are reported.
    ``cost`` is the metric whose rise is the loss of quality. Rows that could not be measured are left out.
    """
    groups: dict[Point, list[Measured]] = {}
    for m in measured:
        if not m.missing:
            groups.setdefault((m.row.by, m.row.fraction, m.row.factor), []).append(m)
    before = unedited_cost(measured, cost)
    return {
        (by, fraction, factor): Side(
            np.stack([targets.extracted(m)[-1, targets.reported] for m in rows]),
            np.array([m.values[cost] - before for m in rows]),
            factor,
        )
        for (by, fraction, factor), rows in groups.items()
    }


def compare_all(sides: Mapping[Point, Side], classes: np.ndarray) -> list[Comparison]:
    """Return the comparisons of every selection with every rival that was measured at the same fraction and factor.

    ``sides`` are the results by selection, fraction and factor, and ``classes``, int64 [n], are the classes of the
    reported targets.
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
    """Return whether a selection is compared with a rival."""
    return by == MATCHED_WITH if rival == "matched" else by != rival


def _beside(
    fraction: float, rival: str, mine: Mapping[str, Side], other: Side, classes: np.ndarray
) -> list[Comparison]:
    """Compare selections with a rival at the same fraction and factor."""
    differences = [paired_bootstrap(side.by_seed, other.by_seed, classes) for side in mine.values()]
    return _corrected(fraction, rival, len(other.costs), mine, [other] * len(mine), differences)


def _at_equal_quality(
    sides: Mapping[Point, Side], fraction: float, mine: Mapping[str, Side], classes: np.ndarray
) -> list[Comparison]:
    """Compare selections with random units that cost as much; none where these were measured at one factor only."""
    factors = sorted({x for by, f, x in sides if by == "random" and f == fraction}, reverse=True)
    if len(factors) < 2:
        return []
    grid = [sides[NO_EDIT.by, NO_EDIT.fraction, NO_EDIT.factor], *(sides["random", fraction, x] for x in factors)]
    factors = [NO_EDIT.factor, *factors]
    differences = [
        equal_quality_bootstrap(side.outcomes, factors, [g.outcomes for g in grid], classes) for side in mine.values()
    ]
    tuned = [
        equal_quality(side.cost, factors, [g.cost for g in grid], [g.extracted for g in grid]) for side in mine.values()
    ]
    return _corrected(fraction, EQUAL_QUALITY, min(len(g.costs) for g in grid[1:]), mine, tuned, differences)


def _corrected(
    fraction: float,
    rival: str,
    seeds: int,
    mine: Mapping[str, Side],
    others: Sequence[Side | EqualQuality],
    differences: Sequence[Difference],
) -> list[Comparison]:
    """Return the comparisons with one rival, which has one side for each selection, with corrected p-values."""
    corrected = holm([d.p_value for d in differences])
    return [
        Comparison(
            by,
            fraction,
            side.factor,
            rival,
            other.factor,
            seeds,
            float(side.extracted.sum()),
            float(other.extracted.sum()),
            side.cost,
            other.cost,
            difference,
            p_value,
            reached=not isinstance(other, EqualQuality) or other.reached,
        )
        for (by, side), other, difference, p_value in zip(mine.items(), others, differences, corrected, strict=True)
    ]
