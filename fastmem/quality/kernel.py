"""Unbiased kernel distance (squared maximum mean discrepancy) between two sets of feature vectors.

The kernel is KID's, k(x, y) = (x.y / D + 1)^3. With Inception features the distance is KID; with SSCD's, scaled from
unit length to unit mean square, it is called ``kd-sscd``. Neither is ever called FID. Unlike a Frechet distance it is
unbiased for any number of images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from fastmem.errors import UsageError

BLOCK = 2048
GROUPS = 40
# with one of them left out there must still be a pair
LEAST = 3
CONFIDENCE = 0.95
SUBSETS, SUBSET_SIZE = 100, 1000
# torch-fidelity's default, which determines the subsets
SUBSET_SEED = 2020


@dataclass(frozen=True)
class KernelDistance:
    """An unbiased distance, which may be below 0 for sets alike, with its standard error and 95 % interval."""

    value: float
    error: float
    low: float
    high: float


def kernel(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """k(x, y) of every pair: float64 [n,D] and [m,D] -> float64 [n,m]. Source: arXiv 1801.01401, section 4."""
    product = first @ second.T / first.shape[1] + 1
    return product * product * product


def kernel_distance(first: np.ndarray, second: np.ndarray, seed: int = 0) -> KernelDistance:
    """Distance of two sets of vectors, float [n,D] and [m,D], over all pairs, in bounded memory.

    The interval is a grouped jackknife's: both sets are dealt by ``seed`` into 40 groups, and each group is left out
    once. That needs no more than the sums of the kernel over pairs of groups, holds where the sets are alike and the
    first-order variance vanishes, and counts no image twice as a bootstrap would.

    Raises: UsageError for sets of fewer than 3 vectors or of different dimensions.
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
    """Mean and standard deviation of the distance over random subsets, as torch-fidelity reports KID.

    Raises: UsageError for sets smaller than a subset or of different dimensions.

    Source: toshas/torch-fidelity metric_kid.py.
    """
    _check(first, second, least=size)
    random = np.random.RandomState(seed)
    found = []
    for _ in range(subsets):
        # torch-fidelity's draws, in its order
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
    """Vectors in random order, so that a group is a slice of the order's remainders, and the group of each."""
    order = np.random.default_rng(seed).permutation(len(vectors))
    group = np.sort(np.arange(len(vectors)) % groups)
    return vectors[order], group


def _within(vectors: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
    """Sums of the kernel over ordered pairs of different vectors, by pair of groups: float64 [groups,groups]."""
    found = _between(vectors, group, vectors, group, groups)
    squares = (np.einsum("nd,nd->n", vectors, vectors) / vectors.shape[1] + 1) ** 3
    found[np.diag_indices(groups)] -= np.bincount(group, weights=squares, minlength=groups)
    return found


def _between(
    first: np.ndarray, first_group: np.ndarray, second: np.ndarray, second_group: np.ndarray, groups: int
) -> np.ndarray:
    """Sums of the kernel by pair of groups, float64 [groups,groups], a block of pairs at a time."""
    found = np.zeros((groups, groups))
    for i in range(0, len(first), BLOCK):
        for j in range(0, len(second), BLOCK):
            values = kernel(first[i : i + BLOCK], second[j : j + BLOCK])
            rows, columns = (_members(g, groups) for g in (first_group[i : i + BLOCK], second_group[j : j + BLOCK]))
            found += rows @ values @ columns.T
    return found


def _members(group: np.ndarray, groups: int) -> np.ndarray:
    """Which vector belongs to which group, float64 [groups,n]."""
    return (group[None] == np.arange(groups)[:, None]).astype(np.float64)


def _without(g: int, own: list[np.ndarray], cross: np.ndarray, sizes: list[np.ndarray]) -> float:
    left = [s.sum() - s[g].sum() - s[:, g].sum() + s[g, g] for s in own]
    mixed = cross.sum() - cross[g].sum() - cross[:, g].sum() + cross[g, g]
    return _distance(left, mixed, [s.sum() - s[g] for s in sizes])
