"""How far a ranking of units repeats itself on other images: split halves made of the folds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce
from itertools import combinations
from statistics import fmean

from torch import Tensor

from fastmem.errors import UsageError
from fastmem.ranking.selection import SCORES, highest, matched_to, merge_segments
from fastmem.stats import UnitStats


@dataclass(frozen=True)
class Reliability:
    """Agreement of rankings made on disjoint halves of the images, averaged over the ways to pair the folds.

    spearman: rank correlation of the scores of all units, NaN where all are equal; overlap: share of the selected units
    that both halves select; chance: the overlap that two independent selections would have; halves: number of pairs.
    """

    by: str
    fraction: float
    spearman: float
    overlap: float
    chance: float
    halves: int

    def __str__(self) -> str:
        return (
            f"ranking by {self.by} on split halves: Spearman {self.spearman:.2f}, overlap of the top "
            f"{self.fraction:.0%} {self.overlap:.0%} (chance {self.chance:.0%})"
        )


def reliability(
    stats: UnitStats,
    fraction: float = 0.05,
    by: str = "unitmem",
    scope: str = "global",
    merge: str = "max",
    heldout: UnitStats | None = None,
) -> Reliability | None:
    """Split-half reliability of a selection; None where nothing is ranked or there are no folds or class rows for it.

    Random and matched units are drawn, not ranked. The halves are pairs of the four folds, class by class alike; a half
    has half of the images, so this bounds from below how far the whole ranking would repeat itself.

    Raises: as ``select``.
    """
    from scipy.stats import spearmanr

    if by not in SCORES:
        return None
    if by == "gap":
        stats = matched_to(stats, heldout)
    if len(stats.folds) < 4 or not all(fold.count for fold in stats.folds):
        return None
    correlations, overlaps = [], []
    for first, second in _halves(len(stats.folds)):
        try:
            scores = [merge_segments(stats, _score(by, stats, heldout, half), merge) for half in (first, second)]
        except UsageError:
            # class rows were not kept, and a class on both sides cannot be put together without
            return None
        varies = all(len(s.unique()) > 1 for s in scores)
        correlations.append(float(spearmanr(*(s.flatten().numpy() for s in scores)).statistic) if varies else math.nan)
        signed = [-s if by == "lowest" else s for s in scores]
        chosen = [set(zip(*(t.tolist() for t in highest(s, fraction, scope)), strict=True)) for s in signed]
        overlaps.append(len(chosen[0] & chosen[1]) / len(chosen[0]))
    chance = len(chosen[0]) / scores[0].numel()
    return Reliability(by, fraction, fmean(correlations), fmean(overlaps), chance, len(overlaps))


def _score(by: str, stats: UnitStats, heldout: UnitStats | None, folds: tuple[int, ...]) -> Tensor:
    half = _join(stats, folds)
    # the whole sets were matched above
    return half.unitmem() - _join(heldout, folds).unitmem() if by == "gap" else SCORES[by](half, None)


def _halves(folds: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The ways to pair folds into two halves, each pair once."""
    return [
        (half, tuple(i for i in range(folds) if i not in half))
        for half in combinations(range(folds), folds // 2)
        if 0 in half
    ]


def _join(stats: UnitStats, folds: tuple[int, ...]) -> UnitStats:
    return reduce(UnitStats.merge, [stats.folds[i] for i in folds])
