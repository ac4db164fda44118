"""Measure how well a ranking of units agrees between two disjoint halves of the images."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from itertools import combinations
from statistics import fmean

from torch import Tensor

from fastmem.errors import UsageError
from fastmem.ranking.selection import SCORES, highest, matched_to, merge_segments, required
from fastmem.stats import UnitStats


@dataclass(frozen=True)
class Reliability:
    """How well rankings on two disjoint halves of the images agree, averaged over the ways to split the folds in half.

    Attributes:
        by: the score that units are ranked by.
        fraction: share of all units that are selected, in (0,1].
        spearman: rank correlation of the scores of all units.
        overlap: share of the units selected on one half that are also selected on the other, in [0,1].
        chance: the overlap expected of two independent selections.
        halves: number of ways to split the folds in half.
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
    """Return the agreement of a ranking of units between two halves of the images, or None where it cannot be measured.

    It cannot be measured for random and matched units, for your own scores, for fewer than four folds with images,
    where a half has too few images for the score or gives all units the same, or where the score needs statistics of
    every class that were not kept. Each half consists of two of the four folds. A
    half has only half of the images, so rankings on all images would agree better.

    Args:
        stats: statistics of the training images.
        fraction: share of all units to select, in (0,1].
        by: the score to rank by, as in `select`.
        scope: "global", or "per-layer" for equally many units in every layer.
        merge: how a unit's scores in all segments become one, "max", "mean" or "sum".
        heldout: statistics of held-out images, which a ranking by gap needs.

    Raises: UsageError for an unknown merge, or where a ranking by gap has no held-out statistics that match.
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
            # a half has too few images, or the score needs statistics of every class, which were not kept
            return None
        if not all(len(s.unique()) > 1 for s in scores):
            # equal scores are no ranking, and which of them are highest would be a matter of their order
            return None
        correlations.append(float(spearmanr(*(s.flatten().numpy() for s in scores)).statistic))
        signed = [-s if by == "lowest" else s for s in scores]
        chosen = [set(zip(*(t.tolist() for t in highest(s, fraction, scope)), strict=True)) for s in signed]
        overlaps.append(len(chosen[0] & chosen[1]) / len(chosen[0]))
    chance = len(chosen[0]) / scores[0].numel()
    return Reliability(by, fraction, fmean(correlations), fmean(overlaps), chance, len(overlaps))


def _score(by: str, stats: UnitStats, heldout: UnitStats | None, folds: tuple[int, ...]) -> Tensor:
    half = _join(stats, folds)
    # the caller has matched the whole sets already, so their halves need no check
    return half.unitmem() - _join(required(heldout), folds).unitmem() if by == "gap" else SCORES[by](half, None)


def _halves(folds: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return all ways to split the folds into two halves, each of them once."""
    return [
        (half, tuple(i for i in range(folds) if i not in half))
        for half in combinations(range(folds), folds // 2)
        if 0 in half
    ]


def _join(stats: UnitStats, folds: tuple[int, ...]) -> UnitStats:
    return reduce(UnitStats.merge, [stats.folds[i] for i in folds])
