"""Statistics of the comparison: paired over targets, a class's targets together, corrected over selections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastmem.errors import UsageError

LEVEL = 0.95
ROUNDS = 10_000


@dataclass(frozen=True)
class Difference:
    """Targets extracted under one edit minus those under another.

    value: the difference in targets; low, high: its 95 % bootstrap interval; p_value: two-sided, of no difference.
    """

    value: float
    low: float
    high: float
    p_value: float


def paired_bootstrap(
    extracted: np.ndarray, other: np.ndarray, classes: np.ndarray, rounds: int = ROUNDS, seed: int = 0
) -> Difference:
    """The difference in extracted targets between two edits, with whole classes drawn anew.

    extracted, other: bool [N], or float [N] in [0,1] where it is a mean over seeds, of the same targets; classes: int
    [N], whose targets are drawn together.

    Raises: UsageError for outcomes of other targets than ``classes`` has, or of none.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapters 8.6 and 13 (percentile interval).
    """
    if not (len(classes) and extracted.shape == other.shape == classes.shape):
        raise UsageError(
            f"expected outcomes of the same targets, got {extracted.shape}, {other.shape} and classes {classes.shape}"
        )
    per_target = extracted.astype(np.float64) - other.astype(np.float64)
    _, cluster = np.unique(classes, return_inverse=True)
    sums = np.bincount(cluster, weights=per_target)
    drawn = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=rounds)
    found = drawn @ sums
    low, high = np.quantile(found, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    # the sample itself counts as a round, so that no p value is 0
    tails = [(1 + np.count_nonzero(found <= 0)) / (rounds + 1), (1 + np.count_nonzero(found >= 0)) / (rounds + 1)]
    return Difference(float(sums.sum()), float(low), float(high), min(1.0, 2 * min(tails)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p values that hold together at the level of each. Source: Holm 1979."""
    order = np.argsort(p_values, kind="stable")
    corrected = np.empty(len(p_values))
    remaining = len(p_values) - np.arange(len(p_values))
    corrected[order] = np.maximum.accumulate(np.asarray(p_values, dtype=np.float64)[order] * remaining).clip(max=1.0)
    return corrected.tolist()


@dataclass(frozen=True, eq=False)
class EqualQuality:
    """Random units whose factor is tuned until they cost what an edit costs.

    factor: 1 is no edit; cost: there; extracted: float64 [N], the share of seeds that extract each target there;
    reached: False where even the strongest measured factor costs less than the edit, and is taken.
    """

    factor: float
    cost: float
    extracted: np.ndarray
    reached: bool


def equal_quality(
    cost: float, factors: Sequence[float], costs: Sequence[float], extracted: Sequence[np.ndarray]
) -> EqualQuality:
    """Between the measured factors, where random units cost ``cost``.

    factors: falling from 1 (no edit); costs: mean over seeds of the quality loss at each, made monotone by isotonic
    regression (noise can make a stronger edit look cheaper); extracted: float [N] at each, mean over seeds. Both are
    linear between neighbours. A cost of no edit or less gives the factor 1.

    Raises: UsageError where factors do not fall from 1, or differ in number from costs and outcomes.
    """
    from scipy.optimize import isotonic_regression

    falling = list(factors) == sorted(set(factors), reverse=True)
    if not (len(factors) == len(costs) == len(extracted) and falling and factors[0] == 1):
        raise UsageError(f"expected costs and outcomes at factors that fall from 1, got factors {list(factors)}")
    # no edit costs nothing by definition, and nothing may cost less
    rising = isotonic_regression(np.maximum(costs, costs[0])).x
    if cost <= rising[0]:
        return EqualQuality(1.0, float(rising[0]), np.asarray(extracted[0], dtype=np.float64), True)
    after = int(np.searchsorted(rising, cost))
    if after == len(rising):
        return EqualQuality(float(factors[-1]), float(rising[-1]), np.asarray(extracted[-1], dtype=np.float64), False)
    share = (cost - rising[after - 1]) / (rising[after] - rising[after - 1])
    factor = factors[after - 1] + share * (factors[after] - factors[after - 1])
    mixed = (1 - share) * np.asarray(extracted[after - 1], dtype=np.float64) + share * extracted[after]
    return EqualQuality(float(factor), cost, mixed, True)
