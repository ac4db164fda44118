"""The gap of each unit: its UnitMem on training images minus that on held-out images, with interval and p-value."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastmem.errors import UsageError
from fastmem.ranking.selection import matched_to
from fastmem.stats import UnitStats

# level of the confidence intervals
LEVEL = 0.95


@dataclass(frozen=True, eq=False)
class Gap:
    """UnitMem on training images minus UnitMem on held-out images, for two sets of equal size and classes.

    UnitMem grows with the number of images, so ``value`` and ``fold_value`` differ in scale.

    Attributes:
        images: number of images in each set.
        value: difference between the whole sets, float64 [layers,segments,units].
        fold_value: mean UnitMem of the training folds minus that of the held-out folds, float64
            [layers,segments,units].
        low: lower end of the 95 % interval of ``fold_value``, float64 [layers,segments,units].
        high: upper end of the 95 % interval of ``fold_value``, float64 [layers,segments,units].
        p_value: one-sided p-value of the hypothesis that UnitMem is no larger in training folds than in held-out folds,
            float64 [layers,segments,units].
        q_value: smallest false-discovery rate (Benjamini-Hochberg, over all units and segments) at which the unit's gap
            counts as significant, float64 [layers,segments,units].
        mean: mean of ``fold_value`` over layers and units, float64 [segments].
        mean_low: lower end of the 95 % interval of ``mean``, float64 [segments].
        mean_high: upper end of the 95 % interval of ``mean``, float64 [segments].
    """

    images: int
    value: Tensor
    fold_value: Tensor
    low: Tensor
    high: Tensor
    p_value: Tensor
    q_value: Tensor
    mean: Tensor
    mean_low: Tensor
    mean_high: Tensor


def gap(stats: UnitStats, heldout: UnitStats) -> Gap:
    """Return the gap of every unit between statistics of training images and statistics of held-out images.

    The folds of a set share no image, so their UnitMems are independent samples. Student's two-sample t test with
    pooled variance compares them, with 6 degrees of freedom for 4 folds each. Segments whose responses depend on the
    class alone are not tested: their p-values and q-values are 1.

    Raises: UsageError where the sets do not match in size and classes, have fewer than two folds, or have a
    fold of fewer than two images.

    Source: Benjamini and Hochberg 1995.
    """
    from scipy.stats import false_discovery_control

    stats = matched_to(stats, heldout)
    if min(len(stats.folds), len(heldout.folds)) < 2:
        raise UsageError("expected statistics with at least two folds for an interval, got one: score the images again")
    smallest = min(fold.count for s in (stats, heldout) for fold in s.folds)
    if smallest < 2:
        raise UsageError(
            f"expected at least two images in every fold for an interval, got {smallest}: score more images of each set"
        )
    scores = [torch.stack([fold.unitmem() for fold in s.folds]).numpy() for s in (stats, heldout)]
    fold_value, low, high, p_value = _compare(*scores)
    ranked = np.array([name not in stats.class_only for name in stats.segments])
    p_value[:, ~ranked] = 1.0
    q_value = np.ones_like(p_value)
    if ranked.any():
        tested = p_value[:, ranked]
        q_value[:, ranked] = false_discovery_control(tested.ravel()).reshape(tested.shape)
    mean, mean_low, mean_high, _ = _compare(*(s.mean((1, 3)) for s in scores))
    arrays = (fold_value, low, high, p_value, q_value, mean, mean_low, mean_high)
    return Gap(heldout.count, stats.unitmem() - heldout.unitmem(), *(torch.from_numpy(np.asarray(a)) for a in arrays))


def _compare(train: np.ndarray, heldout: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the difference of means over the first axis, both ends of its interval, and the p-value of the t test."""
    from scipy.stats import t

    n, m = len(train), len(heldout)
    difference = train.mean(0) - heldout.mean(0)
    freedom = n + m - 2
    squares = ((train - train.mean(0)) ** 2).sum(0) + ((heldout - heldout.mean(0)) ** 2).sum(0)
    error = np.sqrt(squares / freedom * (1 / n + 1 / m))
    half = t.ppf(0.5 + LEVEL / 2, freedom) * error
    with np.errstate(divide="ignore", invalid="ignore"):
        statistic = difference / error
    # 0 / 0 where all folds are equal, for instance for a unit that never responds: that is no evidence of a gap
    statistic = np.where(np.isnan(statistic), 0.0, statistic)
    return difference, difference - half, difference + half, t.sf(statistic, freedom)
