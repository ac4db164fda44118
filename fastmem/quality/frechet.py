"""Frechet distance between Gaussians in float64, their streaming moments, and reference statistics from a file."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastmem.errors import InputFileError, UsageError


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean and covariance of feature vectors.

    mu: float64 [D]; sigma: float64 [D,D], with n-1 in the denominator; count: vectors they come from, None where a
    file does not tell.
    """

    mu: np.ndarray
    sigma: np.ndarray
    count: int | None = None


@dataclass(frozen=True, eq=False)
class FeatureMoments:
    """Streaming mean and scatter of feature vectors: equal to 1e-10 for any batches, shards and order.

    count: vectors so far; mean: float64 [D]; scatter: float64 [D,D], the sum of outer products of what is centred.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def zero(cls, dimensions: int) -> FeatureMoments:
        """Moments of no vectors."""
        return cls(0, np.zeros(dimensions), np.zeros((dimensions, dimensions)))

    def update(self, vectors: np.ndarray) -> FeatureMoments:
        """These moments with a batch of vectors, float [n,D], added."""
        if not len(vectors):
            return self
        wide = vectors.astype(np.float64)
        mean = wide.mean(0)
        centred = wide - mean
        return self.merge(FeatureMoments(len(wide), mean, centred.T @ centred))

    def merge(self, other: FeatureMoments) -> FeatureMoments:
        """Moments of both sets of vectors. Source: Chan, Golub and LeVeque, Updating formulae (1979)."""
        count = self.count + other.count
        if not count:
            return self
        step = other.mean - self.mean
        shift = np.outer(step, step) * (self.count * other.count / count)
        return FeatureMoments(count, self.mean + step * (other.count / count), self.scatter + other.scatter + shift)

    def finish(self) -> Gaussian:
        """Mean and covariance.

        Raises: UsageError for fewer vectors than dimensions + 1, whose covariance is singular.
        """
        dimensions = len(self.mean)
        if self.count <= dimensions:
            raise UsageError(
                f"expected at least {dimensions + 1} images for a Frechet distance of {dimensions} dimensions, got "
                f"{self.count}: use a kernel distance, or more images"
            )
        return Gaussian(self.mean, self.scatter / (self.count - 1), self.count)


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Squared Frechet distance |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) in float64.

    The trace of the root is the sum of singular values of S1^(1/2) S2^(1/2): real and never negative, also where the
    covariances are near-singular and a matrix square root of S1 S2 is neither.

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
    """Reference statistics of a .npz file with arrays ``mu`` [D] and ``sigma`` [D,D]; other arrays are not looked at.

    Raises: InputFileError where the file is missing, damaged, lacks them, or holds others than ``dimensions`` finite
    ones.

    Source: openai/guided-diffusion evaluations/evaluator.py.
    """
    if not path.is_file():
        raise InputFileError(f"expected reference statistics at {path}, got no such file: check the path")
    try:
        with np.load(path, allow_pickle=False) as file:
            mu, sigma = (np.asarray(file[name], dtype=np.float64) for name in ("mu", "sigma"))
    # an .npy file is no archive, which shows only where it is used as one
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
