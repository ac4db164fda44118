"""The map of units: every score as one byte, and what is known of the units that can be opened."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastmem.ranking.selection import highest, ranked_segments
from fastmem.report.page.album import Album, in_bytes, rounded
from fastmem.report.page.story import Story
from fastmem.stats import UnitStats

# units that can be opened: the highest by UnitMem, the highest by gap, and random ones to compare with
TOP, TOP_BY_GAP, RANDOM = 300, 100, 300
# images that are shown of a unit
IMAGES = 6
# units whose pictures come before those of extractions
FIRST = 60


def unit_map(story: Story, album: Album) -> dict[str, Any] | None:
    """The map and the units that can be opened; None where the images have no UnitMem or no segment is ranked."""
    stats = story.train
    segments = ranked_segments(stats)
    if not segments or "unitmem" in stats.undefined:
        return None
    unitmem = stats.unitmem().numpy()[:, segments]
    low, high = float(unitmem.min()), float(unitmem.max())
    colours = [{"name": "UnitMem", "low": low, "high": high, "cells": _cells(unitmem, low, high)}]
    gap = None if story.gap is None else story.gap.value.numpy()[:, segments]
    if gap is not None:
        bound = float(np.abs(gap).max()) or 1.0
        colours.append({"name": "gap", "low": -bound, "high": bound, "cells": _cells(gap, -bound, bound)})
    layers, _, units = stats.shape
    kinds = choose_opened(unitmem, gap)
    return {
        "layers": layers,
        "units": units,
        "segments": [stats.segments[i] for i in segments],
        "colours": colours,
        "opened": _opened(story, album, kinds, segments),
    }


def _cells(values: np.ndarray, low: float, high: float) -> list[str]:
    """The highest value over the segments, then those of every segment, [layers, units] each in bytes."""
    return [in_bytes(part, low, high) for part in (values.max(1), *values.transpose(1, 0, 2))]


def choose_opened(unitmem: np.ndarray, gap: np.ndarray | None) -> dict[tuple[int, int], str]:
    """Layer and position of the units that can be opened, with the reason: "top", "gap" or "random".

    ``unitmem`` and ``gap`` are scores, float [layers,segments,units]; without held-out images there is no gap.
    """
    best = torch.from_numpy(unitmem.max(1))
    layers, units = best.shape
    kinds = dict.fromkeys(_pairs(best, TOP), "top")
    if gap is not None:
        kinds |= dict.fromkeys((p for p in _pairs(torch.from_numpy(gap.max(1)), TOP_BY_GAP) if p not in kinds), "gap")
    drawn = np.random.default_rng(0).permutation(layers * units).tolist()
    others = (pair for pair in (divmod(place, units) for place in drawn) if pair not in kinds)
    return kinds | {pair: "random" for pair, _ in zip(others, range(RANDOM), strict=False)}


def _pairs(scores: torch.Tensor, count: int) -> list[tuple[int, int]]:
    layer, unit = highest(scores, min(1.0, count / scores.numel()), "global")
    return list(zip(layer.tolist(), unit.tolist(), strict=True))[:count]


def _opened(story: Story, album: Album, kinds: dict[tuple[int, int], str], segments: list[int]) -> dict[str, Any]:
    """What is known of the units that can be opened, one list for each thing."""
    stats, heldout = story.train, story.heldout
    layer, unit = (np.array(part) for part in zip(*kinds, strict=True))
    unitmem = stats.unitmem().numpy()
    segment = np.array(segments)[unitmem[:, segments][layer, :, unit].argmax(1)]
    at = layer, segment, unit
    tops = stats.top_image.numpy()[at][:, :IMAGES]
    values = stats.top_value.numpy()[at][:, :IMAGES]
    images = [[album.number(i) for i in row if i >= 0] for row in tops.tolist()]
    album.show(number for row in images[:FIRST] for number in row)
    scores: dict[str, np.ndarray] = {
        "UnitMem": unitmem[at],
        "mean response": stats.mean.numpy()[at],
        "standard deviation over images": np.sqrt(stats.var.numpy()[at]),
        "standard deviation over views": np.sqrt(stats.view_var.numpy()[at]),
    }
    if "class-selectivity" not in stats.undefined and _has_summary(stats):
        scores["class selectivity"] = stats.class_selectivity().numpy()[at]
    if "within-class" not in stats.undefined and _has_summary(stats):
        scores["UnitMem within its class"] = stats.within_class_unitmem().numpy()[at]
    if heldout is not None and "unitmem" not in heldout.undefined:
        scores["UnitMem on held-out images"] = heldout.unitmem().numpy()[at]
    if story.gap is not None:
        scores["gap, matched sets"] = story.gap.value.numpy()[at]
        scores["gap over folds, low end"] = story.gap.low.numpy()[at]
        scores["gap over folds, high end"] = story.gap.high.numpy()[at]
        scores["false-discovery rate of the gap"] = story.gap.q_value.numpy()[at]
    weakened = [[plan.name for plan in story.edits if plan.name in edited] for edited in _edits_of(story, list(kinds))]
    return {
        "layer": layer.tolist(),
        "unit": unit.tolist(),
        "segment": [segments.index(s) for s in segment.tolist()],
        "kind": list(kinds.values()),
        "scores": {name: rounded(column) for name, column in scores.items()},
        "images": images,
        "responses": [rounded(row[row > -np.inf], 5) for row in values],
        "weakened": weakened,
        "classes": {split: by for split, own in story.stats.items() if (by := _by_class(own, at)) is not None},
    }


def _has_summary(stats: UnitStats) -> bool:
    # a run merged from parts may lack it
    return stats.known_summary is not None or stats.rows is not None


def _edits_of(story: Story, units: list[tuple[int, int]]) -> list[set[str]]:
    """Names of the edits that scale each unit."""
    scaled = {plan.name: set(zip(plan.layer.tolist(), plan.unit.tolist(), strict=True)) for plan in story.edits}
    return [{name for name, pairs in scaled.items() if pair in pairs} for pair in units]


def _by_class(stats: UnitStats, at: tuple[np.ndarray, ...]) -> dict[str, Any] | None:
    """Mean response of some units by class, as bytes, with each unit's largest; None where it was not kept."""
    if stats.rows is None or not stats.class_counts:
        return None
    # a row at a time, because all rows of a large model would fill the memory
    means = np.stack([row.moments.mean.numpy()[at] for row in stats.rows], axis=1)
    largest = means.max(1)
    return {
        "labels": stats.class_ids.tolist(),
        "images": stats.class_count.tolist(),
        "largest": rounded(largest, 5),
        "means": in_bytes(means / np.where(largest > 0, largest, 1)[:, None], 0.0, 1.0),
    }
