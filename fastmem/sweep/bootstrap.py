"""Statistics of comparisons between two edits: a bootstrap over classes and seeds, corrected for multiple tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastmem.errors import UsageError

# level of the confidence intervals
LEVEL = 0.95
ROUNDS = 10_000
# fewer rounds where random units are tuned again in every round, so that they take only a second
TUNED_ROUNDS = 2_000


@dataclass(frozen=True)
class Difference:
    """The number of targets extracted under one edit minus the number under another edit.

    Interval and p-value are NaN, undefined, where the targets are of one class only.

    Attributes:
        value: the difference.
        low: lower end of its 95 % bootstrap interval.
        high: upper end of its 95 % bootstrap interval.
        p_value: two-sided p-value of the hypothesis that there is no difference.
    """

    value: float
    low: float
    high: float
    p_value: float


def paired_bootstrap(
    extracted: np.ndarray, other: np.ndarray, classes: np.ndarray, rounds: int = ROUNDS, seed: int = 0
) -> Difference:
    """Return the difference in extracted targets between two edits, with a bootstrap interval and a p-value.

    Every round of the bootstrap draws classes and seeds with replacement. All targets of a class are drawn together.

    Args:
        extracted: whether one edit extracts each target, bool or float in [0,1], with a row for each seed, [S,N], or
            for a single seed [N]; the mean over the seeds counts.
        other: the same for the other edit and the same targets, [R,N] or [N].
        classes: class of each target, int [N].
        rounds: number of bootstrap rounds.
        seed: seed of the bootstrap.

    Raises: UsageError where there are no targets, or not one outcome and one class for each target.

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
    value = float(sides[0].mean(0).sum() - sides[1].mean(0).sum())
    return _difference(value, mine - theirs, drawn.shape[1])


def _class_sums(outcomes: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Return the number of extracted targets of every class by seed, [S,C], from outcomes float64 [S,N]."""
    _, cluster = np.unique(classes, return_inverse=True)
    return np.stack([np.bincount(cluster, weights=row) for row in outcomes])


def _draw_classes(rng: np.random.Generator, count: int, rounds: int) -> np.ndarray:
    """Return how often each class is drawn in each round, int64 [rounds,C]."""
    return rng.multinomial(count, np.full(count, 1 / count), size=rounds)


def _draw_seeds(rng: np.random.Generator, count: int, rounds: int) -> np.ndarray:
    """Return the weight of each seed in the mean over the seeds drawn in each round, float64 [rounds,S]."""
    return rng.multinomial(count, np.full(count, 1 / count), size=rounds) / count


def _mean_over_seeds(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the mean over the drawn seeds in each round, [rounds,...], of values by seed, [S,...]."""
    # means of S seeds drawn from S seeds vary less than means of S new seeds, so their deviations are widened
    mean, count = values.mean(0), len(values)
    return mean + (weights @ values - mean) * (count / max(1, count - 1)) ** 0.5


def _totals(drawn: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Return the number of extracted targets in each round, float64 [rounds]."""
    return np.einsum("rc,rc->r", drawn, sums)


def _difference(value: float, found: np.ndarray, classes: int) -> Difference:
    """Return a difference with interval and p-value from the differences in the bootstrap rounds, float64 [rounds].

    ``classes`` is the number of classes that the rounds drew from.
    """
    if classes < 2:
        # every draw from one class is that class
        return Difference(value, math.nan, math.nan, math.nan)
    low, high = np.quantile(found, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    # the measured difference counts as one more round, so that no p-value is 0
    tails = [
        (1 + np.count_nonzero(found <= 0)) / (len(found) + 1),
        (1 + np.count_nonzero(found >= 0)) / (len(found) + 1),
    ]
    return Difference(value, float(low), float(high), min(1.0, 2 * min(tails)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for testing several hypotheses at once, by the step-down method of Holm (1979).

    One that is NaN, undefined, stays so.
    """
    order = np.argsort(p_values, kind="stable")
    corrected = np.empty(len(p_values))
    remaining = len(p_values) - np.arange(len(p_values))
    corrected[order] = np.maximum.accumulate(np.asarray(p_values, dtype=np.float64)[order] * remaining).clip(max=1.0)
    return corrected.tolist()


@dataclass(frozen=True, eq=False)
class Outcomes:
    """Results of an edit, or of the unedited model, with each of S seeds.

    ``extracted``, bool or float [S,N], says whether each target is extracted, and ``costs``, float64 [S], is the loss
    of quality.
    """

    extracted: np.ndarray
    costs: np.ndarray


@dataclass(frozen=True, eq=False)
class EqualQuality:
    """Random units that are scaled by the factor at which they cost as much quality as another edit.

    Attributes:
        factor: the factor, between measured ones; 1 is no edit.
        cost: loss of quality at this factor.
        extracted: share of seeds that extract each target at this factor, float64 [N].
        reached: False where random units cost less than the edit even at the smallest measured factor, which is then
            taken.
    """

    factor: float
    cost: float
    extracted: np.ndarray
    reached: bool


def equal_quality(
    cost: float, factors: Sequence[float], costs: Sequence[float], extracted: Sequence[np.ndarray]
) -> EqualQuality:
    """Return random units at the factor where they cost ``cost``, by linear interpolation between measured factors.

    Costs are first made monotone by isotonic regression, because noise can make a stronger edit look cheaper.

    Args:
        cost: loss of quality to reach; a cost up to that of the unedited model gives the factor 1.
        factors: measured factors, falling from 1 (no edit).
        costs: loss of quality at each factor, the mean over seeds.
        extracted: share of seeds that extract each target at each factor, float [N].

    Raises: UsageError where the factors do not fall from 1, or there are not a cost and outcomes for each.
    """
    from scipy.optimize import isotonic_regression

    falling = list(factors) == sorted(set(factors), reverse=True)
    if not (len(factors) == len(costs) == len(extracted) and falling and factors[0] == 1):
        raise UsageError(f"expected costs and outcomes at factors that fall from 1, got factors {list(factors)}")
    # an edit cannot cost less than no edit, whatever the noise
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
    """Return the difference in extracted targets between an edit and random units that cost as much quality.

    Every round of the bootstrap draws classes and seeds with replacement, and finds the factor of equal cost again, so
    the interval also covers the uncertainty of the costs. Where the edit has a single seed, its cost varies as much as
    that of the unedited model varies over its seeds.

    Args:
        edit: results of the edit.
        factors: factors of the random units, falling from 1 (no edit).
        grid: results of random units at each factor; the first are those of the unedited model.
        classes: class of each target, int [N].
        rounds: number of bootstrap rounds.
        seed: seed of the bootstrap.

    Raises: UsageError where the factors do not fall from 1, or there are not results for each.
    """
    tuned = equal_quality(
        float(edit.costs.mean()),
        factors,
        [float(g.costs.mean()) for g in grid],
        [np.asarray(g.extracted, dtype=np.float64).mean(0) for g in grid],
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
    return _difference(value, found, drawn.shape[1])
