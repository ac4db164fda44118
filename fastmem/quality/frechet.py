"""Frechet distance between feature vectors in float64: mean and covariance, computed in batches."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.linalg import blas

from fastmem.errors import UsageError

# vectors that are folded at once: few passes over the scatter, and a block of 2,048 dimensions is 32 MiB in float64
BLOCK = 2048


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean ``mu``, float64 [D], and covariance ``sigma``, float64 [D,D], of ``count`` feature vectors.

    The covariance has n - 1 in the denominator. ``count`` is None where it is not known.
    """

    mu: np.ndarray
    sigma: np.ndarray
    count: int | None = None


@dataclass(frozen=True, eq=False)
class FeatureMoments:
    """Running mean and scatter of feature vectors, in memory that does not grow with their number.

    Vectors are folded in blocks of ``BLOCK``, so that the same vectors in the same order give the same bits for any
    split into batches. Other orders, and merges, agree up to about 1e-10.

    Attributes:
        folded: number of vectors in mean and scatter.
        mean: float64 [D].
        scatter: float64 [D,D], sum of the outer products of the centred vectors with themselves; only its upper
            triangle holds numbers.
        waiting: batches, float [n,D], of fewer than ``BLOCK`` vectors together, that are not folded yet.
    """

    folded: int
    mean: np.ndarray
    scatter: np.ndarray
    waiting: tuple[np.ndarray, ...] = ()

    @property
    def count(self) -> int:
        """Number of vectors so far."""
        return self.folded + sum(map(len, self.waiting))

    @classmethod
    def zero(cls, dimensions: int) -> FeatureMoments:
        """Return the moments of an empty set of vectors of length ``dimensions``."""
        return cls(0, np.zeros(dimensions), np.zeros((dimensions, dimensions), order="F"))

    def update(self, vectors: np.ndarray) -> FeatureMoments:
        """Return these moments with a batch of vectors, float [n,D], added."""
        start = BLOCK - sum(map(len, self.waiting))
        if len(vectors) < start:
            # a copy, because the caller may use the array again
            return replace(self, waiting=(*self.waiting, vectors.copy())) if len(vectors) else self
        first = np.concatenate([*self.waiting, vectors[:start]]) if self.waiting else vectors[:start]
        moments = replace(self, waiting=())._fold(first)
        while len(vectors) - start >= BLOCK:
            moments = moments._fold(vectors[start : start + BLOCK])
            start += BLOCK
        return moments.update(vectors[start:])

    def merge(self, other: FeatureMoments) -> FeatureMoments:
        """Return the moments of both sets of vectors together.

        Source: Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances
        (1979).
        """
        mine, theirs = self._settled(), other._settled()
        count = mine.folded + theirs.folded
        if not count:
            return mine
        step = theirs.mean - mine.mean
        shift = np.outer(step, step) * (mine.folded * theirs.folded / count)
        mean = mine.mean + step * (theirs.folded / count)
        return FeatureMoments(count, mean, np.asfortranarray(mine.scatter + theirs.scatter + shift))

    def finish(self) -> Gaussian:
        """Return mean and covariance.

        Raises: UsageError where there are fewer than D + 1 vectors, because their covariance would be singular.
        """
        dimensions = len(self.mean)
        if self.count <= dimensions:
            raise UsageError(
                f"expected at least {dimensions + 1} images for a Frechet distance of {dimensions} dimensions, got "
                f"{self.count}: use a kernel distance, or more images"
            )
        moments = self._settled()
        upper = np.triu(moments.scatter) / (moments.folded - 1)
        return Gaussian(moments.mean, upper + np.triu(upper, 1).T, moments.folded)

    def _settled(self) -> FeatureMoments:
        """Return these moments with no vectors waiting."""
        return replace(self, waiting=())._fold(np.concatenate(self.waiting)) if self.waiting else self

    def _fold(self, block: np.ndarray) -> FeatureMoments:
        """Return these moments with a block of vectors folded into mean and scatter.

        Products are of float64: those of float32 would move a distance of nearly equal sets by more than its digits.
        """
        # any origin near the mean keeps the digits; the old mean saves a pass over the block
        origin = self.mean if self.folded else block.mean(0, dtype=np.float64)
        centred = np.subtract(block, origin, dtype=np.float64)
        total = np.ones(len(block)) @ centred
        count = self.folded + len(block)
        # half the work of a matrix product, added in place: the result is symmetric
        scatter = blas.dsyrk(1.0, centred.T, beta=1.0, c=self.scatter)
        scatter = blas.dsyr(-1.0 / count, total, a=scatter, overwrite_a=True)
        return FeatureMoments(count, origin + total / count, scatter)


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Return the squared Frechet distance |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two Gaussians, in float64.

    With S1 = F F^T, the eigenvalues of S1 S2 are those of the symmetric matrix F^T S2 F, so the trace of the root is
    always real and never negative. A matrix square root of S1 S2 need not be, where the covariances are nearly
    singular.

    Raises: UsageError for Gaussians of different dimensions.

    Source: Heusel et al., arXiv 1706.08500, equation 6.
    """
    if len(first.mu) != len(second.mu):
        raise UsageError(
            f"expected two Gaussians of equal dimensions, got {len(first.mu)} and {len(second.mu)}: use statistics of "
            "the same features"
        )
    factor = _factor(first.sigma)
    overlap = np.sqrt(np.linalg.eigvalsh(factor.T @ second.sigma @ factor).clip(min=0)).sum()
    step = first.mu - second.mu
    return float(step @ step + np.trace(first.sigma) + np.trace(second.sigma) - 2 * overlap)


def _factor(sigma: np.ndarray) -> np.ndarray:
    """Return a matrix F with F F^T = sigma: Cholesky's, or one of eigenvectors where ``sigma`` is singular."""
    try:
        return np.linalg.cholesky(sigma)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(sigma)
        return vectors * np.sqrt(values.clip(min=0))
