"""Folding finished work units into statistics, in order, with only one class live."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmem.data.manifest import FOLDS
from fastmem.stats.accumulators import LARGEST, ClassRow, ClassSummary, Fold, Moments, Shape
from fastmem.stats.statistics import ClassRows, UnitStats, merge_folds
from fastmem.stats.storage import SUMMARY_TENSORS, fold_from_tensors, fold_tensors, read_row, write_rows


class StatsBuilder:
    """Folds finished work units, in order, into statistics: ``update`` with each, ``finish`` at the end.

    Only the open class's rows are live; a class is closed when a unit of another one comes. row_folder: where closed
    rows go as files; None keeps them in memory. keep_rows: False keeps only their summary.
    """

    def __init__(
        self,
        shape: Shape,
        segments: Sequence[str],
        class_only: Sequence[str],
        keep_rows: bool = True,
        rows_in: Path | None = None,
        k: int = LARGEST,
        device: torch.device | str = "cpu",
    ) -> None:
        self.shape, self.device, self.k = shape, device, k
        self.segments, self.class_only = tuple(segments), tuple(class_only)
        self.keep_rows, self.rows_in = keep_rows, rows_in
        self.folds = [Fold.zero(shape, k, device) for _ in range(FOLDS)]
        self.class_counts: list[dict[int, int]] = [{} for _ in range(FOLDS)]
        # of the whole, then of each fold
        self.summaries = [ClassSummary.zero(shape, device) for _ in range(FOLDS + 1)]
        self.open_label: int | None = None
        self.open_rows: list[ClassRow] = []
        self.memory_rows: dict[int, list[ClassRow]] = {}

    def zero_unit(self) -> list[Fold]:
        """An empty work unit's result: one fold each."""
        return [Fold.zero(self.shape, self.k, self.device) for _ in range(FOLDS)]

    def update(self, label: int, unit: Sequence[Fold]) -> None:
        """With the folds of a finished work unit, whose images are all of class ``label``."""
        if label != self.open_label:
            self._close_class()
            self.open_label = label
            self.open_rows = [ClassRow.zero(self.shape, self.device) for _ in range(FOLDS)]
        for i, part in enumerate(unit):
            if part.moments.count:
                self.folds[i] = self.folds[i].merge(part)
                self.open_rows[i] = self.open_rows[i].merge(part.to_row())

    def finish(self, origin: Mapping[str, Any] | None = None) -> UnitStats:
        """The statistics of everything so far; ``origin`` says what was scored."""
        self._close_class()
        folds = []
        for i, fold in enumerate(self.folds):
            counts = dict(self.class_counts[i])
            read = partial(read_row, self.rows_in, i) if self.rows_in else partial(self._read_memory, i)
            rows = ClassRows(counts, read, self.rows_in) if self.keep_rows else None
            fold = fold_from_tensors(fold_tensors(fold, ""), "", fold.moments.count)
            folds.append(
                UnitStats(fold, self.segments, self.class_only, counts, rows, self._summary_cpu(i + 1), (), origin)
            )
        whole = merge_folds(folds)
        rows = whole.rows and replace(whole.rows, folder=self.rows_in)
        return replace(whole, known_summary=self._summary_cpu(0), rows=rows)

    def _summary_cpu(self, i: int) -> ClassSummary:
        s = self.summaries[i]
        return ClassSummary(s.count, *(getattr(s, key).cpu() for key in SUMMARY_TENSORS))

    def _read_memory(self, fold: int, label: int) -> ClassRow:
        return self.memory_rows[label][fold]

    def _close_class(self) -> None:
        if self.open_label is None:
            return
        label, rows = self.open_label, self.open_rows
        for i, row in enumerate(rows):
            if row.moments.count:
                self.class_counts[i][label] = row.moments.count
            self.summaries[i + 1] = self.summaries[i + 1].update(row)
        self.summaries[0] = self.summaries[0].update(reduce(ClassRow.merge, rows))
        if self.keep_rows and any(row.moments.count for row in rows):
            if self.rows_in is not None:
                write_rows(self.rows_in, label, rows)
            else:
                self.memory_rows[label] = [row.to("cpu") for row in rows]
        self.open_label, self.open_rows = None, []

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and header from which ``restore`` goes on; rows must be kept in files or not at all."""
        tensors = {}
        for i, fold in enumerate(self.folds):
            tensors |= fold_tensors(fold, f"fold{i}")
        for i, summary in enumerate(self.summaries):
            tensors |= {f"summary{i}.{key}": getattr(summary, key) for key in SUMMARY_TENSORS}
        for i, row in enumerate(self.open_rows):
            # the first unit of a class is shared with its fold, and a file may hold no tensor twice
            parts = {"mean": row.moments.mean, "m2": row.moments.m2, "largest": row.largest, "image": row.image}
            tensors |= {f"open{i}.{key}": value.clone() for key, value in parts.items()}
        header = {
            "counts": [fold.moments.count for fold in self.folds],
            "summary_counts": [summary.count for summary in self.summaries],
            "class_counts": [{str(k): v for k, v in counts.items()} for counts in self.class_counts],
            "open_label": self.open_label,
            "open_counts": [row.moments.count for row in self.open_rows],
        }
        return tensors, header

    def restore(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        """Continue from what ``state`` gave."""
        self.folds = [fold_from_tensors(tensors, f"fold{i}", n, self.device) for i, n in enumerate(header["counts"])]
        self.summaries = [
            ClassSummary(n, *(tensors[f"summary{i}.{key}"].to(self.device) for key in SUMMARY_TENSORS))
            for i, n in enumerate(header["summary_counts"])
        ]
        self.class_counts = [{int(k): v for k, v in counts.items()} for counts in header["class_counts"]]
        self.open_label = header["open_label"]
        self.open_rows = [
            ClassRow(
                Moments(n, *(tensors[f"open{i}.{key}"] for key in ("mean", "m2"))),
                *(tensors[f"open{i}.{key}"] for key in ("largest", "image")),
            ).to(self.device)
            for i, n in enumerate(header["open_counts"])
        ]
