"""UnitMem by segment and block as a heat map, for models that are scored at more than a few places."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from fastmem.ranking.selection import find_matched, ranked_segments
from fastmem.report.score_pictures import INK, save_picture
from fastmem.stats import UnitStats

# cells with numbers in them get too small to read above this many columns
NUMBERED_COLUMNS = 16
TOP_SHARE = 100


def unitmem_cells(stats: UnitStats) -> tuple[np.ndarray, np.ndarray]:
    """Mean UnitMem of all units, and of the top 1 % (at least one): float64 [ranked segments, layers] each."""
    scores = stats.unitmem()[:, ranked_segments(stats)].numpy().transpose(1, 0, 2)
    count = max(1, scores.shape[2] // TOP_SHARE)
    return scores.mean(2), np.sort(scores, 2)[..., -count:].mean(2)


def draw_unitmem_heatmap(path: Path, stats: UnitStats, heldout: UnitStats | None, title: str) -> None:
    """UnitMem by segment (rows) and block (columns): of all units, and of each cell's top 1 %.

    Where there is a held-out set it is drawn below on the same colours, and above it the training images that match it,
    because UnitMem grows with the number of images.
    """
    sets = [("training", stats)]
    matched = heldout and find_matched(stats, heldout)
    if matched is not None:
        sets += [("training, matched", matched), ("held-out", heldout)]
    names = [stats.segments[i] for i in ranked_segments(stats)]
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
