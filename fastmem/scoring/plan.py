"""Estimate the size of a scoring pass before it starts: images, bytes on disk, cached tokens and seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastmem.data.manifest import FOLDS, Manifest
from fastmem.data.views import Views
from fastmem.reporter import count_of, size, time_left
from fastmem.scoring.settings import ScoreSettings
from fastmem.stats.accumulators import LARGEST, Shape
from fastmem.tokens.cache import TokenCache

# statistics of every class are kept up to this size; above it only their summary is
MAX_ROW_BYTES = 2 * 2**30
# bytes of one unit and fold in the statistics of a class (mean and M2 in float64, largest response with its image id),
# and in those of all images (moments in float64, the spread over views, the largest responses with their image ids)
ROW_BYTES = 28
FOLD_BYTES = 24 + 12 * LARGEST


@dataclass(frozen=True)
class TokenPlan:
    """The expected use of the token cache in a pass.

    Attributes:
        folder: folder of the cache; None without a cache.
        total_bytes: size of the tokens of all images, in bytes.
        stored: share of the images whose tokens are in the cache already, in [0,1].
    """

    folder: Path | None = None
    total_bytes: int = 0
    stored: float = 0.0

    def __str__(self) -> str:
        if self.folder is None:
            return ""
        there = f" ({self.stored:.0%} of them there)" if self.stored else ""
        return f", {size(self.total_bytes)} of tokens in {self.folder}{there}"


@dataclass(frozen=True)
class ScorePlan:
    """The expected size and duration of a scoring pass.

    Attributes:
        images: number of training images.
        heldout_images: number of held-out images.
        views: number of views of each image.
        disk_bytes: size of the complete run folder, in bytes.
        seconds: duration at the measured speed; None where no speed was measured.
        tokens: the use of the token cache.
        things: plural noun for what is counted.
    """

    images: int
    heldout_images: int
    views: int
    disk_bytes: int
    seconds: float | None
    tokens: TokenPlan = TokenPlan()
    things: str = "images"

    @property
    def total(self) -> int:
        """Number of images of both sets."""
        return self.images + self.heldout_images

    def __str__(self) -> str:
        heldout = f" + {self.heldout_images:,} held-out" if self.heldout_images else ""
        disk = f", about {size(self.disk_bytes)} on disk" if self.disk_bytes else ""
        return (
            f"scoring {self.images:,} images{heldout} with {count_of(self.views, 'view')} each{disk}{self.tokens}"
            f"{time_left(self.seconds)}"
        )


def row_bytes(shape: Shape, manifest: Manifest) -> int:
    """Return the size on disk, in bytes, of the statistics of every class; ``shape`` is [layers,segments,units]."""
    return int(np.prod(shape)) * FOLDS * ROW_BYTES * len(np.unique(manifest.labels))


def keeps_rows(settings: ScoreSettings, shape: Shape, manifest: Manifest) -> bool:
    """Return whether the statistics of every class of a set are kept, and not only their summary.

    ``shape`` is [layers,segments,units].
    """
    if settings.class_rows != "auto":
        return settings.class_rows == "keep"
    return row_bytes(shape, manifest) <= MAX_ROW_BYTES


def disk_bytes(settings: ScoreSettings, shape: Shape, manifests: Mapping[str, Manifest]) -> int:
    """Return the size on disk, in bytes, of the statistics of all sets, and of the part matched to the held-out images.

    ``shape`` is [layers,segments,units], and ``manifests`` are the images by set.
    """
    folds = int(np.prod(shape)) * FOLDS * FOLD_BYTES * (len(manifests) + 1)
    return folds + sum(row_bytes(shape, m) for m in manifests.values() if keeps_rows(settings, shape, m))


def waiting_bytes(shape: Shape, matched: bool, units: int) -> int:
    """Return the size on disk, in bytes, of the results of as many work units as may wait to be added.

    ``shape`` is [layers,segments,units], and ``matched`` says whether they hold those of matched images too.
    """
    return int(np.prod(shape)) * FOLDS * FOLD_BYTES * (1 + matched) * units


def plan_tokens(
    cache: TokenCache | None, recipe: Views, manifests: Mapping[str, Manifest], note: Callable[[str], None]
) -> tuple[TokenPlan, TokenCache | None]:
    """Return the expected use of the token cache, and the cache; None for the cache where the disk has too little room.

    There is too little room where new tokens would fill more than half of the free space.

    Args:
        cache: the cache that was asked for; None for no cache.
        recipe: the views whose tokens are kept.
        manifests: the images, by set.
        note: is given a sentence where there is too little room.
    """
    if cache is None:
        return TokenPlan(), None
    images = sum(map(len, manifests.values()))
    stored = sum(cache.stored(recipe, manifest) for manifest in manifests.values())
    needed, free = cache.bytes_of(recipe, images - stored), cache.free_bytes()
    if needed > free / 2:
        note(
            f"tokens are not kept for the next pass: they need {needed / 1e9:.1f} GB, and {cache.folder} has "
            f"{free / 1e9:.1f} GB left"
        )
        return TokenPlan(), None
    return TokenPlan(cache.folder, cache.bytes_of(recipe, images), stored / max(1, images)), cache
