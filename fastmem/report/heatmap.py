"""Draw UnitMem by segment and block as a heat map, for models with more than a few segments."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from fastmem.ranking.selection import find_matched, ranked_segments
from fastmem.report.lettering import shorten
from fastmem.report.score_pictures import INK, save_picture
from fastmem.stats import UnitStats

# with more columns than this, cells are too small for readable numbers
NUMBERED_COLUMNS = 16
# the highest units are one in this many
TOP_SHARE = 100


def unitmem_cells(stats: UnitStats) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean UnitMem of all units and that of the top 1 % of units, float64 [ranked segments, layers] each."""
    scores = stats.unitmem()[:, ranked_segments(stats)].numpy().transpose(1, 0, 2)
    count = max(1, scores.shape[2] // TOP_SHARE)
    return scores.mean(2), np.sort(scores, 2)[..., -count:].mean(2)


def draw_unitmem_heatmap(path: Path, stats: UnitStats, heldout: UnitStats | None, title: str) -> None:
    """Draw the mean UnitMem of every segment (rows) and block (columns), over all units and over the top 1 %.

    UnitMem grows with the number of images. Held-out images are therefore drawn together with the part of the training
    images that has the same size and classes, on the same colour scale.

    Args:
        path: the PNG file to write.
        stats: statistics of the training images.
        heldout: statistics of the held-out images; None where there are none.
        title: first words of the title.

    Raises: UsageError where the file cannot be written.
    """
    sets = [("training", stats)]
    matched = None if heldout is None else find_matched(stats, heldout)
    if heldout is not None and matched is not None:
        sets += [("training, matched", matched), ("held-out", heldout)]
    names = [shorten(stats.segments[i]) for i in ranked_segments(stats)]
    cells = [unitmem_cells(own) for _, own in sets]
    layers = stats.shape[0]
    size = (2 * max(4.0, 1.5 + 0.5 * layers), 0.6 + len(sets) * (1.1 + 0.3 * len(names)))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(sets), 2, squeeze=False, sharex=True, sharey=True)
    for column, what in enumerate(("mean of all units", "mean of the top 1 %")):
        highest = max(float(own[column].max()) for own in cells) or 1.0
        for row, (name, own) in enumerate(sets):
            axis = grid[row, column]
            image = axis.imshow(cells[row][column], vmin=0, vmax=highest, cmap="viridis", aspect="auto")
            axis.set_title(f"{name}, {own.count:,} images: {what}", fontsize=9, color=INK)
            _write_numbers(image, cells[row][column], highest)
        figure.colorbar(image, ax=grid[:, column], shrink=0.8, label="UnitMem")
        grid[-1, column].set_xlabel("block")
    grid[0, 0].set_yticks(range(len(names)), names)
    grid[0, 0].set_xticks(range(0, layers, 1 if layers <= 24 else 2))
    figure.suptitle(f"{title}: UnitMem by segment and block", fontsize=11, color=INK)
    save_picture(figure, path)


def _write_numbers(image: AxesImage, values: np.ndarray, highest: float) -> None:
    if values.shape[1] > NUMBERED_COLUMNS:
        return
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if value < 0.6 * highest else "black"
        image.axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=6, color=colour)
