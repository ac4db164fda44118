"""Statistics of the comparison: paired over targets, a class's targets together, corrected over selections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastmem.errors import UsageError

LEVEL = 0.95
ROUNDS = 10_000
# where random units are tuned in every round, which takes a second
TUNED_ROUNDS = 2_000


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
    """The difference in extracted targets between two edits, with whole classes, and each side's seeds, drawn anew.

    extracted, other: bool or float [S,N] in [0,1], a row for each seed (of random units, say), whose mean counts, or
    [N] where there is one; of the same N targets. classes: int [N], whose targets are drawn together.

    Raises: UsageError for outcomes of other targets than ``classes`` has, or of none.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapters 8.6 and 13 (percentile interval).
    """
    sides = [np.atleast_2d(np.asarray(side, dtype=np.float64)) for side in (extracted, other)]
    if not len(classes) or any(side.ndim != 2 or side.shape[1:] != classes.shape for side in sides):
        raise UsageError(
            f"expected outcomes of the same targets, got {extracted.shape}, {other.shape} and classes {classes.shape}"
        )
    rng = np.random.default_rng(seed)
    per_class = [_class_sums(side, classes) for side in sides]
    drawn = _draw_classes(rng, per_class[0].shape[1], rounds)
    mine, theirs = (_totals(drawn, _mean_over_seeds(sums, _draw_seeds(rng, len(sums), rounds))) for sums in per_class)
    return _difference(float(sides[0].mean(0).sum() - sides[1].mean(0).sum()), mine - theirs)


def _class_sums(outcomes: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Extracted targets of every class by seed: float64 [S,N] -> [S,C]."""
    _, cluster = np.unique(classes, return_inverse=True)
    return np.stack([np.bincount(cluster, weights=row) for row in outcomes])


def _draw_classes(rng: np.random.Generator, count: int, rounds: int) -> np.ndarray:
    """How often each class is drawn, int64 [rounds,C]."""
    return rng.multinomial(count, np.full(count, 1 / count), size=rounds)


def _draw_seeds(rng: np.random.Generator, count: int, rounds: int) -> np.ndarray:
    """The weight of each seed in the mean over as many drawn ones, float64 [rounds,S]; of a single seed, 1."""
    return rng.multinomial(count, np.full(count, 1 / count), size=rounds) / count


def _mean_over_seeds(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Means over drawn seeds, float64 [S,...] by [rounds,S] -> [rounds,...].

    Deviations are made as wide as S independent seeds' are, for drawing from S itself loses one part in S of their
    variance.
    """
    mean, count = values.mean(0), len(values)
    return mean + (weights @ values - mean) * (count / max(1, count - 1)) ** 0.5


def _totals(drawn: np.ndarray, sums: np.ndarray) -> np.ndarray:
    return np.einsum("rc,rc->r", drawn, sums)


def _difference(value: float, found: np.ndarray) -> Difference:
    """What the rounds' differences ``found``, float64 [rounds], say of one."""
    low, high = np.quantile(found, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    # the sample itself counts as a round, so that no p value is 0
    tails = [
        (1 + np.count_nonzero(found <= 0)) / (len(found) + 1),
        (1 + np.count_nonzero(found >= 0)) / (len(found) + 1),
    ]
    return Difference(value, float(low), float(high), min(1.0, 2 * min(tails)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p values that hold together at the level of each. Source: Holm 1979."""
    order = np.argsort(p_values, kind="stable")
    corrected = np.empty(len(p_values))
    remaining = len(p_values) - np.arange(len(p_values))
    corrected[order] = np.maximum.accumulate(np.asarray(p_values, dtype=np.float64)[order] * remaining).clip(max=1.0)
    return corrected.tolist()


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What an edit, or the unedited model, does with each of S seeds.

    extracted: bool or float [S,N], of the same targets; costs: float64 [S], its loss of quality.
    """

    extracted: np.ndarray
    costs: np.ndarray


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


def equal_quality_bootstrap(
    edit: Outcomes,
    factors: Sequence[float],
    grid: Sequence[Outcomes],
    classes: np.ndarray,
    rounds: int = TUNED_ROUNDS,
    seed: int = 0,
) -> Difference:
    """The difference in extracted targets between an edit and random units of equal cost, as uncertain as that cost.

    factors: falling from 1; grid: outcomes at each, the first of the unedited model; classes: int [N]. In every round
    classes and all seeds are drawn anew, and the random units are tuned to the edit's cost again. The cost of an edit
    with a single seed varies in the rounds as that of the unedited model does over its seeds.

    Raises: as ``equal_quality`` and ``paired_bootstrap``.
    """
    tuned = equal_quality(
        float(edit.costs.mean()),
        factors,
        [float(g.costs.mean()) for g in grid],
        [np.mean(g.extracted, axis=0, dtype=np.float64) for g in grid],
    )
    rng = np.random.default_rng(seed)
    noise = float(np.std(grid[0].costs, ddof=1)) if len(grid[0].costs) > 1 else 0.0
    sides = [_class_sums(np.asarray(side.extracted, dtype=np.float64), classes) for side in (edit, *grid)]
    drawn = _draw_classes(rng, sides[0].shape[1], rounds)
    totals, costs = [], []
    for side, sums in zip((edit, *grid), sides, strict=True):
        weights = _draw_seeds(rng, len(sums), rounds)
        totals.append(_totals(drawn, _mean_over_seeds(sums, weights)))
        own = _mean_over_seeds(side.costs, weights)
        costs.append(own if len(sums) > 1 else own + noise * rng.standard_normal(rounds))
    found = np.empty(rounds)
    for i in range(rounds):
        rivals = equal_quality(costs[0][i], factors, [c[i] for c in costs[1:]], [t[i] for t in totals[1:]])
        found[i] = totals[0][i] - float(rivals.extracted)
    value = float(np.mean(edit.extracted, axis=0, dtype=np.float64).sum() - tuned.extracted.sum())
    return _difference(value, found)
