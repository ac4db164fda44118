"""What the pass over the images leaves: statistics of every unit, saved, loaded and merged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmem.errors import UsageError
from fastmem.stats import storage
from fastmem.stats.accumulators import ClassRow, ClassSummary, Fold, Shape, contrast

# what two sets of statistics must agree on before they merge
MUST_MATCH = ("model", "checkpoint", "tokenizer", "views", "activation")


@dataclass(frozen=True)
class ClassRows:
    """Class rows of one set of images: ``counts`` maps each class to its images, ``read`` gives a class's row.

    folder: where the rows lie as files, None for rows in memory.
    """

    counts: Mapping[int, int]
    read: Callable[[int], ClassRow]
    folder: Path | None = None

    def __iter__(self) -> Iterator[ClassRow]:
        return (self.read(label) for label in sorted(self.counts))

    def merge(self, other: ClassRows) -> ClassRows:
        """Rows of both; a class on both sides is merged when it is read."""
        sides = (self, other)

        def read(label: int) -> ClassRow:
            return reduce(ClassRow.merge, [side.read(label) for side in sides if label in side.counts])

        return ClassRows(Counter(self.counts) + Counter(other.counts), read)


@dataclass(frozen=True, eq=False)
class UnitStats:
    """Statistics of every unit over a set of images; the properties say what can be asked.

    fold: the running state over all images; segments, class_only: names; class_counts: images of each class; rows:
    class rows, None where they were too large to keep; known_summary: None where it has to be told from the rows;
    parts: statistics of disjoint sets of the images (the folds), empty for a single fold; origin: what was scored;
    matched: statistics of those of the images that have the held-out set's size, classes and folds, None where there
    was no held-out set or all images are among them.
    """

    fold: Fold
    segments: tuple[str, ...]
    class_only: tuple[str, ...]
    class_counts: Mapping[int, int]
    rows: ClassRows | None
    known_summary: ClassSummary | None = None
    parts: tuple[UnitStats, ...] = ()
    origin: Mapping[str, Any] | None = None
    matched: UnitStats | None = None

    @property
    def count(self) -> int:
        """Images."""
        return self.fold.moments.count

    @property
    def k(self) -> int:
        """How many of the largest responses are kept."""
        return self.fold.largest.value.shape[-1]

    @property
    def shape(self) -> Shape:
        """(layers, segments, units)."""
        return tuple(self.fold.view_total.shape)

    @property
    def mean(self) -> Tensor:
        """Mean response over images, float64 [layers,segments,units]."""
        return self.fold.moments.mean

    @property
    def var(self) -> Tensor:
        """Population variance over images of the response (after the view mean), float64 [layers,segments,units]."""
        return self.fold.moments.variance

    @property
    def view_var(self) -> Tensor:
        """Mean over images of the population variance over an image's views, float64 [layers,segments,units]."""
        return self.fold.view_total / max(1, self.count)

    @property
    def top_value(self) -> Tensor:
        """Largest responses, best first, float32 [layers,segments,units,k]; empty places hold -inf."""
        return self.fold.largest.value

    @property
    def top_image(self) -> Tensor:
        """Image ids of ``top_value``, int64 [layers,segments,units,k]; empty places hold -1."""
        return self.fold.largest.image

    @property
    def class_ids(self) -> Tensor:
        """Labels of the classes with images, ascending, int64 [C]."""
        return torch.tensor(sorted(self.class_counts), dtype=torch.int64)

    @property
    def class_count(self) -> Tensor:
        """Images of each class of ``class_ids``, int64 [C]."""
        return torch.tensor([self.class_counts[label] for label in sorted(self.class_counts)], dtype=torch.int64)

    @property
    def class_mean(self) -> Tensor:
        """Mean response per class, float64 [C,layers,segments,units]. Raises: UsageError without class rows."""
        return torch.stack([row.moments.mean for row in self._kept_rows()])

    @property
    def class_var(self) -> Tensor:
        """Population variance per class, float64 [C,layers,segments,units]. Raises: UsageError without class rows."""
        return torch.stack([row.moments.variance for row in self._kept_rows()])

    @property
    def folds(self) -> tuple[UnitStats, ...]:
        """Statistics of disjoint, class-stratified sets of the images that merge to this one bit for bit."""
        return self.parts or (self,)

    def unitmem(self) -> Tensor:
        """UnitMem = (mu_max - mu_rest) / (mu_max + mu_rest) of every unit, float64 [layers,segments,units] in [0,1].

        mu_max is the largest response of an image, mu_rest the mean response of all other images.

        Source: arXiv 2409.19069, with the mean in place of the median, which does not stream.
        """
        return contrast(self.top_value[..., 0].clamp_min(0), self.mean * self.count, self.count)

    def within_class_unitmem(self) -> Tensor:
        """Largest over the classes of UnitMem among one class's images, float64 [layers,segments,units] in [0,1].

        Raises: UsageError where neither class rows nor their summary were kept.
        """
        return self._summary().within

    def within_class_image(self) -> Tensor:
        """Id of the image that ``within_class_unitmem`` belongs to, int64 [layers,segments,units]; -1 without images.

        Raises: UsageError where neither class rows nor their summary were kept.
        """
        return self._summary().within_image

    def class_selectivity(self) -> Tensor:
        """UnitMem's formula over class means in place of images, float64 [layers,segments,units] in [0,1].

        Raises: UsageError where neither class rows nor their summary were kept.
        """
        summary = self._summary()
        return contrast(summary.largest, summary.total, summary.count)

    def merge(self, other: UnitStats) -> UnitStats:
        """Statistics of two disjoint sets of images together: exact for counts, maxima and ids.

        Raises: UsageError for statistics of other units, segments or settings.
        """
        for what, mine, theirs in (
            ("shape", self.shape, other.shape),
            ("segments", self.segments, other.segments),
            ("k", self.k, other.k),
            *((key, (self.origin or {}).get(key), (other.origin or {}).get(key)) for key in MUST_MATCH),
        ):
            if mine != theirs:
                raise UsageError(
                    f"expected statistics of equal {what}, got {mine} and {theirs}: merge runs of one model and setting"
                )
        if len(self.parts) != len(other.parts) or not self.parts:
            return self._merge_flat(other)
        whole = merge_folds([a.merge(b) for a, b in zip(self.parts, other.parts, strict=True)])
        matched = self.matched.merge(other.matched) if self.matched and other.matched else None
        return replace(whole, known_summary=self._merge_summaries(other), matched=matched)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, and the class rows into a folder NAME.classes beside it.

        Raises: UsageError where the place cannot be written.
        """
        storage.write(self, Path(path))

    @staticmethod
    def load(path: str | Path) -> UnitStats:
        """Statistics from a file that ``save`` wrote. Raises: InputFileError for a missing, damaged or foreign file."""
        return storage.read(Path(path))

    def _merge_flat(self, other: UnitStats) -> UnitStats:
        return UnitStats(
            self.fold.merge(other.fold),
            self.segments,
            self.class_only,
            Counter(self.class_counts) + Counter(other.class_counts),
            None if self.rows is None or other.rows is None else self.rows.merge(other.rows),
            self._merge_summaries(other),
            origin=self.origin,
        )

    def _merge_summaries(self, other: UnitStats) -> ClassSummary | None:
        mine, theirs = self.known_summary, other.known_summary
        if mine is None or theirs is None or not self.class_counts.keys().isdisjoint(other.class_counts):
            return None
        return mine.merge(theirs)

    def _kept_rows(self) -> ClassRows:
        if self.rows is None:
            raise UsageError(
                "expected statistics with class rows, got ones without: score again with --class-rows keep"
            )
        return self.rows

    def _summary(self) -> ClassSummary:
        if self.known_summary is not None:
            return self.known_summary
        return reduce(ClassSummary.update, self._kept_rows(), ClassSummary.zero(self.shape))


def merge_folds(folds: Sequence[UnitStats]) -> UnitStats:
    """The whole, with ``folds`` as its folds."""
    return replace(reduce(UnitStats._merge_flat, folds), parts=tuple(folds))
