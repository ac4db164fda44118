"""Feature vectors of pictures, and the interface of the networks that compute and compare them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastmem.errors import InputFileError, UsageError
from fastmem.files import check_tensors, read_tensors, write_tensors
from fastmem.index.embedding import DIMENSIONS, Embedder, embed
from fastmem.quality.frechet import Gaussian
from fastmem.quality.kernel import kernel_distance
from fastmem.quality.rows import ChosenRows, Rows, check_finite, stored_rows
from fastmem.tokens.true_images import spread

SCHEMA = "fastmem.features/1"
# with more images, metrics over all pairs of images would take very long and would hardly be more exact
MOST_PAIRED = 50_000


@dataclass(frozen=True, eq=False)
class Features:
    """Feature vectors of pictures, and the logits of a network that also classifies.

    Attributes:
        vectors: float32 [N,D], in memory or in files.
        logits: float32 [N,C]; None where the network does not classify.
        gaussian: mean and covariance of the vectors, where they are saved beside them.
    """

    vectors: Rows
    logits: Rows | None = None
    gaussian: Gaussian | None = None

    def __post_init__(self) -> None:
        for part in (self.vectors, self.logits):
            if isinstance(part, np.ndarray):
                check_finite(part, "the network")

    def __len__(self) -> int:
        return len(self.vectors)

    @classmethod
    def join(cls, parts: Sequence[Features]) -> Features:
        """Return the features of all parts in order, with logits where every part has them; one part is needed."""
        logits = [part.logits[:] for part in parts if part.logits is not None]
        vectors = np.concatenate([part.vectors[:] for part in parts])
        return cls(vectors, np.concatenate(logits) if len(logits) == len(parts) else None)

    def save(self, path: Path, header: Mapping[str, str]) -> None:
        """Write the features and a header to a safetensors file. Raises: UsageError where it cannot be written."""
        named = {"vectors": self.vectors, "logits": self.logits}
        tensors = {name: torch.from_numpy(values[:]) for name, values in named.items() if values is not None}
        write_tensors(path, tensors, SCHEMA, header)

    @classmethod
    def load(cls, paths: Path | Sequence[Path], header: Mapping[str, str]) -> Features:
        """Return the features in files, one below the other, and check that their headers have all of ``header``.

        The vectors stay in the files, and are read when they are asked for.

        Raises: InputFileError where a file is missing or damaged; UsageError where its header differs.
        """
        files = [paths] if isinstance(paths, Path) else list(paths)
        vectors, headers = stored_rows(files, SCHEMA, "vectors")
        for path, found in zip(files, headers, strict=True):
            for key, value in header.items():
                if found.get(key) != value:
                    raise UsageError(
                        f"expected features with {key} {value} in {path}, got {found.get(key)}: remove the file to "
                        "have it made anew"
                    )
        if vectors is None:
            raise InputFileError(
                f"expected a tensor vectors of float32 [N,D] in every file of features from {files[0]} on, got none: "
                "remove the file to have it made anew"
            )
        logits = stored_rows(files, SCHEMA, "logits")[0]
        if logits is not None and not np.array_equal(logits.ends, vectors.ends):
            raise InputFileError(
                f"expected as many logits as vectors in the files of features from {files[0]} on, got {len(logits)} "
                f"and {len(vectors)}: remove the file to have it made anew"
            )
        return cls(vectors, logits, _saved_gaussian(files[0], vectors) if len(files) == 1 else None)


def _saved_gaussian(path: Path, vectors: Rows) -> Gaussian | None:
    """Return the mean and covariance that a file of features holds beside them, or None where it holds none."""
    tensors, _ = read_tensors(path, SCHEMA)
    if "mu" not in tensors or "sigma" not in tensors:
        return None
    size = vectors.shape[1]
    check_tensors(path, tensors, {"mu": ("float64", (size,)), "sigma": ("float64", (size, size))})
    mu, sigma = (np.array(tensors[name].numpy()) for name in ("mu", "sigma"))
    check_finite(mu, str(path))
    check_finite(sigma, str(path))
    return Gaussian(mu, sigma, len(vectors))


@dataclass(frozen=True, eq=False)
class Reference:
    """Real images that samples are compared with.

    Attributes:
        description: a few words for people.
        content: SHA-256 of the images, or of the statistics.
        features: features of the images; None where only their statistics are known.
        gaussian: mean and covariance of the features, from a file of statistics; None where ``features`` is given.
        class_counts: number of images by label; empty where only statistics are known.
        train: whether these are training images; a model that copies those gets better metrics.
    """

    description: str
    content: str
    features: Features | None = None
    gaussian: Gaussian | None = None
    class_counts: Mapping[int, int] = field(default_factory=dict)
    train: bool = False


@dataclass(frozen=True)
class Comparison:
    """Metrics by name, and a sentence for each metric that could not be computed or used fewer images."""

    metrics: Mapping[str, float]
    notes: tuple[str, ...] = ()


class FeatureExtractor(Protocol):
    """A network that computes features of pictures, and the metrics that compare two sets of such features.

    Attributes:
        name: name of the network; features of networks with different names must not be compared.
        digest: SHA-256 of the weights, in hexadecimal.
        dimensions: length D of a feature vector.
    """

    name: str
    digest: str
    dimensions: int

    def __call__(self, pixels: np.ndarray) -> Features:
        """Return the features of RGB pictures, uint8 [N,S,S,3] in [0,255]."""

    def compare(self, samples: Features, reference: Reference) -> Comparison:
        """Return the metrics of samples against a reference, and a note for each metric that needs more images."""


def to_bytes(images: Tensor) -> np.ndarray:
    """Return images, float [N,3,S,S] in [0,1], as the bytes that PNG files would hold, uint8 [N,S,S,3]."""
    return (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


class SSCDFeatures:
    """SSCD embeddings as features; their metric is ``kd-sscd``, an unbiased kernel distance that needs few images."""

    dimensions = DIMENSIONS

    def __init__(self, embedder: Embedder) -> None:
        self.name, self.digest, self._embedder = embedder.name, embedder.digest, embedder

    def __call__(self, pixels: np.ndarray) -> Features:
        """Return the embeddings, float32 [N,512] of length 1, of RGB pictures, uint8 [N,S,S,3]."""
        return Features(embed(self._embedder, [Image.fromarray(picture) for picture in pixels]))

    def compare(self, samples: Features, reference: Reference) -> Comparison:
        """Return kd-sscd, the kernel distance of samples and reference, with its 95 % interval.

        The kernel is (cosine + 1)^3.
        """
        # scaled so that x.y / D in KID's kernel is the cosine: for unit vectors it would be near 0, where the kernel is
        # almost linear, compares little more than means and hardly notices repeated images
        return compare_by_kernel("kd-sscd", samples, reference, self.dimensions**0.5)


def compare_by_kernel(name: str, samples: Features, reference: Reference, scale: float = 1.0) -> Comparison:
    """Return the kernel distance of samples and reference, and the ends of its 95 % interval as NAME-low and NAME-high.

    At most ``MOST_PAIRED`` images of each side are used, and a note says so where there are more.

    Args:
        name: name of the metric.
        samples: features of the samples.
        reference: the images to compare them with.
        scale: factor that all feature vectors are multiplied by.
    """
    if reference.features is None:
        return Comparison({}, (f"no {name}: {reference.description} holds no features of single images",))
    sides, notes = thinned(name, samples, reference.features)
    try:
        found = kernel_distance(*sides, scale=scale)
    except UsageError as error:
        return Comparison({}, (f"no {name}: {error}",))
    return Comparison({name: found.value, f"{name}-low": found.low, f"{name}-high": found.high}, notes)


def thinned(name: str, samples: Features, reference: Features) -> tuple[tuple[Rows, Rows], tuple[str, ...]]:
    """Return the vectors of at most ``MOST_PAIRED`` images of each side, evenly spread, and notes where there are more.

    ``samples`` and ``reference`` are the features of the two sides, and ``name`` is the metric that notes are about.
    """
    sides = {"samples": samples, "reference": reference}
    notes = tuple(
        f"{name} over {MOST_PAIRED:,} of {len(side):,} images of the {what}, evenly spread"
        for what, side in sides.items()
        if len(side) > MOST_PAIRED
    )
    mine, theirs = (
        side.vectors if len(side) <= MOST_PAIRED else ChosenRows(side.vectors, spread(len(side), MOST_PAIRED))
        for side in sides.values()
    )
    return (mine, theirs), notes
