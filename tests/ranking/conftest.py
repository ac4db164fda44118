"""Responses of many units, their statistics, and every score of a unit written out."""

from __future__ import annotations

import numpy as np

from fastmem import UnitStats
from tests.stats.conftest import build, literal_contrast, make_data


def literal_scores(data: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every score [layers,segments,units] from responses that are kept whole."""
    image = data["responses"].astype(np.float64).mean(1).astype(np.float32).astype(np.float64)
    classes = [image[data["labels"] == label] for label in np.unique(data["labels"])]
    return {
        "unitmem": literal_contrast(image),
        "within-class": np.max([literal_contrast(values) for values in classes], axis=0),
        "class-selectivity": literal_contrast(np.stack([values.mean(0) for values in classes])),
        "mean": image.mean(0),
        "variance": image.var(0),
    }


def wide(images: int = 40, seed: int = 0, segments: int = 2) -> dict[str, np.ndarray]:
    """Responses of 3 layers with 40 units each, whose scale differs between units."""
    data = make_data(images, 3, seed=seed)
    rng = np.random.default_rng(seed)
    values = rng.gamma(0.7, 1.0, (images, 2, 3, segments, 40)) * rng.gamma(2.0, 1.0, (1, 1, 3, segments, 40))
    return data | {"responses": values.astype(np.float32)}


def build_wide(
    data: dict[str, np.ndarray], segments: tuple[str, ...] = ("last", "image"), class_only: tuple[str, ...] = ()
) -> UnitStats:
    """Statistics of such responses."""
    return build(data, len(data["ids"]), segments=segments, class_only=class_only)
