"""Draw the results of a scoring run as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastmem.data.decoding import DamagedImage
from fastmem.data.sources import ImageSource
from fastmem.data.token_source import NoPixels
from fastmem.files import write_atomically
from fastmem.ranking.gap import Gap
from fastmem.ranking.selection import find_matched, matched_to, ranked_segments
from fastmem.report.lettering import letter, shorten, shorten_name
from fastmem.report.unit_table import TopUnit
from fastmem.stats import UnitStats

# colours of training images, of the part of them that matches the held-out images, of held-out images, and of text
TRAIN, FOLD, HELDOUT, INK = "#2a6f97", "#edae49", "#d1495b", "#333333"
DPI = 130


def save_picture(figure: Figure, path: Path) -> None:
    """Write a figure to a PNG file, completely or not at all. Raises: UsageError where it cannot be written."""
    letter(figure)
    # without the library's version in the file, equal results give equal files
    write_atomically(path, lambda partial: figure.savefig(partial, format="png", dpi=DPI, metadata={"Software": None}))


def draw_unitmem_by_block(path: Path, stats: UnitStats, heldout: UnitStats | None, title: str) -> None:
    """Draw the distribution of UnitMem in every block as a box plot, with one panel for each ranked segment.

    Boxes show quartiles, whiskers show 5 % to 95 %, and dots show the top 1 % of units. For held-out images the median
    and the 95th percentile are drawn as lines. UnitMem grows with the number of images, so the same lines are drawn for
    the part of the training images that has the size and classes of the held-out set.

    Args:
        path: the PNG file to write.
        stats: statistics of the training images.
        heldout: statistics of the held-out images; None where there are none.
        title: first words of the title.

    Raises: UsageError where the file cannot be written.
    """
    segments = ranked_segments(stats)
    layers = stats.shape[0]
    figure = Figure(figsize=(max(6.0, 1.6 + 0.42 * layers), 0.8 + 2.9 * len(segments)), layout="constrained")
    axes = figure.subplots(len(segments), 1, sharex=True, squeeze=False)[:, 0]
    scores = stats.unitmem().numpy()
    controls = []
    matched = None if heldout is None else find_matched(stats, heldout)
    if heldout is not None and matched is not None:
        controls = [(matched, FOLD, "training, matched"), (heldout, HELDOUT, "held-out")]
    for axis, segment in zip(axes, segments, strict=True):
        _draw_boxes(axis, scores[:, segment])
        for control, colour, _ in controls:
            _draw_lines(axis, control.unitmem()[:, segment].numpy(), colour)
        axis.set_ylabel(f"UnitMem ({stats.segments[segment]})")
    axes[-1].set_xlabel("block")
    figure.suptitle(f"{title}: UnitMem by block, {stats.count:,} training images", fontsize=11, color=INK)
    handles = [
        matplotlib.patches.Patch(facecolor="#a9cfe3", edgecolor=TRAIN, label="training: quartiles, 5-95 %"),
        matplotlib.lines.Line2D([], [], marker=".", linestyle="", color=TRAIN, label="training: top 1 % of units"),
    ]
    handles += [
        matplotlib.lines.Line2D([], [], color=colour, label=f"{name}, {control.count:,} images: median, 95 %")
        for control, colour, name in controls
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    save_picture(figure, path)


def draw_train_against_heldout(
    path: Path, stats: UnitStats, heldout: UnitStats, gap: Gap, rate: float, title: str
) -> None:
    """Draw the UnitMem of every unit on training images against that on held-out images, for sets of equal size.

    There is one panel for each ranked segment. The shade shows the number of units. Units whose gap is significant at
    a false-discovery rate are circled.

    Args:
        path: the PNG file to write.
        stats: statistics of the training images.
        heldout: statistics of the held-out images.
        gap: difference in UnitMem of every unit, with its significance.
        rate: the false-discovery rate, in (0,1).
        title: first words of the title.

    Raises: UsageError where no part of the training images matches the held-out images, or the file cannot be written.
    """
    segments = ranked_segments(stats)
    columns = min(4, len(segments))
    rows = -(-len(segments) // columns)
    figure = Figure(figsize=(0.6 + 3.4 * columns, 1.1 + 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    train = matched_to(stats, heldout).unitmem().numpy()
    other = heldout.unitmem().numpy()
    for axis, segment in zip(axes.flat, segments, strict=False):
        x, y = other[:, segment].ravel(), train[:, segment].ravel()
        axis.hexbin(x, y, gridsize=50, extent=(0, 1, 0, 1), bins="log", cmap="Blues", mincnt=1, linewidths=0)
        called = (gap.q_value[:, segment] <= rate).numpy().ravel()
        axis.plot(x[called], y[called], "o", markerfacecolor="none", color=HELDOUT, markersize=4, markeredgewidth=0.8)
        axis.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle="--")
        mean, low, high = (float(v[segment]) for v in (gap.mean, gap.mean_low, gap.mean_high))
        axis.set_title(
            f"{stats.segments[segment]}: {np.mean(y > x):.0%} of units above the line\nmean gap over folds {mean:+.3f} "
            f"({low:+.3f} to {high:+.3f})",
            fontsize=8,
            color=INK,
        )
        axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(segments) :]:
        axis.set_axis_off()
    figure.supxlabel("UnitMem on held-out images", fontsize=9)
    figure.supylabel("UnitMem on training images", fontsize=9)
    standing_out = int((gap.q_value <= rate).sum())
    figure.suptitle(
        f"{title}: {gap.images:,} matched images each; {standing_out:,} units stand out\nat a false-discovery rate of "
        f"{rate:.0%}",
        fontsize=10,
        color=INK,
    )
    save_picture(figure, path)


def _draw_boxes(axis: Axes, scores: np.ndarray) -> None:
    layers, units = scores.shape
    axis.boxplot(
        list(scores),
        positions=range(layers),
        whis=(5, 95),
        widths=0.6,
        showfliers=False,
        patch_artist=True,
        boxprops={"facecolor": "#a9cfe3", "edgecolor": TRAIN},
        whiskerprops={"color": TRAIN},
        capprops={"color": TRAIN},
        medianprops={"color": INK, "linewidth": 1.5},
        manage_ticks=False,
    )
    top = np.sort(scores, 1)[:, -max(1, units // 100) :]
    axis.plot(np.repeat(np.arange(layers), top.shape[1]), top.ravel(), ".", color=TRAIN, markersize=3, alpha=0.5)
    axis.set_xticks(range(layers) if layers <= 24 else range(0, layers, 2))
    axis.set_xlim(-0.7, layers - 0.3)
    axis.set_ylim(0, 1)
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_lines(axis: Axes, scores: np.ndarray, colour: str) -> None:
    for share, style in ((50, "-"), (95, "--")):
        axis.plot(np.percentile(scores, share, axis=1), style, color=colour, linewidth=1.3, marker=".", markersize=4)


def draw_contact_sheet(
    path: Path, units: Sequence[TopUnit], source: ImageSource, names: Mapping[int, str], title: str
) -> None:
    """Draw the images with the largest responses of some units: a row for each unit, the largest response first.

    Args:
        path: the PNG file to write.
        units: the units, at least one.
        source: the training images.
        names: ``class/name`` of the images by id.
        title: title of the picture.

    Raises: UsageError where the file cannot be written.
    """
    columns = max(len(unit.image_ids) for unit in units)
    half = -(-len(units) // 2)
    figure = Figure(figsize=(2 * (1.5 + 1.15 * columns), 0.7 + 1.35 * half), layout="constrained")
    # the rows are in two halves side by side, and each half has one more column for the unit's name
    grid = figure.subplots(half, 2 * (columns + 1), squeeze=False)
    for axis in grid.flat:
        axis.set_axis_off()
    for i, unit in enumerate(units):
        row, left = i % half, (i // half) * (columns + 1)
        grid[row, left].text(
            1.0,
            0.5,
            f"block {unit.layer}\nunit {unit.unit}\n{shorten(unit.segment)}\nUnitMem {unit.unitmem:.3f}",
            ha="right",
            va="center",
            fontsize=8,
            color=INK,
        )
        for axis, image_id, response in zip(grid[row, left + 1 :], unit.image_ids, unit.responses, strict=False):
            draw_image(axis, source, image_id, f"{shorten_name(names[image_id])}\n{response:.3g}")
    figure.suptitle(title, fontsize=11, color=INK)
    save_picture(figure, path)


def draw_image(axis: Axes, source: ImageSource, image_id: int, caption: str) -> None:
    """Draw one image at a small size, with a caption above it; the reason is shown where the image cannot be read.

    Args:
        axis: where to draw.
        source: the images.
        image_id: id of the image.
        caption: the text above it.

    Raises: UsageError where the source has no image with that id.
    """
    try:
        picture = source.read(int(source.index_of(np.array([image_id]))[0]))
        picture.thumbnail((160, 160))
        axis.imshow(np.asarray(picture))
    except NoPixels:
        axis.text(0.5, 0.5, "tokens alone", ha="center", va="center", fontsize=6)
    except DamagedImage as error:
        # the image was readable when it was scored, so its file has changed since
        axis.text(0.5, 0.5, error.reason, ha="center", va="center", fontsize=6, wrap=True)
    axis.set_title(caption, fontsize=6, color=INK, pad=2)
