"""The results so far of a scoring pass over one set of images: statistics, losses and images that were left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec
import numpy as np
import torch
from torch import Tensor

from fastmem.backends.select import UnitUpdate
from fastmem.data.decoding import Skipped
from fastmem.data.manifest import Manifest, WorkUnit
from fastmem.errors import InputFileError
from fastmem.files import check_finite, check_tensors
from fastmem.models.model import TokenOutcomes
from fastmem.scoring.image_losses import ImageLosses
from fastmem.stats import StatsBuilder, UnitStats
from fastmem.stats.accumulators import Fold
from fastmem.stats.builder import StateShape

MATCHED, LOSSES = "matched/", "losses/"


class MatchedShape(TypedDict, total=False):
    """The part of a header that only some passes have."""

    matched: StateShape


class UnitShape(TypedDict):
    """The header of a work unit that another rank has finished; ``counts`` has the images of every fold."""

    counts: list[Annotated[int, msgspec.Meta(ge=0, le=2**40)]]
    skipped: list[Skipped]


class RunningShape(StateShape, MatchedShape):
    """The header of a pass that goes on."""

    run: str
    set: str
    units: Annotated[int, msgspec.Meta(ge=0, le=2**40)]
    skipped: list[Skipped]


@dataclass(frozen=True, eq=False)
class Seen:
    """The results of the forward pass for one batch of n images.

    Attributes:
        positions: int64 [n], positions in the manifest.
        responses: float32 [n,views,layers,segments,units].
        outcomes: loss and hit of every token of the centre view; None where losses are not kept.
        hits: float32 [n] in [0,1], share of hits over the candidate positions; None where losses are not kept.
        unconditional: float32 [n], mean loss without a class, in nats per token; None where it is not kept.
    """

    positions: np.ndarray
    responses: Tensor
    outcomes: TokenOutcomes | None = None
    hits: Tensor | None = None
    unconditional: Tensor | None = None


@dataclass
class RunningSet:
    """The results so far for one set of images.

    Batches are first added to an open work unit, which enters the results only when it is complete.

    Attributes:
        manifest: the images of the set.
        builder: statistics of all images.
        matched: bool [N], marks the images that are matched to the held-out set; None where there are none or all are.
        matched_builder: statistics of the matched images; None where ``matched`` is None.
        losses: loss and hits of every image; None where they are not kept.
        unit_update: the backend's operator that adds responses to statistics; None for plain torch.
        skipped: images of finished work units that could not be read.
        units: number of finished work units.
    """

    manifest: Manifest
    builder: StatsBuilder
    matched: np.ndarray | None = None
    matched_builder: StatsBuilder | None = None
    losses: ImageLosses | None = None
    unit_update: UnitUpdate | None = None
    skipped: list[Skipped] = field(default_factory=list)
    units: int = 0

    def __post_init__(self) -> None:
        self._open_unit()

    def update(self, seen: Seen, skipped: Sequence[Skipped]) -> None:
        """Add a batch, and its images that could not be read, to the open work unit."""
        self.skip(skipped)
        self._accumulate(self.unit, seen, np.ones(len(seen.positions), dtype=bool))
        if self.matched_builder is not None and self.matched is not None:
            # summed separately, so that the statistics of the whole set do not depend on there being a held-out set
            self._accumulate(self.matched_unit, seen, self.matched[seen.positions])
        if self.losses is not None and seen.outcomes is not None and seen.hits is not None:
            self.losses.loss[seen.positions] = seen.outcomes.loss.mean(1).cpu().numpy()
            self.losses.hits[seen.positions] = seen.hits.cpu().numpy()
            if self.losses.unconditional is not None and seen.unconditional is not None:
                self.losses.unconditional[seen.positions] = seen.unconditional.cpu().numpy()

    def _accumulate(self, unit: list[Fold], seen: Seen, mask: np.ndarray) -> None:
        folds = np.where(mask, self.manifest.fold[seen.positions], -1)
        ids = torch.from_numpy(self.manifest.ids[seen.positions])
        for i in np.unique(folds[mask]):
            rows = torch.from_numpy(np.flatnonzero(folds == i))
            found = seen.responses[rows.to(seen.responses.device)]
            unit[i] = unit[i].update_by(self.unit_update, found, ids[rows])

    def skip(self, skipped: Sequence[Skipped]) -> None:
        """Add images that could not be read to the open work unit."""
        self.unit_skipped += skipped

    def end_unit(self, label: int) -> None:
        """Add the open work unit, whose images are all of class ``label``, to the results, and open the next one."""
        self._add(label, self.unit, self.matched_unit, self.unit_skipped)
        self._open_unit()

    def _add(self, label: int, unit: list[Fold], matched: list[Fold], skipped: list[Skipped]) -> None:
        self.builder.update(label, unit)
        if self.matched_builder is not None:
            self.matched_builder.update(label, matched)
        self.skipped += skipped
        self.units += 1

    def take_unit(self, images: WorkUnit) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Close the open work unit, which is of these ``images``, without adding it; return what ``put_unit`` takes."""
        folds = [*self.unit, *self.matched_unit]
        tensors: dict[str, Tensor] = {}
        for i, fold in enumerate(folds):
            if fold.moments.count:
                tensors |= {name: tensor.cpu().clone() for name, tensor in fold.to_tensors(f"fold{i}.").items()}
        if self.losses is not None:
            inside = slice(images.start, images.stop)
            tensors |= {LOSSES + name: tensor[inside].clone() for name, tensor in self.losses.tensors().items()}
        header = {"counts": [fold.moments.count for fold in folds], "skipped": as_rows(self.unit_skipped)}
        self._open_unit()
        return tensors, header

    def check_unit(
        self, images: WorkUnit, tensors: Mapping[str, Tensor], header: Mapping[str, Any], path: Path
    ) -> None:
        """Check that what was read from a file can be a finished work unit.

        Args:
            images: those of the unit.
            tensors: what the file holds.
            header: its entries.
            path: the file, which an error names.

        Raises: InputFileError where it cannot.
        """
        own, matched = header["counts"][: len(self.unit)], header["counts"][len(self.unit) :]
        whole = len(own) == len(self.unit) and len(matched) == len(self.matched_unit)
        if not whole or sum(own) + len(header["skipped"]) != images.stop - images.start or sum(matched) > sum(own):
            raise InputFileError(
                f"expected {images.stop - images.start} images in {path}, got counts {header['counts']}: remove it"
            )
        expected = Fold.zero(self.builder.shape, self.builder.k).to_tensors("")
        names = {
            f"fold{i}.{name}": tensor
            for i, count in enumerate(header["counts"])
            if count
            for name, tensor in expected.items()
        }
        if self.losses is not None:
            names |= {LOSSES + name: t[images.start : images.stop] for name, t in self.losses.tensors().items()}
        kinds = {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in names.items()}
        check_tensors(path, tensors, kinds)

    def put_unit(self, images: WorkUnit, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        """Add a finished work unit of these ``images``, which ``take_unit`` returned; the open one is not touched."""
        zero = [*self.builder.zero_unit(), *(self.matched_builder.zero_unit() if self.matched_builder else [])]
        folds = [
            Fold.from_tensors(tensors, count, f"fold{i}.").to(self.builder.device) if count else empty
            for i, (count, empty) in enumerate(zip(header["counts"], zero, strict=True))
        ]
        if self.losses is not None:
            for name, values in self.losses.tensors().items():
                # the tensors share the memory of the arrays
                values[images.start : images.stop] = tensors[LOSSES + name]
        own = len(self.unit)
        self._add(images.label, folds[:own], folds[own:], from_rows(header["skipped"]))

    def finish(self, origin: Mapping[str, Any]) -> UnitStats:
        """Return the statistics of all finished work units; ``origin`` says what they were computed from."""
        stats = self.builder.finish(origin)
        return replace(stats, matched=None if self.matched_builder is None else self.matched_builder.finish(origin))

    def _open_unit(self) -> None:
        self.unit = self.builder.zero_unit()
        self.matched_unit = self.builder.zero_unit() if self.matched_builder is not None else []
        self.unit_skipped: list[Skipped] = []

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the results of all finished work units as tensors and a header, from which ``restore`` continues."""
        tensors, header = self.builder.state()
        if self.matched_builder is not None:
            more, header["matched"] = self.matched_builder.state()
            # matched and whole set may share a tensor, which a safetensors file cannot hold twice
            tensors |= {MATCHED + name: tensor.clone() for name, tensor in more.items()}
        if self.losses is not None:
            tensors |= {LOSSES + name: tensor for name, tensor in self.losses.tensors().items()}
        return tensors, header | {"units": self.units, "skipped": as_rows(self.skipped)}

    def restore(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any], path: Path) -> None:
        """Continue from tensors and a header that ``state`` returned, and that were read from the file ``path``.

        Raises: InputFileError where they are not those of this set.
        """

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        expected = self.builder.expected(header)
        if self.matched_builder is not None:
            if "matched" not in header:
                raise InputFileError(f"expected matched images in {path}, got none: start anew with another --out")
            expected |= {MATCHED + name: t for name, t in self.matched_builder.expected(header["matched"]).items()}
        if self.losses is not None:
            expected |= {LOSSES + name: t for name, t in self.losses.tensors().items()}
        kinds = {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in expected.items()}
        check_tensors(path, tensors, kinds)
        # the loss of an image that is not done yet is NaN
        check_finite(path, {name: t for name, t in tensors.items() if not name.startswith(LOSSES)}, ("top_value",))

        self.builder.restore(tensors, header)
        if self.matched_builder is not None:
            self.matched_builder.restore(part(MATCHED), header["matched"])
        if self.losses is not None:
            self.losses = ImageLosses.of(part(LOSSES))
        self.skipped = from_rows(header["skipped"])
        self.units = header["units"]


def as_rows(skipped: Sequence[Skipped]) -> list[dict[str, str]]:
    """Return images that were left out as rows for a JSON document."""
    return [asdict(s) for s in skipped]


def from_rows(rows: Sequence[Mapping[str, str]]) -> list[Skipped]:
    """Return the images that were left out from rows of a JSON document."""
    return [Skipped(**row) for row in rows]
