"""Unbiased kernel distance (squared maximum mean discrepancy) between two sets of feature vectors.

The kernel is that of KID, k(x, y) = (x.y / D + 1)^3. With Inception features the distance is KID. With SSCD embeddings,
scaled from length 1 to length sqrt(D), it is called ``kd-sscd``. Unlike a Frechet distance, it is unbiased for any
number of images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.linalg import blas

from fastmem.errors import UsageError
from fastmem.quality.rows import Rows

# vectors of each side whose kernel is computed at once
BLOCK = 2048
# rows of a kernel that are cubed and summed at once
ROWS = 32
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


def kernel_distance(first: Rows, second: Rows, seed: int = 0, scale: float = 1.0) -> KernelDistance:
    """Return the kernel distance of two sets of vectors, float [n,D] and [m,D], over all pairs, in bounded memory.

    The interval comes from a grouped jackknife: ``seed`` splits both sets into 40 groups at random, and the distance is
    computed again without each group. The jackknife needs only the sums of the kernel over pairs of groups. It also
    holds for two sets of the same distribution, and unlike a bootstrap it never uses an image twice.

    Args:
        first: vectors of one set.
        second: vectors of the other set.
        seed: seed of the groups.
        scale: factor that all vectors are multiplied by.

    Raises: UsageError where a set has fewer than 3 vectors, or the sets have different dimensions.
    """
    _check(first, second, least=LEAST)
    groups = min(GROUPS, len(first), len(second))
    sides = [_Dealt(side, _deal(len(side), groups, seed + i), scale) for i, side in enumerate((first, second))]
    own = [_within(side, groups) for side in sides]
    cross = _between(sides[0], sides[1], groups)
    sizes = [np.bincount(side.group, minlength=groups) for side in sides]
    value = _distance([s.sum() for s in own], cross.sum(), [s.sum() for s in sizes])
    left = np.array([_without(g, own, cross, sizes) for g in range(groups)])
    error = float(np.sqrt((groups - 1) / groups * ((left - left.mean()) ** 2).sum()))
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, groups - 1)) * error
    return KernelDistance(value, error, value - reach, value + reach)


def kernel_subsets(
    first: Rows, second: Rows, subsets: int = SUBSETS, size: int = SUBSET_SIZE, seed: int = SUBSET_SEED
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
        parts = [side[random.choice(len(side), size, replace=False)] for side in (first, second)]
        cross = _sum_of_kernel(parts[0] @ parts[1].T, parts[0].shape[1])
        found.append(_distance([_sum_within(part) for part in parts], cross, [size, size]))
    return float(np.mean(found)), float(np.std(found))


def _check(first: Rows, second: Rows, least: int) -> None:
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


def _sum_of_kernel(products: np.ndarray, dimensions: int) -> float:
    """Return the sum, in float64, of the kernel of pairs of vectors whose products x.y are given, float [n,m]."""
    total = 0.0
    # in blocks that stay in the cache of a core
    for start in range(0, len(products), ROWS):
        values = products[start : start + ROWS].astype(np.float64)
        values *= 1 / dimensions
        values += 1
        cubes = values * values
        cubes *= values
        total += float(cubes.sum())
    return total


def _sum_within(vectors: np.ndarray) -> float:
    """Return the sum of the kernel over ordered pairs of different vectors, float [n,D]."""
    count, dimensions = vectors.shape
    (symmetric,) = blas.get_blas_funcs(("syrk",), (vectors,))
    # half the work of a matrix product: only one triangle is computed, and the kernel of the zeros beside it is 1
    both = _sum_of_kernel(symmetric(1.0, vectors.T, trans=1).T, dimensions)
    return 2 * (both - count * (count - 1) / 2 - float(_own_kernel(vectors).sum()))


def _own_kernel(vectors: np.ndarray) -> np.ndarray:
    """Return the kernel of every vector with itself, float64 [n]."""
    return (np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64) / vectors.shape[1] + 1) ** 3


@dataclass(frozen=True, eq=False)
class _Dealt:
    """Vectors with the group of each, int64 [n], and the factor they are multiplied by; read a block at a time."""

    vectors: Rows
    group: np.ndarray
    scale: float

    def blocks(self, groups: int, first: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield blocks from the position ``first`` on: vectors, float64 [b,D], and 1 for their group, [groups,b]."""
        for start in range(first, len(self.group), BLOCK):
            at = slice(start, start + BLOCK)
            yield self.vectors[at].astype(np.float64) * self.scale, _members(self.group[at], groups)


def _deal(count: int, groups: int, seed: int) -> np.ndarray:
    """Return a random group for each of ``count`` vectors, int64; groups are equal in size to within one."""
    group = np.empty(count, dtype=np.int64)
    group[np.random.default_rng(seed).permutation(count)] = np.sort(np.arange(count) % groups)
    return group


def _within(side: _Dealt, groups: int) -> np.ndarray:
    """Return the sums of the kernel over ordered pairs of different vectors, by pair of groups, [groups,groups]."""
    found = np.zeros((groups, groups))
    for number, (mine, rows) in enumerate(side.blocks(groups)):
        # half of all pairs: the others are the same, the other way round
        for later, (theirs, columns) in enumerate(side.blocks(groups, number * BLOCK)):
            sums = rows @ kernel(mine, theirs) @ columns.T
            found += sums + sums.T if later else sums
        found[np.diag_indices(groups)] -= rows @ _own_kernel(mine)
    return found


def _between(first: _Dealt, second: _Dealt, groups: int) -> np.ndarray:
    """Return the sums of the kernel over pairs of vectors, by pair of groups, float64 [groups,groups]."""
    found = np.zeros((groups, groups))
    for mine, rows in first.blocks(groups):
        for theirs, columns in second.blocks(groups):
            found += rows @ kernel(mine, theirs) @ columns.T
    return found


def _members(group: np.ndarray, groups: int) -> np.ndarray:
    """Return 1 where a vector belongs to a group and 0 elsewhere, float64 [groups,n]."""
    return (group[None] == np.arange(groups)[:, None]).astype(np.float64)


def _without(g: int, own: list[np.ndarray], cross: np.ndarray, sizes: list[np.ndarray]) -> float:
    """Return the distance without the vectors of group ``g``, from the sums of the kernel over pairs of groups."""
    left = [s.sum() - s[g].sum() - s[:, g].sum() + s[g, g] for s in own]
    mixed = cross.sum() - cross[g].sum() - cross[:, g].sum() + cross[g, g]
    return _distance(left, mixed, [s.sum() - s[g] for s in sizes])
