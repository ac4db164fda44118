"""Draw the results of an extraction as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastmem.data.sources import ImageSource
from fastmem.extraction.extract import Extraction
from fastmem.extraction.verdicts import Count
from fastmem.models.model import Model
from fastmem.report.lettering import shorten, shorten_name
from fastmem.report.score_pictures import HELDOUT, INK, TRAIN, draw_image, save_picture

# candidates shown by default
SHOWN = 12


def draw_extractions(
    path: Path, model: Model, source: ImageSource, extraction: Extraction, title: str, most: int = SHOWN
) -> None:
    """Draw the training candidates whose completions from the longest prefix are most similar to them.

    Every candidate is shown with its reconstruction by the tokenizer, its completion, and the training image nearest to
    the completion, which is left out where no index was searched.

    Args:
        path: the PNG file to write.
        model: the model whose tokenizer decodes the completions.
        source: the training images.
        extraction: the verdicts on the candidates.
        title: first words of the title.
        most: greatest number of candidates to show.

    Raises: UsageError where the file cannot be written.
    """
    verdicts, longest = extraction.sets["train"], int(np.argmax(extraction.prefixes))
    at = np.flatnonzero(verdicts.candidate)
    at = at[np.argsort(-verdicts.similarity[longest, at], kind="stable")][:most]
    searched = extraction.index is not None
    columns = ["image", "reconstruction", f"from {extraction.prefixes[longest]} tokens"] + ["nearest image"] * searched
    half = -(-len(at) // 2)
    figure = Figure(figsize=(2 * 1.45 * len(columns) + 0.4, 0.8 + 1.6 * half), layout="constrained")
    grid = figure.subplots(half, 2 * len(columns), squeeze=False)
    for axis in grid.flat:
        axis.set_axis_off()
    shown = torch.from_numpy(at)
    true = model.decode(verdicts.targets.tokens[shown])
    made = model.decode(verdicts.tokens[longest, shown])
    for n, i in enumerate(at):
        row = grid[n % half, (n // half) * len(columns) :]
        draw_image(row[0], source, int(verdicts.targets.ids[i]), shorten_name(verdicts.targets.names[i]))
        _draw_tensor(row[1], true[n], _caption(verdicts.ceiling[i]))
        mark = "extracted" if verdicts.extracted[longest, i] else "not extracted"
        _draw_tensor(row[2], made[n], f"{verdicts.similarity[longest, i]:.2f}, {mark}")
        nearest = int(verdicts.nearest[longest, i])
        if searched and nearest >= 0:
            draw_image(row[3], source, nearest, f"nearest, {verdicts.nearest_similarity[longest, i]:.2f}")
    heads = ", ".join(columns)
    figure.suptitle(f"{title}: {heads}; similarity by {extraction.judge}", fontsize=10, color=INK)
    save_picture(figure, path)


def _caption(similarity: float) -> str:
    return "reconstruction" if np.isnan(similarity) else f"reconstruction, {similarity:.2f}"


def _draw_tensor(axis: Axes, image: torch.Tensor, caption: str) -> None:
    axis.imshow((image.permute(1, 2, 0) * 255).round().byte().cpu().numpy())
    axis.set_title(caption, fontsize=6, color=INK, pad=2)


def draw_similarities(path: Path, extraction: Extraction, title: str) -> None:
    """Draw histograms of the similarity of completions and targets, one panel for each prefix length, to a PNG file.

    Each panel shows training and held-out candidates. Raises: UsageError where the file cannot be written.
    """
    prefixes = extraction.prefixes
    low = min(float(v.similarity.min(initial=0)) for v in extraction.sets.values())
    bins = np.linspace(min(0.0, np.floor(low * 20) / 20), 1, 41)
    figure = Figure(figsize=(0.8 + 2.6 * len(prefixes), 3.0), layout="constrained")
    axes = figure.subplots(1, len(prefixes), sharey=True, squeeze=False)[0]
    thresholds = extraction.false_alarm_thresholds()
    for p, axis in enumerate(axes):
        for split, colour, name in (("train", TRAIN, "training"), ("heldout", HELDOUT, "held-out")):
            if split in extraction.sets:
                verdicts = extraction.sets[split]
                shares = verdicts.similarity[p, verdicts.candidate]
                weights = np.full(len(shares), 1 / max(1, len(shares)))
                axis.hist(shares, bins, weights=weights, histtype="stepfilled", alpha=0.45, color=colour, label=name)
        axis.axvline(extraction.threshold, color=INK, linewidth=1, linestyle="--", label="threshold")
        if thresholds[p] is not None:
            axis.axvline(thresholds[p], color=HELDOUT, linewidth=1, linestyle=":", label="1 % of held-out above")
        axis.set_title(f"prefix of {prefixes[p]} tokens", fontsize=8, color=INK)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("share of candidates", fontsize=8)
    axes[0].legend(fontsize=7, frameon=False)
    figure.suptitle(f"{title}: similarity of completions with their targets, by {extraction.judge}", fontsize=10)
    save_picture(figure, path)


def draw_dose_response(path: Path, groups: Mapping[str, Sequence[Count]], prefixes: Sequence[int], title: str) -> None:
    """Draw the share of extracted images in each group, with 95 % intervals, in one colour for each prefix length.

    Args:
        path: the PNG file to write.
        groups: extracted images of each group, one count for each prefix length, in the order to draw.
        prefixes: prefix lengths, in tokens.
        title: title of the picture.

    Raises: UsageError where the file cannot be written.
    """
    names = list(groups)
    figure = Figure(figsize=(1.6 + 0.95 * len(names), 3.6), layout="constrained")
    axis = figure.subplots()
    for p, prefix in enumerate(prefixes):
        rows = [groups[name][p] for name in names]
        shares = np.array([row.k / max(1, row.n) for row in rows])
        ends = np.array([row.interval for row in rows]).T
        place = np.arange(len(names)) + 0.1 * (p - (len(prefixes) - 1) / 2)
        colour = (0.16, 0.44, 0.59, 0.3 + 0.7 * p / max(1, len(prefixes) - 1))
        errors = np.abs(ends - shares)
        axis.errorbar(place, shares, errors, fmt="o", color=colour, markersize=4, capsize=2, label=f"{prefix} tokens")
    axis.set_xticks(range(len(names)), [_label(name, groups[name][0].n) for name in names], fontsize=8)
    axis.set_xlabel("shown per epoch (images)", fontsize=9)
    axis.set_ylabel("share extracted", fontsize=9)
    axis.set_ylim(-0.02, 1.02)
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(title="prefix", fontsize=7, title_fontsize=7, frameon=False)
    axis.set_title(title, fontsize=10, color=INK)
    save_picture(figure, path)


def _label(name: str, images: int) -> str:
    """Return a group's name and size, with line breaks, so that it does not overlap its neighbours."""
    broken = [shorten(part) for part in name.replace(", ", ",\n").split("\n")]
    return "\n".join([*broken, f"({images})"])
