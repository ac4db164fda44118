"""Statistics built from work units: pieces of one class each, which come one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec
import torch
from torch import Tensor

from fastmem.data.manifest import FOLDS
from fastmem.errors import InputFileError, UsageError
from fastmem.stats.accumulators import LARGEST, ClassRow, ClassSummary, Fold, Shape
from fastmem.stats.class_rows import ClassRows, write_rows
from fastmem.stats.statistics import Count, Label, UnitStats, merge_folds


class StateShape(TypedDict):
    """The JSON values of a builder's state; the lists have an entry for each fold, and one more for the whole."""

    counts: Annotated[list[Count], msgspec.Meta(min_length=FOLDS, max_length=FOLDS)]
    summary_counts: Annotated[list[Count], msgspec.Meta(min_length=FOLDS + 1, max_length=FOLDS + 1)]
    class_counts: Annotated[list[dict[Label, Count]], msgspec.Meta(min_length=FOLDS, max_length=FOLDS)]
    open_label: Annotated[int, msgspec.Meta(ge=0)] | None
    open_counts: Annotated[list[Count], msgspec.Meta(max_length=FOLDS)]


class StatsBuilder:
    """Builds statistics from finished work units: ``update`` takes each of them, ``finish`` gives the statistics.

    The work units of one class have to come one after the other: when one of another class comes, the class before is
    closed, and its row is written away or kept.
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
        owner: Mapping[str, Any] | None = None,
    ) -> None:
        """Start without images.

        Args:
            shape: the numbers of layers, of segments and of units in a layer.
            segments: names of the parts of the token sequence that responses are means over.
            class_only: those of ``segments`` whose responses depend on an image's class alone.
            keep_rows: whether a row is kept for every class; without rows only their summary is.
            rows_in: the folder that the rows of closed classes are written into; None keeps them in memory.
            k: how many of the largest responses of every unit are kept.
            device: where the sums are kept and the responses come from.
            owner: entries of ``finish``'s origin that the files of rows carry, the run and the set; None for none.
        """
        self.shape, self.device, self.k = shape, device, k
        self.segments, self.class_only = tuple(segments), tuple(class_only)
        self.keep_rows, self.rows_in, self.owner = keep_rows, rows_in, owner
        self.folds = [Fold.zero(shape, k, device) for _ in range(FOLDS)]
        self.class_counts: list[dict[int, int]] = [{} for _ in range(FOLDS)]
        # of the whole, then of each fold
        self.summaries = [ClassSummary.zero(shape, device) for _ in range(FOLDS + 1)]
        self.open_label: int | None = None
        self.open_rows: list[ClassRow] = []
        self.memory_rows: dict[int, list[ClassRow]] = {}

    def zero_unit(self) -> list[Fold]:
        """The result of a work unit without images, to be updated with its images: the sums of every fold."""
        return [Fold.zero(self.shape, self.k, self.device) for _ in range(FOLDS)]

    def update(self, label: int, unit: Sequence[Fold]) -> None:
        """Take in a finished work unit.

        Args:
            label: the class of all its images.
            unit: its sums, for every fold.

        Raises: UsageError where a response of the work unit was infinite or NaN, which then changes nothing, or where
        the rows of the class before cannot be written.
        """
        self._check_finite(unit)
        if label != self.open_label:
            self._close_class()
            self.open_label = label
            self.open_rows = [ClassRow.zero(self.shape, self.device) for _ in range(FOLDS)]
        for i, part in enumerate(unit):
            if part.moments.count:
                self.folds[i] = self.folds[i].merge(part)
                self.open_rows[i] = self.open_rows[i].merge(part.to_row())

    def _check_finite(self, unit: Sequence[Fold]) -> None:
        """Refuse a work unit that has seen a response that is not finite, which its mean never loses again."""
        means = torch.stack([fold.moments.mean for fold in unit])
        if not means.numel() or bool(torch.stack(means.aminmax()).isfinite().all()):
            return
        fold, layer, segment, place = (~means.isfinite()).nonzero()[0].tolist()
        raise UsageError(
            f"expected finite responses, got a mean of {float(means[fold, layer, segment, place])} for unit {place} of "
            f"block {layer} in segment {self.segments[segment]}: check the weights and the type they are in"
        )

    def finish(self, origin: Mapping[str, Any] | None = None) -> UnitStats:
        """Close the open class and give the statistics of all images so far, on the CPU.

        ``origin`` says what was scored, as JSON values by name.
        """
        self._close_class()
        folds = []
        for i, fold in enumerate(self.folds):
            counts = dict(self.class_counts[i])
            rows = self._rows(counts, i) if self.keep_rows else None
            summary = self.summaries[i + 1].to("cpu")
            folds.append(
                UnitStats(fold.to("cpu"), self.segments, self.class_only, counts, rows, summary, origin=origin)
            )
        whole = merge_folds(folds)
        rows = whole.rows and replace(whole.rows, folder=self.rows_in)
        return replace(whole, known_summary=self.summaries[0].to("cpu"), rows=rows)

    def _rows(self, counts: Mapping[int, int], fold: int) -> ClassRows:
        if self.rows_in is not None:
            return ClassRows.of_files(counts, self.rows_in, fold, self.owner)
        return ClassRows(counts, partial(self._read_memory, fold))

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
                write_rows(self.rows_in, label, rows, self.owner)
            else:
                self.memory_rows[label] = [row.to("cpu") for row in rows]
        self.open_label, self.open_rows = None, []

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors by name and JSON values from which another builder can go on with ``restore``.

        They do not hold the rows of closed classes, which must be kept in files or not at all.
        """
        tensors: dict[str, Tensor] = {}
        for i, fold in enumerate(self.folds):
            tensors |= fold.to_tensors(f"fold{i}.")
        for i, summary in enumerate(self.summaries):
            tensors |= summary.to_tensors(f"summary{i}.")
        for i, row in enumerate(self.open_rows):
            # the first unit of a class is shared with its fold, and a file may hold no tensor twice
            tensors |= {name: tensor.clone() for name, tensor in row.to_tensors(f"open{i}.").items()}
        header = {
            "counts": [fold.moments.count for fold in self.folds],
            "summary_counts": [summary.count for summary in self.summaries],
            "class_counts": [{str(k): v for k, v in counts.items()} for counts in self.class_counts],
            "open_label": self.open_label,
            "open_counts": [row.moments.count for row in self.open_rows],
        }
        return tensors, header

    def expected(self, header: Mapping[str, Any]) -> dict[str, Tensor]:
        """Tensors of the shapes and dtypes that a state with these JSON values must have, by name.

        Raises: InputFileError where the values do not fit each other.
        """
        folds = 0 if header["open_label"] is None else FOLDS
        if len(header["open_counts"]) != folds:
            raise InputFileError(f"expected {folds} counts of the open class, got {len(header['open_counts'])}")
        found, _ = StatsBuilder(self.shape, self.segments, self.class_only, k=self.k).state()
        for i in range(folds):
            found |= ClassRow.zero(self.shape).to_tensors(f"open{i}.")
        return found

    def restore(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        """Go on from the tensors and the JSON values that ``state`` of a builder with equal settings gave."""
        self.folds = [
            Fold.from_tensors(tensors, n, f"fold{i}.").to(self.device) for i, n in enumerate(header["counts"])
        ]
        self.summaries = [
            ClassSummary.from_tensors(tensors, n, f"summary{i}.").to(self.device)
            for i, n in enumerate(header["summary_counts"])
        ]
        self.class_counts = [{int(k): v for k, v in counts.items()} for counts in header["class_counts"]]
        self.open_label = header["open_label"]
        self.open_rows = [
            ClassRow.from_tensors(tensors, n, f"open{i}.").to(self.device) for i, n in enumerate(header["open_counts"])
        ]
