"""Statistics of every unit over a set of images: the scores made of them, and how they are saved, loaded and merged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec
import torch
from torch import Tensor

from fastmem.errors import InputFileError, UsageError
from fastmem.files import check_finite, check_owner, check_tensors, read_tensors, write_tensors
from fastmem.stats.accumulators import FOLD_TENSORS, SUMMARY_TENSORS, ClassRow, ClassSummary, Fold, Shape, contrast
from fastmem.stats.class_rows import ClassRows, owner_of, row_folder, write_rows

SCHEMA = "fastmem.unit-stats/2"
# tensors of the matched set have names that begin with this
MATCHED = "matched."
# what two sets of statistics must agree on before they merge
MUST_MATCH = ("model", "checkpoint", "tokenizer", "views", "activation")


@dataclass(frozen=True, eq=False)
class UnitStats:
    """Statistics of every unit over a set of images; its properties and methods give the numbers.

    Attributes:
        fold: the sums over all images.
        segments: names of the parts of the token sequence that responses are means over.
        class_only: those of ``segments`` whose responses depend on an image's class alone.
        class_counts: number of images of each class, by its label.
        rows: what is kept of every class; None where that was too large to keep.
        known_summary: what the class-level scores need; None where it has to be made from ``rows``.
        parts: statistics of the folds, which share no image; empty for statistics of a single fold.
        origin: what was scored: JSON values by name, such as the model's; None where nobody said.
        matched: statistics of as many of the images as the held-out set has, of the same classes and folds; None
            where there was no held-out set or where they are all of the images.
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
        """How many images the statistics are of."""
        return self.fold.moments.count

    @property
    def k(self) -> int:
        """How many of the largest responses of a unit are kept."""
        return self.fold.largest.value.shape[-1]

    @property
    def shape(self) -> Shape:
        """The numbers of layers, of segments and of units in a layer."""
        layers, segments, units = self.fold.view_total.shape
        return layers, segments, units

    @property
    def mean(self) -> Tensor:
        """Mean response over the images, float64 [layers,segments,units]."""
        return self.fold.moments.mean

    @property
    def var(self) -> Tensor:
        """Population variance over the images of a response that is the mean over an image's views.

        float64 [layers,segments,units].
        """
        return self.fold.moments.variance

    @property
    def view_var(self) -> Tensor:
        """Population variance over the views of an image, the mean over the images, float64 [layers,segments,units]."""
        return self.fold.view_total / max(1, self.count)

    @property
    def top_value(self) -> Tensor:
        """The largest responses, the very largest first, float32 [layers,segments,units,k]; empty places hold -inf."""
        return self.fold.largest.value

    @property
    def top_image(self) -> Tensor:
        """Ids of the images that gave the largest responses, int64 [layers,segments,units,k]; empty places hold -1."""
        return self.fold.largest.image

    @property
    def class_ids(self) -> Tensor:
        """Labels of the classes that have images, ascending, int64 [C]."""
        return torch.tensor(sorted(self.class_counts), dtype=torch.int64)

    @property
    def class_count(self) -> Tensor:
        """How many images each class has, in the order of ``class_ids``, int64 [C]."""
        return torch.tensor([self.class_counts[label] for label in sorted(self.class_counts)], dtype=torch.int64)

    @property
    def class_mean(self) -> Tensor:
        """Mean response of each class, in the order of ``class_ids``, float64 [C,layers,segments,units].

        Raises: UsageError without class rows.
        """
        return torch.stack([row.moments.mean for row in self._kept_rows()])

    @property
    def class_var(self) -> Tensor:
        """Population variance within each class, in the order of ``class_ids``, float64 [C,layers,segments,units].

        Raises: UsageError without class rows.
        """
        return torch.stack([row.moments.variance for row in self._kept_rows()])

    @property
    def folds(self) -> tuple[UnitStats, ...]:
        """Statistics of the folds, which share no image, have alike shares of every class and merge to these."""
        return self.parts or (self,)

    @property
    def undefined(self) -> dict[str, str]:
        """What the scores that these images do not have would need, by the names that `select` takes."""
        classes = [count for count in self.class_counts.values() if count]
        needs = {
            "unitmem": (self.count > 1, f"at least two images for UnitMem, got {self.count}"),
            "within-class": (
                max(classes, default=0) > 1,
                "a class of at least two images for within-class UnitMem, got none",
            ),
            "class-selectivity": (
                len(classes) > 1,
                f"images of at least two classes for class selectivity, got {len(classes)}",
            ),
        }
        return {score: need for score, (met, need) in needs.items() if not met}

    def unitmem(self) -> Tensor:
        """How strongly a unit answers to one image alone, float64 [layers,segments,units] in [0,1].

        UnitMem = (mu_max - mu_rest) / (mu_max + mu_rest), where mu_max is the largest response of an image and mu_rest
        the mean response of all other images.

        Raises: UsageError for fewer than two images.

        Source: arXiv 2409.19069, with the mean in place of the median, which does not stream.
        """
        self._check_defined("unitmem")
        return contrast(self.top_value[..., 0].clamp_min(0), self.mean * self.count, self.count)

    def within_class_unitmem(self) -> Tensor:
        """UnitMem among the images of one class, of the class where it is largest.

        float64 [layers,segments,units] in [0,1].

        Raises: UsageError where no class has two images, or where neither class rows nor their summary were kept.
        """
        self._check_defined("within-class")
        return self._summary().within

    def within_class_image(self) -> Tensor:
        """Id of the image that stands out in ``within_class_unitmem``.

        int64 [layers,segments,units]; -1 without images.

        Raises: UsageError where neither class rows nor their summary were kept.
        """
        return self._summary().within_image

    def class_selectivity(self) -> Tensor:
        """How strongly a unit answers to one class alone, float64 [layers,segments,units] in [0,1].

        It is UnitMem's formula over the mean responses of classes in place of the responses of images.

        Raises: UsageError for fewer than two classes, or where neither class rows nor their summary were kept.
        """
        self._check_defined("class-selectivity")
        summary = self._summary()
        return contrast(summary.largest, summary.total, summary.count)

    def merge(self, other: UnitStats) -> UnitStats:
        """The statistics of two sets of images together, which must have no image in common.

        Counts, largest responses and image ids are those of one pass over all images; means and variances are equal to
        rounding. The origin no longer names a run, where the two are of different ones.

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
        """Write the statistics to a safetensors file, and their class rows into the folder NAME.classes beside it.

        Raises: UsageError where the place cannot be written.
        """
        path = Path(path)
        folder = row_folder(path)
        if self.rows is not None and self.rows.folder != folder:
            for label in sorted(self.class_counts):
                rows = [_row_or_zero(fold, label) for fold in self.folds]
                write_rows(folder, label, rows, owner_of(self.origin))
        tensors, header = _pack(self, "")
        if self.matched is not None:
            more, header["matched"] = _pack(self.matched, MATCHED)
            tensors |= more
        header |= {
            "segments": self.segments,
            "class_only": self.class_only,
            "class_rows": self.rows is not None,
            "origin": dict(self.origin or {}),
        }
        write_tensors(path, tensors, SCHEMA, header)

    @staticmethod
    def load(path: str | Path, owner: Mapping[str, Any] | None = None) -> UnitStats:
        """Read the statistics from a file that ``save`` wrote.

        Args:
            path: the file.
            owner: entries of ``origin`` that it must have, such as the run's; None takes the file as it is.

        Raises: InputFileError for a missing, damaged or foreign file.
        """
        path = Path(path)
        tensors, header = read_tensors(path, SCHEMA, HeaderShape)
        check_owner(header["origin"], path, owner)
        _check_counts(path, header)
        expected = _expected(header, "", len(header["segments"]))
        if "matched" in header:
            expected |= _expected(header["matched"], MATCHED, len(header["segments"]))
        check_tensors(path, tensors, expected)
        check_finite(path, tensors, ("top_value",))
        return _read_stats(tensors, header, path)

    def _merge_flat(self, other: UnitStats) -> UnitStats:
        return UnitStats(
            self.fold.merge(other.fold),
            self.segments,
            self.class_only,
            Counter(self.class_counts) + Counter(other.class_counts),
            None if self.rows is None or other.rows is None else self.rows.merge(other.rows),
            self._merge_summaries(other),
            origin=self._merge_origins(other),
        )

    def _merge_origins(self, other: UnitStats) -> Mapping[str, Any] | None:
        mine, theirs = self.origin, other.origin
        if mine is None or owner_of(mine) == owner_of(theirs):
            return mine
        return {key: value for key, value in mine.items() if key not in owner_of(mine)}

    def _merge_summaries(self, other: UnitStats) -> ClassSummary | None:
        mine, theirs = self.known_summary, other.known_summary
        if mine is None or theirs is None or not self.class_counts.keys().isdisjoint(other.class_counts):
            return None
        return mine.merge(theirs)

    def _check_defined(self, score: str) -> None:
        if score in self.undefined:
            raise UsageError(f"expected {self.undefined[score]}: score more images")

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
    """The statistics of all images, given those of the folds, which they keep."""
    return replace(reduce(UnitStats._merge_flat, folds), parts=tuple(folds))


def _row_or_zero(stats: UnitStats, label: int) -> ClassRow:
    return stats._kept_rows().read(label) if label in stats.class_counts else ClassRow.zero(stats.shape)


def _pack(stats: UnitStats, prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, under names that begin with ``prefix``, and header of statistics and their folds, for a file."""
    tensors: dict[str, Tensor] = {}
    summaries: list[int | None] = []
    for name, part in (("whole", stats), *((f"fold{i}", fold) for i, fold in enumerate(stats.folds))):
        summary = part.known_summary
        summaries.append(None if summary is None else summary.count)
        if summary is not None:
            tensors |= summary.to_tensors(f"{prefix}{name}.classes.")
    for i, fold in enumerate(stats.folds):
        tensors |= fold.fold.to_tensors(f"{prefix}fold{i}.")
    header = {
        "counts": [fold.count for fold in stats.folds],
        "class_counts": [{str(k): v for k, v in fold.class_counts.items()} for fold in stats.folds],
        "summaries": summaries,
    }
    # a single fold is its own whole, and a file may hold no tensor twice
    return {name: tensor.clone() for name, tensor in tensors.items()}, header


Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
# a class's label is a key of a JSON object
Label = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,18}$")]


