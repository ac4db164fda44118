"""Report a scoring run: tables of units and images, pictures, and a JSON document with the controls."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastmem.data.sources import ImageSource
from fastmem.errors import UsageError
from fastmem.files import write_json
from fastmem.ranking.gap import Gap, gap
from fastmem.ranking.ownership import owned_units, owners
from fastmem.ranking.reliability import Reliability, reliability
from fastmem.ranking.selection import FRACTION, possible_rankings, select
from fastmem.report.environment import environment
from fastmem.report.image_table import write_image_table
from fastmem.report.unit_table import TopUnit, names_by_id, top_units, write_unit_table
from fastmem.runs.folder import RESULT_SCHEMA, RunFolder, run_id
from fastmem.scoring.membership import Membership, loss_scores, membership
from fastmem.scoring.score import ScoreResult
from fastmem.stats import UnitStats

# units on the sheet of images
SHEET_UNITS = 16
# fewer segments than this need no heat map, because the picture by block compares them well
HEATMAP_SEGMENTS = 3
# false-discovery rate at which units with a gap are counted
FALSE_DISCOVERIES = 0.05


@dataclass(frozen=True, eq=False)
class ScoreFindings:
    """The findings of a scoring run besides its statistics: the highest units, and the controls.

    Attributes:
        top: the units of highest UnitMem, highest first.
        names: ``class/name`` of the training images by id.
        reliability: agreement of each ranking between halves of the images, by ranking.
        gap: UnitMem on training images minus that on held-out images; None where there is no matching held-out set.
        membership: how well each score separates training images from held-out images, by score; empty without losses.
        owned: number of units of the top 5 % that each training image owns, int64 [N] in manifest order, by ranking.
    """

    top: tuple[TopUnit, ...]
    names: dict[int, str]
    reliability: dict[str, Reliability]
    gap: Gap | None
    membership: dict[str, Membership]
    owned: dict[str, np.ndarray]


def find(result: ScoreResult) -> ScoreFindings:
    """Return the findings of a scoring run: top units, reliability, gap, membership inference and owned units."""
    stats, heldout, manifest = result.train, result.heldout, result.manifests["train"]
    top = top_units(stats, SHEET_UNITS)
    found_gap: Gap | None = None
    # where damaged files were skipped, the held-out set may no longer match any part of the training images
    rankings = possible_rankings(stats, heldout) if top else []
    if heldout is not None and "gap" in rankings:
        # folds of fewer than two images have no UnitMem to compare
        with suppress(UsageError):
            found_gap = gap(stats, heldout)
    if found_gap is None:
        rankings = [by for by in rankings if by != "gap"]
    reliabilities = {by: reliability(stats, FRACTION, by, heldout=heldout) for by in rankings}
    owned = {
        by: owned_units(manifest.ids, owners(stats, select(stats, FRACTION, by, heldout=heldout), heldout))
        for by in rankings
    }
    kept = {by: found for by, found in reliabilities.items() if found is not None}
    return ScoreFindings(tuple(top), names_by_id(manifest), kept, found_gap, find_membership(result), owned)


def find_membership(result: ScoreResult) -> dict[str, Membership]:
    """Return how well each score of ``loss_scores`` separates training images from held-out images.

    The result is empty where losses were not saved.
    """
    train, heldout = result.train_losses, result.heldout_losses
    counts = (result.train.count, 0 if result.heldout is None else result.heldout.count)
    if train is None or heldout is None or not all(counts):
        return {}
    return {by: membership(*pair) for by, pair in loss_scores(train, heldout).items()}


def write_report(
    name: str,
    source: ImageSource | None,
    folder: RunFolder,
    result: ScoreResult,
    views: int | str,
    with_pictures: bool = True,
    place: Path | None = None,
) -> tuple[dict[str, Any], ScoreFindings]:
    """Write the tables, the pictures and result.json of a scoring run, and return its document and findings.

    Args:
        name: of the model that was scored.
        source: the training images; None where they are not at hand, which leaves out their pictures.
        folder: the folder that is written into.
        result: statistics and losses of the run.
        views: number of views of each image, or "center".
        with_pictures: whether pictures are drawn.
        place: where the run folder will be, if not there.

    Raises: UsageError where the folder cannot be written.
    """
    stats, heldout, path = result.train, result.heldout, folder.path
    found = find(result)
    tables = [path / "units.parquet", path / "images.parquet"]
    write_unit_table(tables[0], stats, heldout, found.names, found.gap)
    losses = {"train": result.train_losses, "heldout": result.heldout_losses}
    write_image_table(tables[1], result.manifests, losses, found.owned)
    pictures = _draw(path, name, source, result, found) if with_pictures else []
    place = path if place is None else place
    document = {
        "run": str(place),
        "run_id": run_id(folder.identity()),
        "model": name,
        "backend": result.backend,
        "device": result.device,
        "images": stats.count,
        "heldout_images": heldout.count if heldout else 0,
        "views": views,
        "layers": stats.shape[0],
        "segments": list(stats.segments),
        "units": stats.shape[2],
        "seconds": round(result.seconds, 3),
        "images_per_second": round(result.images_per_second, 3),
        "skipped": len(result.skipped),
        "skipped_images": [{"name": s.name, "reason": s.reason} for s in result.skipped],
        "undefined": stats.undefined,
        "reliability": {by: _numbers(asdict(r)) for by, r in found.reliability.items()},
        "gap": None if found.gap is None else gap_document(found.gap, stats),
        "membership": {by: m.document() for by, m in found.membership.items()},
        "environment": environment(result.device),
        "tables": [str(place / table.name) for table in tables],
        "pictures": [str(place / picture.name) for picture in pictures],
    }
    write_json(folder.result_file, {"schema": RESULT_SCHEMA} | document)
    return document, found


def _draw(path: Path, name: str, source: ImageSource | None, result: ScoreResult, found: ScoreFindings) -> list[Path]:
    """Draw the pictures for which the run has what they need, and return their paths."""
    # imported here, because these load matplotlib, which takes time and is not needed before
    from fastmem.report.heatmap import draw_unitmem_heatmap
    from fastmem.report.score_pictures import draw_contact_sheet, draw_train_against_heldout, draw_unitmem_by_block

    stats, heldout, pictures = result.train, result.heldout, []
    if found.top:
        pictures = [path / "unitmem-by-block.png"]
        draw_unitmem_by_block(pictures[0], stats, heldout, name)
    if found.top and source is not None:
        pictures.append(path / "top-images.png")
        title = f"{name}: the images behind the {len(found.top)} units of highest UnitMem"
        draw_contact_sheet(pictures[-1], found.top, source, found.names, title)
    if len(stats.segments) >= HEATMAP_SEGMENTS and found.top:
        pictures.append(path / "unitmem-by-segment.png")
        draw_unitmem_heatmap(pictures[-1], stats, heldout, name)
    if found.gap is not None and heldout is not None:
        pictures.append(path / "train-against-heldout.png")
        draw_train_against_heldout(pictures[-1], stats, heldout, found.gap, FALSE_DISCOVERIES, name)
    return pictures


def gap_document(found: Gap, stats: UnitStats) -> dict[str, Any]:
    """Return the gap for a JSON document: its mean over units by segment, and the number of significant units.

    ``stats`` are the statistics of the training images, which name the segments.
    """
    ranked = [name for name in stats.segments if name not in stats.class_only]
    return {
        "images": found.images,
        "mean": {
            name: {
                "mean": round(float(found.mean[i]), 6),
                "low": round(float(found.mean_low[i]), 6),
                "high": round(float(found.mean_high[i]), 6),
            }
            for i, name in enumerate(stats.segments)
            if name in ranked
        },
        "called": int((found.q_value <= FALSE_DISCOVERIES).sum()),
        "tested": len(ranked) * stats.shape[0] * stats.shape[2],
        "false_discovery_rate": FALSE_DISCOVERIES,
    }


def _numbers(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values with None in place of NaN, which JSON does not have."""
    return {key: None if isinstance(v, float) and math.isnan(v) else v for key, v in values.items()}
