"""Every selection of a table beside its controls, and beside random units that cost as much quality."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fastmem.sweep.compare import Difference, equal_quality, holm, paired_bootstrap
from fastmem.sweep.plan import NO_EDIT
from fastmem.sweep.table import Measured
from fastmem.sweep.targets import TargetSet

# whom every selection is compared with, at the same fraction and factor
RIVALS = ("random", "matched", "lowest", "unitmem")
# random units of the same number whose factor is tuned to the same cost
EQUAL_QUALITY = "random at equal quality"

# (selection, fraction, factor)
Point = tuple[str, float, float]


@dataclass(frozen=True, eq=False)
class Side:
    """One side of a comparison, a mean over seeds where it is drawn.

    extracted: float [n] over the reported targets; cost: loss of quality; factor: of its units; reached: False for
    random units that cannot be made to cost as much as the edit.
    """

    extracted: np.ndarray
    cost: float
    seeds: int
    factor: float
    reached: bool = True


@dataclass(frozen=True)
class Comparison:
    """A selection beside a rival, in reported targets.

    extracted, rival_extracted: how many of them; cost, rival_cost: loss of quality; rival_factor: of the rival's units;
    seeds: that the rival is a mean over; difference: extracted minus rival_extracted; holm: its p value, corrected over
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
    """The means over seeds of every selection, fraction and factor; the first row is the unedited model.

    cost: a metric that rises as quality falls.
    """
    groups: dict[Point, list[Measured]] = {}
    for m in measured:
        if not m.missing:
            groups.setdefault((m.row.by, m.row.fraction, m.row.factor), []).append(m)
    before = measured[0].metrics[cost]
    return {
        (by, fraction, factor): Side(
            np.mean([targets.extracted(m)[-1, targets.reported] for m in rows], axis=0),
            float(np.mean([m.metrics[cost] for m in rows])) - before,
            len(rows),
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
                beside = {by: other for by in tested if by != rival}
                found += _compare(fraction, rival, mine, beside, classes)
        found += _compare(fraction, EQUAL_QUALITY, mine, dict(_at_equal_quality(sides, fraction, mine)), classes)
    return found


def _at_equal_quality(
    sides: Mapping[Point, Side], fraction: float, mine: Mapping[str, Side]
) -> Iterator[tuple[str, Side]]:
    """Random units at each selection's cost; none where they were measured at one factor alone."""
    factors = sorted({x for by, f, x in sides if by == "random" and f == fraction}, reverse=True)
    if len(factors) < 2:
        return
    grid = [sides[NO_EDIT.by, NO_EDIT.fraction, NO_EDIT.factor], *(sides["random", fraction, x] for x in factors)]
    for by, side in mine.items():
        tuned = equal_quality(side.cost, [1.0, *factors], [g.cost for g in grid], [g.extracted for g in grid])
        seeds = min(g.seeds for g in grid[1:])
        yield by, Side(tuned.extracted, tuned.cost, seeds, tuned.factor, tuned.reached)


def _compare(
    fraction: float, rival: str, mine: Mapping[str, Side], others: Mapping[str, Side], classes: np.ndarray
) -> list[Comparison]:
    differences = [paired_bootstrap(mine[by].extracted, others[by].extracted, classes) for by in others]
    corrected = holm([d.p_value for d in differences])
    return [
        Comparison(
            by,
            fraction,
            mine[by].factor,
            rival,
            others[by].factor,
            others[by].seeds,
            float(mine[by].extracted.sum()),
            float(others[by].extracted.sum()),
            mine[by].cost,
            others[by].cost,
            difference,
            p_value,
            others[by].reached,
        )
        for by, difference, p_value in zip(others, differences, corrected, strict=True)
    ]
