"""UnitMem on training against held-out images: the gap, its interval over folds, and which units stand out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastmem.errors import UsageError
from fastmem.ranking.selection import matched_to
from fastmem.stats import UnitStats

LEVEL = 0.95


@dataclass(frozen=True, eq=False)
class Gap:
    """UnitMem(train) - UnitMem(held-out) on matched sets; tensors float64 [layers,segments,units].

    images: of each set; value: between the whole sets; fold_value: between a training and a held-out fold, on average
    over the folds (UnitMem grows with the number of images, so the two differ in scale); low, high: 95 % interval of
    fold_value; p_value: one-sided, of no larger UnitMem in training folds than in held-out folds; q_value: the
    false-discovery rate at which a unit would be called, over all units and segments (Benjamini-Hochberg).

    mean, mean_low, mean_high: fold_value averaged over units, with its 95 % interval, float64 [segments].
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
    """Compare UnitMem on training images with UnitMem on held-out images, unit by unit.

    The folds of each set are disjoint, so their UnitMems are independent samples; Student's two-sample t test with
    pooled variance compares them (6 degrees of freedom for 4 folds each). Class-only segments are left out of the
    false-discovery rate: their p and q are 1.

    Raises: UsageError where the sets do not match in size and classes, or have fewer than two folds.

    Source: Benjamini and Hochberg 1995.
    """
    from scipy.stats import false_discovery_control

    stats = matched_to(stats, heldout)
    if min(len(stats.folds), len(heldout.folds)) < 2:
        raise UsageError("expected statistics with at least two folds for an interval, got one: score the images again")
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
    """Difference of means over the first axis, its interval, and the one-sided p value of Student's t test."""
    from scipy.stats import t

    n, m = len(train), len(heldout)
    difference = train.mean(0) - heldout.mean(0)
    freedom = n + m - 2
    squares = ((train - train.mean(0)) ** 2).sum(0) + ((heldout - heldout.mean(0)) ** 2).sum(0)
    error = np.sqrt(squares / freedom * (1 / n + 1 / m))
    half = t.ppf(0.5 + LEVEL / 2, freedom) * error
    with np.errstate(divide="ignore", invalid="ignore"):
        statistic = difference / error
    # equal folds everywhere (a unit that never fires) are no evidence
    statistic = np.where(np.isnan(statistic), 0.0, statistic)
    return difference, difference - half, difference + half, t.sf(statistic, freedom)
