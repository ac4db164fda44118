"""Frechet distance between feature vectors in float64: mean and covariance, computed in batches or read from a file."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastmem.errors import InputFileError, UsageError


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
    """Running mean and scatter of feature vectors, which do not depend on batches or order, up to about 1e-10.

    Attributes:
        count: number of vectors so far.
        mean: float64 [D].
        scatter: float64 [D,D], sum of the outer products of the centred vectors with themselves.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def zero(cls, dimensions: int) -> FeatureMoments:
        """Return the moments of an empty set of vectors of length ``dimensions``."""
        return cls(0, np.zeros(dimensions), np.zeros((dimensions, dimensions)))

    def update(self, vectors: np.ndarray) -> FeatureMoments:
        """Return these moments with a batch of vectors, float [n,D], added."""
        if not len(vectors):
            return self
        wide = vectors.astype(np.float64)
        mean = wide.mean(0)
        centred = wide - mean
        return self.merge(FeatureMoments(len(wide), mean, centred.T @ centred))

    def merge(self, other: FeatureMoments) -> FeatureMoments:
        """Return the moments of both sets of vectors together.

        Source: Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances
        (1979).
        """
        count = self.count + other.count
        if not count:
            return self
        step = other.mean - self.mean
        shift = np.outer(step, step) * (self.count * other.count / count)
        return FeatureMoments(count, self.mean + step * (other.count / count), self.scatter + other.scatter + shift)

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
        return Gaussian(self.mean, self.scatter / (self.count - 1), self.count)


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Return the squared Frechet distance |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two Gaussians, in float64.

    The trace of (S1 S2)^(1/2) is computed as the sum of the singular values of S1^(1/2) S2^(1/2), so it is always real
    and never negative. A matrix square root of S1 S2 need not be, where the covariances are nearly singular.

    Raises: UsageError for Gaussians of different dimensions.

    Source: Heusel et al., arXiv 1706.08500, equation 6.
    """
    if len(first.mu) != len(second.mu):
        raise UsageError(
            f"expected two Gaussians of equal dimensions, got {len(first.mu)} and {len(second.mu)}: use statistics of "
            "the same features"
        )
    roots = _root(first.sigma) @ _root(second.sigma)
    overlap = np.linalg.svd(roots, compute_uv=False).sum()
    step = first.mu - second.mu
    return float(step @ step + np.trace(first.sigma) + np.trace(second.sigma) - 2 * overlap)


def _root(sigma: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh((sigma + sigma.T) / 2)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def read_statistics(path: Path, dimensions: int) -> Gaussian:
    """Read reference statistics from a .npz file: its arrays ``mu`` [D] and ``sigma`` [D,D], where D is ``dimensions``.

    Raises: InputFileError where the file is missing or damaged, or lacks an array, or where an array has another shape
    or a value that is not finite.

    Source: openai/guided-diffusion evaluations/evaluator.py.
    """
    if not path.is_file():
        raise InputFileError(f"expected reference statistics at {path}, got no such file: check the path")
    try:
        with np.load(path, allow_pickle=False) as file:
            mu, sigma = (np.asarray(file[name], dtype=np.float64) for name in ("mu", "sigma"))
    # numpy also loads a .npy file, which raises an error only when it is used as an archive
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise InputFileError(
            f"expected a .npz file with arrays mu and sigma in {path}, got one that cannot be used "
            f"({type(error).__name__}: {' '.join(str(error).split())[:120]}): download it again"
        ) from error
    fits = mu.shape == (dimensions,) and sigma.shape == (dimensions, dimensions)
    if not fits or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        what = "values that are not finite" if fits else f"mu {list(mu.shape)} and sigma {list(sigma.shape)}"
        raise InputFileError(
            f"expected mu [{dimensions}] and sigma [{dimensions},{dimensions}] in {path}, got {what}: use statistics "
            "of the same features"
        )
    return Gaussian(mu, sigma)
