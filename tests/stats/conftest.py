"""Responses of made-up images, their statistics, and the definition of the scores written out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from fastmem import UnitStats
from fastmem.stats import StatsBuilder

SHAPE = (2, 2, 3)
SEGMENTS = ("last", "class")


def make_data(images: int, classes: int, views: int = 3, kind: str = "random", seed: int = 0) -> dict[str, np.ndarray]:
    """Responses float32 [images,views,*SHAPE] with labels, ids and folds, ordered by class."""
    rng = np.random.default_rng(seed)
    values = {
        "random": lambda: rng.gamma(0.5, 1.0, (images, views, *SHAPE)),
        "ties": lambda: rng.integers(0, 3, (images, views, *SHAPE)),
        "equal": lambda: np.full((images, views, *SHAPE), 0.3),
        "zero": lambda: np.zeros((images, views, *SHAPE)),
    }[kind]()
    return {
        "responses": values.astype(np.float32),
        "labels": np.sort(rng.integers(0, classes, images)) * 3,
        "ids": rng.permutation(10 * images)[:images].astype(np.int64),
        "folds": rng.permutation(images) % 4,
    }


def build(
    data: dict[str, np.ndarray],
    batch: int = 5,
    rows_in: Path | None = None,
    keep_rows: bool = True,
    segments: tuple[str, ...] = SEGMENTS,
    class_only: tuple[str, ...] = ("class",),
) -> UnitStats:
    """Statistics of responses as a pass makes them, from work units of at most ``batch`` images of one class."""
    builder = StatsBuilder(data["responses"].shape[2:], segments, class_only, keep_rows, rows_in)
    for label in np.unique(data["labels"]):
        members = np.flatnonzero(data["labels"] == label)
        for start in range(0, len(members), batch):
            unit = builder.zero_unit()
            part = members[start : start + batch]
            for fold in range(4):
                rows = part[data["folds"][part] == fold]
                if len(rows):
                    found, ids = torch.from_numpy(data["responses"][rows]), torch.from_numpy(data["ids"][rows])
                    unit[fold] = unit[fold].update(found, ids)
            builder.update(int(label), unit)
    return builder.finish({"model": "test"})


def take(data: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    """Some of the images, by their positions or a mask."""
    return {key: values[rows] for key, values in data.items()}


def literal_contrast(values: np.ndarray) -> np.ndarray:
    """(max - mean of the others) / (max + mean of the others) over the first axis, written as in the definition."""
    if len(values) < 2:
        return np.zeros(values.shape[1:])
    out = np.zeros(values.shape[1:])
    for index in np.ndindex(*values.shape[1:]):
        column = values[(slice(None), *index)]
        largest = int(column.argmax())
        top, rest = column[largest], np.delete(column, largest).mean()
        out[index] = 0.0 if top + rest == 0 else (top - rest) / (top + rest)
    return out


CASES = {
    "random": make_data(37, 4),
    "ties": make_data(40, 3, kind="ties"),
    "equal responses": make_data(12, 3, kind="equal"),
    "zero responses": make_data(12, 3, kind="zero"),
    "one image": make_data(1, 1),
    "one class": make_data(23, 1),
    "one view": make_data(23, 5, views=1),
    "two images": make_data(2, 2, seed=4),
}
