"""Unbiased kernel distance (squared maximum mean discrepancy) between two sets of feature vectors.

The kernel is that of KID, k(x, y) = (x.y / D + 1)^3. With Inception features the distance is KID. With SSCD embeddings,
scaled from length 1 to length sqrt(D), it is called ``kd-sscd``. Unlike a Frechet distance, it is unbiased for any
number of images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from fastmem.errors import UsageError

# vectors of each side whose kernel is computed at once
BLOCK = 2048
# groups of the jackknife
GROUPS = 40
# with one vector left out, there must still be a pair
LEAST = 3
# level of the interval
CONFIDENCE = 0.95
# torch-fidelity's numbers, so that results are the same as there
SUBSETS, SUBSET_SIZE = 100, 1000
SUBSET_SEED = 2020


@dataclass(frozen=True)
class KernelDistance:
    """An unbiased distance, which can be negative for similar sets, with its uncertainty.

    Attributes:
        value: the distance.
        error: its standard error.
        low: lower end of its 95 % interval.
        high: upper end of its 95 % interval.
    """

    value: float
    error: float
    low: float
    high: float


def kernel(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the kernel k(x, y), float64 [n,m], of every pair of vectors from ``first``, [n,D], and ``second``, [m,D].

    Source: arXiv 1801.01401, section 4.
    """
    product = first @ second.T / first.shape[1] + 1
    return product * product * product


def kernel_distance(first: np.ndarray, second: np.ndarray, seed: int = 0) -> KernelDistance:
    """Return the kernel distance of two sets of vectors, float [n,D] and [m,D], over all pairs, in bounded memory.

    The interval comes from a grouped jackknife: ``seed`` splits both sets into 40 groups at random, and the distance is
    computed again without each group. The jackknife needs only the sums of the kernel over pairs of groups. It also
    holds for two sets of the same distribution, and unlike a bootstrap it never uses an image twice.

    Raises: UsageError where a set has fewer than 3 vectors, or the sets have different dimensions.
    """
    _check(first, second, least=LEAST)
    groups = min(GROUPS, len(first), len(second))
    sides = [_deal(side.astype(np.float64), groups, seed + i) for i, side in enumerate((first, second))]
    own = [_within(vectors, group, groups) for vectors, group in sides]
    cross = _between(*sides[0], *sides[1], groups)
    sizes = [np.bincount(group, minlength=groups) for _, group in sides]
    value = _distance([s.sum() for s in own], cross.sum(), [s.sum() for s in sizes])
    left = np.array([_without(g, own, cross, sizes) for g in range(groups)])
    error = float(np.sqrt((groups - 1) / groups * ((left - left.mean()) ** 2).sum()))
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, groups - 1)) * error
    return KernelDistance(value, error, value - reach, value + reach)


def kernel_subsets(
    first: np.ndarray, second: np.ndarray, subsets: int = SUBSETS, size: int = SUBSET_SIZE, seed: int = SUBSET_SEED
) -> tuple[float, float]:
    """Return mean and standard deviation of the kernel distance over random subsets, as torch-fidelity reports KID.

    Args:
        first: float [n,D], vectors of one set.
        second: float [m,D], vectors of the other set.
        subsets: number of pairs of subsets.
        size: number of vectors in a subset.
        seed: seed of the random subsets.

    Raises: UsageError where a set is smaller than a subset, or the sets have different dimensions.

    Source: toshas/torch-fidelity metric_kid.py.
    """
    _check(first, second, least=size)
    random = np.random.RandomState(seed)
    found = []
    for _ in range(subsets):
        # the same random draws as in torch-fidelity, in the same order
        parts = [side[random.choice(len(side), size, replace=False)].astype(np.float64) for side in (first, second)]
        own = [_without_diagonal(part) for part in parts]
        found.append(_distance(own, kernel(*parts).sum(), [size, size]))
    return float(np.mean(found)), float(np.std(found))


def _check(first: np.ndarray, second: np.ndarray, least: int) -> None:
    if min(len(first), len(second)) < least:
        raise UsageError(
            f"expected at least {least} images on either side of a kernel distance, got {len(first)} and "
            f"{len(second)}: use more images"
        )
    if first.shape[1] != second.shape[1]:
        raise UsageError(
            f"expected features of equal dimensions, got {first.shape[1]} and {second.shape[1]}: use the same features"
        )


def _distance(own: list[float], cross: float, sizes: list[int]) -> float:
    within = sum(total / (n * (n - 1)) for total, n in zip(own, sizes, strict=True))
    return float(within - 2 * cross / (sizes[0] * sizes[1]))


def _without_diagonal(vectors: np.ndarray) -> float:
    found = kernel(vectors, vectors)
    return float(found.sum() - np.trace(found))


def _deal(vectors: np.ndarray, groups: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the vectors in random order and their groups, which are ascending and equal in size to within one."""
    order = np.random.default_rng(seed).permutation(len(vectors))
    group = np.sort(np.arange(len(vectors)) % groups)
    return vectors[order], group


def _within(vectors: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
    """Return the sums of the kernel over ordered pairs of different vectors, by pair of groups, [groups,groups]."""
    found = _between(vectors, group, vectors, group, groups)
    squares = (np.einsum("nd,nd->n", vectors, vectors) / vectors.shape[1] + 1) ** 3
    found[np.diag_indices(groups)] -= np.bincount(group, weights=squares, minlength=groups)
    return found


def _between(
    first: np.ndarray, first_group: np.ndarray, second: np.ndarray, second_group: np.ndarray, groups: int
) -> np.ndarray:
    """Return the sums of the kernel over pairs of vectors, by pair of groups, float64 [groups,groups]."""
    found = np.zeros((groups, groups))
    for i in range(0, len(first), BLOCK):
        for j in range(0, len(second), BLOCK):
            values = kernel(first[i : i + BLOCK], second[j : j + BLOCK])
            rows, columns = (_members(g, groups) for g in (first_group[i : i + BLOCK], second_group[j : j + BLOCK]))
            found += rows @ values @ columns.T
    return found


def _members(group: np.ndarray, groups: int) -> np.ndarray:
    """Return 1 where a vector belongs to a group and 0 elsewhere, float64 [groups,n]."""
    return (group[None] == np.arange(groups)[:, None]).astype(np.float64)


def _without(g: int, own: list[np.ndarray], cross: np.ndarray, sizes: list[np.ndarray]) -> float:
    """Return the distance without the vectors of group ``g``, from the sums of the kernel over pairs of groups."""
    left = [s.sum() - s[g].sum() - s[:, g].sum() + s[g, g] for s in own]
    mixed = cross.sum() - cross[g].sum() - cross[:, g].sum() + cross[g, g]
    return _distance(left, mixed, [s.sum() - s[g] for s in sizes])
