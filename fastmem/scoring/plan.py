"""What a scoring pass will take, told before it starts: images, bytes on disk, tokens in the cache, seconds."""

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

# class rows above this size are summed up instead of kept
MAX_ROW_BYTES = 2 * 2**30
# of one unit and fold: mean and M2 in float64, the largest with its id; moments, views and largest responses with ids
ROW_BYTES = 28
FOLD_BYTES = 24 + 12 * LARGEST


@dataclass(frozen=True)
class TokenPlan:
    """What a pass will keep in the token cache.

    Attributes:
        folder: of the cache; None without one.
        total_bytes: of the tokens of all images.
        stored: share of the images whose tokens are there already, in [0,1].
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
    """What a pass will take.

    Attributes:
        images: training images.
        heldout_images: held-out images.
        views: of each image.
        disk_bytes: of the run folder when it is complete.
        seconds: at the measured speed; None where it was not measured.
        tokens: what goes into the token cache.
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
        """Images of both sets."""
        return self.images + self.heldout_images

    def __str__(self) -> str:
        heldout = f" + {self.heldout_images:,} held-out" if self.heldout_images else ""
        disk = f", about {size(self.disk_bytes)} on disk" if self.disk_bytes else ""
        return (
            f"scoring {self.images:,} images{heldout} with {count_of(self.views, 'view')} each{disk}{self.tokens}"
            f"{time_left(self.seconds)}"
        )


def row_bytes(shape: Shape, manifest: Manifest) -> int:
    """Bytes on disk of the statistics of every class of a set, for units [layers,segments,units]."""
    return int(np.prod(shape)) * FOLDS * ROW_BYTES * len(np.unique(manifest.labels))


def keeps_rows(settings: ScoreSettings, shape: Shape, manifest: Manifest) -> bool:
    """Whether the statistics of every class of a set are kept, rather than summed up."""
    if settings.class_rows != "auto":
        return settings.class_rows == "keep"
    return row_bytes(shape, manifest) <= MAX_ROW_BYTES


def disk_bytes(settings: ScoreSettings, shape: Shape, manifests: Mapping[str, Manifest]) -> int:
    """Bytes on disk of the statistics of all sets, and of the training images matched to the held-out ones."""
    folds = int(np.prod(shape)) * FOLDS * FOLD_BYTES * (len(manifests) + 1)
    return folds + sum(row_bytes(shape, m) for m in manifests.values() if keeps_rows(settings, shape, m))


def plan_tokens(
    cache: TokenCache | None, recipe: Views, manifests: Mapping[str, Manifest], note: Callable[[str], None]
) -> tuple[TokenPlan, TokenCache | None]:
    """What the token cache will hold, and the cache itself; None where it would fill half of the disk's free room.

    Args:
        cache: the cache that was asked for; None without one.
        recipe: the views whose tokens are kept.
        manifests: the images, by set.
        note: gets a sentence where the cache is left out for want of room.
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
