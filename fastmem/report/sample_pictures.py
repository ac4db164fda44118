"""Draw a sheet of samples as a PNG file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from fastmem.models.model import Model
from fastmem.quality.features import to_bytes
from fastmem.quality.samples import SampleFolder
from fastmem.report.lettering import shorten_name
from fastmem.report.score_pictures import INK, save_picture

# greatest numbers of classes, and of samples of each class, on a sheet
CLASSES, COLUMNS = 8, 8


def draw_samples(path: Path, model: Model, samples: SampleFolder, classes: Sequence[str], title: str) -> None:
    """Draw the first samples of some classes, one row for each class.

    The classes are evenly spread over those that have enough samples to fill a row, or else the most samples.

    Args:
        path: the PNG file to write.
        model: the model whose tokenizer decodes the samples.
        samples: folder of the samples.
        classes: class names in label order; a label without a name is shown as a number.
        title: title of the picture.

    Raises: UsageError where the file cannot be written; InputFileError where a file of samples is missing or damaged.
    """
    labels, counts = np.unique(samples.labels, return_counts=True)
    full = labels[counts >= min(COLUMNS, counts.max())]
    rows = full[np.unique(np.linspace(0, len(full) - 1, min(CLASSES, len(full))).round().astype(int))]
    figure = Figure(figsize=(1.5 + 1.1 * COLUMNS, 0.6 + 1.1 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), COLUMNS + 1, squeeze=False, width_ratios=[1.3, *[1] * COLUMNS])
    for axis in grid.flat:
        axis.set_axis_off()
    for row, label in zip(grid, rows.tolist(), strict=True):
        name = classes[label] if label < len(classes) else f"class {label}"
        row[0].text(1, 0.5, shorten_name(name), ha="right", va="center", fontsize=7, color=INK)
        members = np.flatnonzero(samples.labels == label)[:COLUMNS]
        for axis, picture in zip(row[1:], _pictures(model, samples, members), strict=False):
            axis.imshow(picture)
    figure.suptitle(title, fontsize=10, color=INK)
    save_picture(figure, path)


def _pictures(model: Model, samples: SampleFolder, members: np.ndarray) -> np.ndarray:
    """Return the pictures of samples, uint8 [n,S,S,3], at the positions ``members`` among all samples."""
    tokens = [samples.tokens(sample // samples.batch)[sample % samples.batch] for sample in members.tolist()]
    return to_bytes(model.decode(torch.stack(tokens)))
