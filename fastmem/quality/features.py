"""What pictures become before sets of them are compared: feature vectors, and the seam that extractors share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastmem.errors import UsageError
from fastmem.files import read_tensors, write_tensors
from fastmem.index.embedding import DIMENSIONS, Embedder, embed
from fastmem.quality.frechet import Gaussian
from fastmem.quality.kernel import kernel_distance
from fastmem.tokens.true_images import spread

SCHEMA = "fastmem.features/1"
# what is over all pairs of images would take petaflops with more, and tell no more
MOST_PAIRED = 50_000


@dataclass(frozen=True, eq=False)
class Features:
    """Feature vectors of pictures, float32 [N,D], and where the network classifies, its logits, float32 [N,C]."""

    vectors: np.ndarray
    logits: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.vectors)

    @classmethod
    def join(cls, parts: Sequence[Features]) -> Features:
        """The features of at least one part, one after the other."""
        logits = [part.logits for part in parts if part.logits is not None]
        vectors = np.concatenate([part.vectors for part in parts])
        return cls(vectors, np.concatenate(logits) if len(logits) == len(parts) else None)

    def save(self, path: Path, header: Mapping[str, str]) -> None:
        """Write a safetensors file. Raises: UsageError where the place cannot be written."""
        named = {"vectors": self.vectors, "logits": self.logits}
        tensors = {name: torch.from_numpy(values) for name, values in named.items() if values is not None}
        write_tensors(path, tensors, SCHEMA, header)

    @classmethod
    def load(cls, path: Path, header: Mapping[str, str]) -> Features:
        """Read what ``save`` wrote with the same header.

        Raises: InputFileError for a missing, damaged or foreign file; UsageError for another header.
        """
        tensors, found = read_tensors(path, SCHEMA)
        for key, value in header.items():
            if found.get(key) != value:
                raise UsageError(
                    f"expected features with {key} {value} in {path}, got {found.get(key)}: remove the file to have it "
                    "made anew"
                )
        logits = tensors.get("logits")
        return cls(tensors["vectors"].numpy(), None if logits is None else logits.numpy())


@dataclass(frozen=True, eq=False)
class Reference:
    """What samples are compared with.

    description: what it is, for people; content: SHA-256 of what makes it; features: of its pictures, None where a file
    holds only ``gaussian``, their mean and covariance; class_counts: pictures by label, empty where it has none; train:
    training images, which a model comes nearer to by copying them.
    """

    description: str
    content: str
    features: Features | None = None
    gaussian: Gaussian | None = None
    class_counts: Mapping[int, int] = field(default_factory=dict)
    train: bool = False


@dataclass(frozen=True)
class Comparison:
    """Metrics by name, and a sentence for each that could not be had."""

    metrics: Mapping[str, float]
    notes: tuple[str, ...] = ()


class FeatureExtractor(Protocol):
    """Turns pictures into features and knows how sets of them are compared.

    Attributes:
        name: network and size in one word; features of different names are never compared.
        digest: SHA-256 of the weights, in hexadecimal.
        dimensions: D.
    """

    name: str
    digest: str
    dimensions: int

    def __call__(self, pixels: np.ndarray) -> Features:
        """Features of RGB pictures, uint8 [N,S,S,3] in [0,255]."""

    def compare(self, samples: Features, reference: Reference) -> Comparison:
        """Metrics of samples against a reference; what there is too little for is left out and named."""


def to_bytes(images: Tensor) -> np.ndarray:
    """Images float [N,3,S,S] in [0,1] as the bytes that a PNG file would hold, uint8 [N,S,S,3]."""
    return (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


class SSCDFeatures:
    """SSCD embeddings: ``kd-sscd``, an unbiased kernel distance that needs few images and no Inception weights."""

    dimensions = DIMENSIONS

    def __init__(self, embedder: Embedder) -> None:
        self.name, self.digest, self._embedder = embedder.name, embedder.digest, embedder

    def __call__(self, pixels: np.ndarray) -> Features:
        """Embeddings of RGB pictures, uint8 [N,S,S,3] -> float32 [N,512] of length 1."""
        return Features(embed(self._embedder, [Image.fromarray(picture) for picture in pixels]))

    def compare(self, samples: Features, reference: Reference) -> Comparison:
        """kd-sscd with its 95 % interval: the kernel is (cosine + 1)^3.

        Coordinates of unit vectors are 1/D in the mean square. Taken as they are, KID's kernel would be all but linear
        and compare little more than means: it sees repeated images much later.
        """
        return compare_by_kernel("kd-sscd", samples, reference, self.dimensions**0.5)


def compare_by_kernel(name: str, samples: Features, reference: Reference, scale: float = 1.0) -> Comparison:
    """The kernel distance of scaled vectors under ``name`` with the ends of its 95 % interval.

    Of a side with more than ``MOST_PAIRED`` images as many are taken, evenly spread, and said so.
    """
    if reference.features is None:
        return Comparison({}, (f"no {name}: {reference.description} holds no features of single images",))
    sides, notes = thinned(name, samples, reference.features)
    try:
        found = kernel_distance(*(vectors * np.float32(scale) for vectors in sides))
    except UsageError as error:
        return Comparison({}, (f"no {name}: {error}",))
    return Comparison({name: found.value, f"{name}-low": found.low, f"{name}-high": found.high}, notes)


def thinned(name: str, samples: Features, reference: Features) -> tuple[tuple[np.ndarray, np.ndarray], tuple[str, ...]]:
    """Vectors of at most ``MOST_PAIRED`` images of each side, evenly spread, and a sentence for each that had more."""
    sides = {"samples": samples, "reference": reference}
    notes = tuple(
        f"{name} over {MOST_PAIRED:,} of {len(side):,} images of the {what}, evenly spread"
        for what, side in sides.items()
        if len(side) > MOST_PAIRED
    )
    mine, theirs = (side.vectors[spread(len(side), MOST_PAIRED)] for side in sides.values())
    return (mine, theirs), notes