class PartShape(TypedDict):
    """What a header says of one set of statistics; every list has an entry for each fold."""

    counts: list[Count]
    class_counts: list[dict[Label, Count]]
    summaries: list[Count | None]


class MatchedShape(TypedDict, total=False):
    """The part of a header that only some files have."""

    matched: PartShape


class HeaderShape(PartShape, MatchedShape):
    """The header of a file of statistics."""

    segments: list[str]
    class_only: list[str]
    class_rows: bool
    origin: dict[str, Any]


def _expected(part: Mapping[str, Any], prefix: str, segments: int) -> dict[str, tuple[str, tuple[int | str, ...]]]:
    """Return dtype and shape of the tensors that belong to a header, or to the part of it for the matched images."""
    shape = ("layers", segments, "units")
    found: dict[str, tuple[str, tuple[int | str, ...]]] = {}
    for i in range(len(part["counts"])):
        found |= {f"{prefix}fold{i}.{name}": (dtype, shape) for name, dtype in FOLD_TENSORS.items()}
        found |= {f"{prefix}fold{i}.{name}": (FOLD_TENSORS[name], (*shape, "k")) for name in ("top_value", "top_image")}
    names = ("whole", *(f"fold{i}" for i in range(len(part["counts"]))))
    for name, count in zip(names, part["summaries"], strict=True):
        if count is not None:
            found |= {f"{prefix}{name}.classes.{entry}": (dtype, shape) for entry, dtype in SUMMARY_TENSORS.items()}
    return found


