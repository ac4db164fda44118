"""Draw a sweep as a PNG file: extracted targets against loss of quality, for selections and their controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastmem.report.score_pictures import INK, save_picture
from fastmem.sweep.comparisons import EQUAL_QUALITY
from fastmem.sweep.findings import COSTS, Findings
from fastmem.sweep.plan import DRAWN, NO_EDIT, percent
from fastmem.sweep.table import unedited_cost

# greatest number of metrics that are drawn, one panel each
PANELS = 2
# colour and marker of each selection, so that they also differ for people who cannot tell the colours apart
STYLES = {
    "unitmem": ("#2a6f97", "o"),
    "attribution": ("#d1495b", "D"),
    "gap": ("#edae49", "s"),
    "within-class": ("#3d8b5f", "^"),
    "class-selectivity": ("#8e6bb0", "v"),
    "mean": ("#7a5c3e", "P"),
    "variance": ("#c977a8", "X"),
    "lowest": ("#9aa3ab", "p"),
    "random": ("#777777", ""),
    "matched": ("#5aa9c7", ""),
}


def draw_sweep(path: Path, findings: Findings, title: str) -> None:
    """Draw the number of extracted targets against the loss of quality, with one panel for each of up to two metrics.

    The first metric is the one of the comparisons. Each selection is a line with a marker for every fraction. Random
    and matched units are bands from the lowest to the highest seed. Random units at equal quality are crosses, each
    with a dotted line to the edit that it is compared with.

    Raises: UsageError where the file cannot be written.
    """
    measured = [m for m in COSTS if m in findings.measured[0].values and m != findings.cost]
    metrics = [findings.cost, *measured][:PANELS]
    figure = Figure(figsize=(2.2 + 5.2 * len(metrics), 4.8), layout="constrained")
    axes = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    factor = next((m.row.factor for m in findings.measured if m.row.by != NO_EDIT.by), None)
    for axis, metric in zip(axes, metrics, strict=True):
        _draw_panel(axis, _points(findings, factor, metric))
        axis.set_xlabel(f"loss of quality (rise of {metric})")
    _draw_equal_quality(axes[0], findings, factor)
    axes[0].set_ylabel(f"extracted, of {int(findings.targets.reported.sum()):,} targets")
    axes[0].set_ylim(bottom=0)
    figure.suptitle(title, fontsize=10, color=INK)
    # the first panel has all markers, so one legend is enough
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    save_picture(figure, path)


# cost and number of extracted targets for each seed, by selection and fraction
Points = dict[str, dict[float, list[tuple[float, float]]]]


def _points(findings: Findings, factor: float | None, metric: str) -> Points:
    before = unedited_cost(findings.measured, metric)
    found: Points = {}
    for m in findings.measured:
        if not m.missing and m.row.factor in (NO_EDIT.factor, factor):
            count = float(findings.targets.extracted(m)[-1, findings.targets.reported].sum())
            found.setdefault(m.row.by, {}).setdefault(m.row.fraction, []).append((m.values[metric] - before, count))
    return found


def _draw_panel(axis: Axes, points: Points) -> None:
    for by in (by for by in DRAWN if by in points):
        _draw_band(axis, by, points[by])
    for by in (by for by in points if by not in (*DRAWN, NO_EDIT.by)):
        _draw_selection(axis, by, points[by])
    axis.plot(
        *np.mean(points[NO_EDIT.by][NO_EDIT.fraction], axis=0), "*", color=INK, markersize=13, label="no edit", zorder=5
    )
    axis.grid(color="#e6e6e6", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.locator_params(axis="x", nbins=6)


def _draw_band(axis: Axes, by: str, rows: Mapping[float, Sequence[tuple[float, float]]]) -> None:
    """Draw the mean at every fraction, a band from the lowest to the highest count, and bars over the seeds' costs."""
    colour, _ = STYLES[by]
    fractions = sorted(rows)
    seeds = [np.array(rows[f]) for f in fractions]
    costs, counts = (np.array([s[:, i].mean() for s in seeds]) for i in (0, 1))
    order = np.argsort(costs)
    low, high = (np.array([pick(s[:, 1]) for s in seeds]) for pick in (np.min, np.max))
    axis.fill_between(
        costs[order],
        low[order],
        high[order],
        color=colour,
        alpha=0.25,
        linewidth=0,
        label=f"{by}: lowest to highest seed",
    )
    axis.plot(costs, counts, "-", color=colour, linewidth=1, marker=".", markersize=4)
    left, right = ([pick(s[:, 0]) for s in seeds] for pick in (np.min, np.max))
    axis.hlines(counts, left, right, color=colour, alpha=0.6, linewidth=1)


def _draw_selection(axis: Axes, by: str, rows: Mapping[float, Sequence[tuple[float, float]]]) -> None:
    colour, marker = STYLES[by]
    fractions = sorted(rows)
    costs, counts = np.array([np.mean(rows[f], axis=0) for f in fractions]).T
    axis.plot(costs, counts, "-", color=colour, marker=marker, markersize=5.5, linewidth=1.2, label=by)
    if by in ("unitmem", "attribution"):
        for fraction, cost, count in zip(fractions, costs, counts, strict=True):
            axis.annotate(
                percent(fraction), (cost, count), (4, 4), textcoords="offset points", fontsize=7, color=colour
            )


def _draw_equal_quality(axis: Axes, findings: Findings, factor: float | None) -> None:
    named = False
    for c in findings.comparisons:
        if c.rival == EQUAL_QUALITY and c.factor == factor:
            colour, _ = STYLES[c.by]
            axis.plot([c.cost, c.rival_cost], [c.extracted, c.rival_extracted], ":", color=colour, linewidth=1)
            label = None if named else EQUAL_QUALITY
            axis.plot(c.rival_cost, c.rival_extracted, "x", color=INK, markersize=6, label=label, zorder=4)
            named = True
