"""The pictures of a scoring run, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastmem.data.decoding import DamagedImage
from fastmem.data.sources import ImageSource
from fastmem.files import write_atomically
from fastmem.ranking.gap import Gap
from fastmem.ranking.selection import find_matched, matched_to, ranked_segments
from fastmem.report.unit_table import TopUnit
from fastmem.stats import UnitStats

TRAIN, FOLD, HELDOUT, INK = "#2a6f97", "#edae49", "#d1495b", "#333333"
DPI = 130


def save_picture(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    # no date and no version in the file: equal results are equal bytes
    write_atomically(path, lambda partial: figure.savefig(partial, format="png", dpi=DPI, metadata={"Software": None}))


def draw_unitmem_by_block(path: Path, stats: UnitStats, heldout: UnitStats | None, title: str) -> None:
    """UnitMem by block: for every ranked segment a box per block (quartiles, 5-95 % whiskers) and its top 1 % as dots.

    Where there is a held-out set its medians and 95th percentiles are drawn over it. The largest response, and with it
    UnitMem, grows with the number of images, so the training images that match that set are drawn likewise.
    """
    segments = ranked_segments(stats)
    layers = stats.shape[0]
    figure = Figure(figsize=(max(6.0, 1.6 + 0.42 * layers), 0.8 + 2.9 * len(segments)), layout="constrained")
    axes = figure.subplots(len(segments), 1, sharex=True, squeeze=False)[:, 0]
    scores = stats.unitmem().numpy()
    matched = heldout and find_matched(stats, heldout)
    controls = [] if matched is None else [(matched, FOLD, "training, matched"), (heldout, HELDOUT, "held-out")]
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
    """UnitMem on training against UnitMem on held-out images of a matched set: one panel per ranked segment.

    The shade counts units; those that stand out at the false-discovery rate ``rate`` are circled.
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
    called = int((gap.q_value <= rate).sum())
    figure.suptitle(
        f"{title}: {gap.images:,} matched images each; {called:,} units stand out\nat a false-discovery rate of "
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
    """The images behind the highest units: a row per unit, best image first, with its name and response.

    units: at least one, all with as many images or fewer; names: CLASS/NAME by image id.
    """
    columns = max(len(unit.image_ids) for unit in units)
    half = -(-len(units) // 2)
    figure = Figure(figsize=(2 * (1.5 + 1.15 * columns), 0.7 + 1.35 * half), layout="constrained")
    # two blocks of rows side by side, each with a column for the unit's name
    grid = figure.subplots(half, 2 * (columns + 1), squeeze=False)
    for axis in grid.flat:
        axis.set_axis_off()
    for i, unit in enumerate(units):
        row, left = i % half, (i // half) * (columns + 1)
        grid[row, left].text(
            1.0,
            0.5,
            f"block {unit.layer}\nunit {unit.unit}\n{unit.segment}\nUnitMem {unit.unitmem:.3f}",
            ha="right",
            va="center",
            fontsize=8,
            color=INK,
        )
        for axis, image_id, response in zip(grid[row, left + 1 :], unit.image_ids, unit.responses, strict=False):
            draw_image(axis, source, image_id, f"{shorten(names[image_id])}\n{response:.3g}")
    figure.suptitle(title, fontsize=11, color=INK)
    save_picture(figure, path)


def draw_image(axis: Axes, source: ImageSource, image_id: int, caption: str) -> None:
    """One image of a source by its id, small, with a caption above it."""
    try:
        picture = source.read(int(source.index_of(np.array([image_id]))[0]))
        picture.thumbnail((160, 160))
        axis.imshow(np.asarray(picture))
    except DamagedImage as error:
        # it could be read when it was scored
        axis.text(0.5, 0.5, error.reason, ha="center", va="center", fontsize=6, wrap=True)
    axis.set_title(caption, fontsize=6, color=INK, pad=2)


def shorten(name: str) -> str:
    """The file's name of CLASS/NAME, short enough for a caption."""
    stem = name.rsplit("/", 1)[-1].rsplit(".", 1)[0].replace("$", r"\$")
    return stem if len(stem) <= 18 else stem[:17] + "…"