def _check_counts(path: Path, header: Mapping[str, Any]) -> None:
    """Check that the numbers of a header fit each other. Raises: InputFileError where they do not."""
    for part in (header, header.get("matched")):
        if part is None:
            continue
        folds = len(part["counts"])
        alike = folds == len(part["class_counts"]) == len(part["summaries"]) - 1
        if not folds or not alike or [sum(c.values()) for c in part["class_counts"]] != part["counts"]:
            raise InputFileError(f"expected counts of images that fit each other in {path}, got others: score again")


def _read_stats(tensors: Mapping[str, Tensor], header: Mapping[str, Any], path: Path) -> UnitStats:
    common = {key: header[key] for key in ("segments", "class_only", "origin")}
    stats = _unpack(tensors, {**header, **common}, "", row_folder(path) if header["class_rows"] else None)
    if "matched" not in header:
        return stats
    return replace(stats, matched=_unpack(tensors, {**header["matched"], **common}, MATCHED, None))


def _unpack(tensors: Mapping[str, Tensor], header: Mapping[str, Any], prefix: str, rows: Path | None) -> UnitStats:
    """The statistics that ``_pack`` took apart, with their class rows in the folder ``rows``."""

    def summary(name: str, count: int | None) -> ClassSummary | None:
        return None if count is None else ClassSummary.from_tensors(tensors, count, f"{prefix}{name}.classes.")

    folds = []
    for i, count in enumerate(header["counts"]):
        class_counts = {int(k): v for k, v in header["class_counts"][i].items()}
        folds.append(
            UnitStats(
                Fold.from_tensors(tensors, count, f"{prefix}fold{i}."),
                tuple(header["segments"]),
                tuple(header["class_only"]),
                class_counts,
                None if rows is None else ClassRows.of_files(class_counts, rows, i, owner_of(header["origin"])),
                summary(f"fold{i}", header["summaries"][i + 1]),
                origin=header["origin"],
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
