"""Statistics as files: one safetensors file, and one small file for every class beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastmem.errors import InputFileError
from fastmem.files import read_tensors, write_tensors
from fastmem.stats.accumulators import ClassRow, ClassSummary, Fold, Largest, Moments

if TYPE_CHECKING:
    from fastmem.stats.statistics import UnitStats

SCHEMA = "fastmem.unit-stats/2"
ROW_SCHEMA = "fastmem.class-row/2"
SUMMARY_TENSORS = ("total", "largest", "within", "within_image")
MATCHED = "matched."


def write(stats: UnitStats, path: Path) -> None:
    """Write statistics to ``path`` and their class rows beside it. Raises: UsageError where that cannot be done."""
    folder = row_folder(path)
    if stats.rows is not None and stats.rows.folder != folder:
        for label in sorted(stats.class_counts):
            write_rows(folder, label, [_row_or_zero(fold, label) for fold in stats.folds])
    tensors, header = _pack(stats, "")
    if stats.matched is not None:
        more, header["matched"] = _pack(stats.matched, MATCHED)
        tensors |= more
    header |= {
        "segments": stats.segments,
        "class_only": stats.class_only,
        "class_rows": stats.rows is not None,
        "origin": dict(stats.origin or {}),
    }
    write_tensors(path, tensors, SCHEMA, header)


def read(path: Path) -> UnitStats:
    """The statistics that ``write`` wrote. Raises: InputFileError for a missing, damaged or foreign file."""
    tensors, header = read_tensors(path, SCHEMA)
    stats = _unpack(tensors, header, header, "", row_folder(path) if header["class_rows"] else None)
    if "matched" not in header:
        return stats
    return replace(stats, matched=_unpack(tensors, header, header["matched"], MATCHED, None))


def _pack(stats: UnitStats, prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, summaries = {}, []
    for name, part in (("whole", stats), *((f"fold{i}", fold) for i, fold in enumerate(stats.folds))):
        summary = part.known_summary
        summaries.append(summary and summary.count)
        if summary is not None:
            tensors |= {f"{prefix}{name}.classes.{key}": getattr(summary, key) for key in SUMMARY_TENSORS}
    for i, fold in enumerate(stats.folds):
        tensors |= fold_tensors(fold.fold, f"{prefix}fold{i}")
    header = {
        "counts": [fold.count for fold in stats.folds],
        "class_counts": [{str(k): v for k, v in fold.class_counts.items()} for fold in stats.folds],
        "summaries": summaries,
    }
    # a single fold is its own whole, and a file may hold no tensor twice
    return {name: tensor.clone() for name, tensor in tensors.items()}, header


def _unpack(
    tensors: Mapping[str, Tensor], common: Mapping[str, Any], header: Mapping[str, Any], prefix: str, rows: Path | None
) -> UnitStats:
    # that module reads and writes through this one
    from fastmem.stats.statistics import ClassRows, UnitStats, merge_folds

    def summary(name: str, count: int | None) -> ClassSummary | None:
        if count is None:
            return None
        return ClassSummary(count, *(tensors[f"{prefix}{name}.classes.{key}"] for key in SUMMARY_TENSORS))

    folds = []
    for i, count in enumerate(header["counts"]):
        class_counts = {int(k): v for k, v in header["class_counts"][i].items()}
        folds.append(
            UnitStats(
                fold_from_tensors(tensors, f"{prefix}fold{i}", count),
                tuple(common["segments"]),
                tuple(common["class_only"]),
                class_counts,
                rows and ClassRows(class_counts, partial(read_row, rows, i), rows),
                summary(f"fold{i}", header["summaries"][i + 1]),
                origin=common["origin"],
            )
        )
    if len(folds) == 1:
        return folds[0]
    whole = merge_folds(folds)
    return replace(
        whole,
        known_summary=summary("whole", header["summaries"][0]),
        rows=whole.rows and replace(whole.rows, folder=rows),
    )


def fold_tensors(fold: Fold, name: str) -> dict[str, Tensor]:
    """A fold's tensors under ``name.``, for a file."""
    m, top = fold.moments, fold.largest
    parts = {"mean": m.mean, "m2": m.m2, "view": fold.view_total, "top_value": top.value, "top_image": top.image}
    return {f"{name}.{key}": value for key, value in parts.items()}


def fold_from_tensors(tensors: Mapping[str, Tensor], name: str, count: int, device: torch.device | str = "cpu") -> Fold:
    """The fold that ``fold_tensors`` wrote."""
    mean, m2, view, value, image = (
        tensors[f"{name}.{key}"].to(device) for key in ("mean", "m2", "view", "top_value", "top_image")
    )
    return Fold(Moments(count, mean, m2), view, Largest(value, image))


def row_folder(path: Path) -> Path:
    """Folder of the class rows of the statistics file ``path``."""
    return path.with_name(path.stem + ".classes").absolute()


def write_rows(folder: Path, label: int, rows: Sequence[ClassRow]) -> None:
    """Write one class's rows, one of each fold, as ``class-LABEL.safetensors``."""
    tensors = {
        "mean": torch.stack([row.moments.mean for row in rows]),
        "m2": torch.stack([row.moments.m2 for row in rows]),
        "largest": torch.stack([row.largest for row in rows]),
        "image": torch.stack([row.image for row in rows]),
    }
    header = {"label": label, "counts": [row.moments.count for row in rows]}
    write_tensors(_row_file(folder, label), tensors, ROW_SCHEMA, header)


def read_row(folder: Path, fold: int, label: int) -> ClassRow:
    """One class's row of one fold. Raises: InputFileError for a missing, damaged or foreign file."""
    path = _row_file(folder, label)
    tensors, header = read_tensors(path, ROW_SCHEMA)
    if header["label"] != label or not fold < len(header["counts"]):
        raise InputFileError(
            f"expected the row of class {label}, fold {fold} in {path}, got class {header['label']} with "
            f"{len(header['counts'])} folds: were the files renamed?"
        )
    moments = Moments(header["counts"][fold], tensors["mean"][fold], tensors["m2"][fold])
    return ClassRow(moments, tensors["largest"][fold], tensors["image"][fold])


def _row_file(folder: Path, label: int) -> Path:
    return folder / f"class-{label:05d}.safetensors"


def _row_or_zero(stats: UnitStats, label: int) -> ClassRow:
    return stats.rows.read(label) if label in stats.class_counts else ClassRow.zero(stats.shape)
