"""The running state of one image set's pass: statistics, those of the matched images, losses, and skipped files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmem.backends.select import UnitUpdate
from fastmem.data.decoding import Skipped
from fastmem.data.manifest import Manifest
from fastmem.models.model import TokenOutcomes
from fastmem.scoring.image_losses import ImageLosses
from fastmem.stats import StatsBuilder, UnitStats
from fastmem.stats.accumulators import Fold

MATCHED, LOSSES = "matched/", "losses/"


@dataclass(frozen=True, eq=False)
class Seen:
    """What the forward pass gave for one batch: manifest positions int64 [n], responses float32
    [n,views,layers,segments,units], and where losses are kept hits float32 [n] and the centre view's outcomes."""

    positions: np.ndarray
    responses: Tensor
    outcomes: TokenOutcomes | None = None
    hits: Tensor | None = None
    unconditional: Tensor | None = None


@dataclass
class RunningSet:
    """Statistics of one set so far; a work unit at a time is open and belongs to nothing until it is whole.

    builder: of all images; matched_builder: of those that ``matched`` (bool, by manifest position) marks, None where
    there is no such mask; losses: None where none are kept; unit_update: the backend's operator, None for plain torch.
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
        """Add a batch, and those of its images that could not be read, to the open work unit."""
        self.skip(skipped)
        self._accumulate(self.unit, seen, np.ones(len(seen.positions), dtype=bool))
        if self.matched_builder is not None:
            # accumulated apart, so that a set's statistics are the same bits with and without a held-out set
            self._accumulate(self.matched_unit, seen, self.matched[seen.positions])
        if self.losses is not None:
            self.losses.loss[seen.positions] = seen.outcomes.loss.mean(1).cpu().numpy()
            self.losses.hits[seen.positions] = seen.hits.cpu().numpy()
            if self.losses.unconditional is not None:
                self.losses.unconditional[seen.positions] = seen.unconditional.cpu().numpy()

    def _accumulate(self, unit: list[Fold], seen: Seen, mask: np.ndarray) -> None:
        folds = np.where(mask, self.manifest.fold[seen.positions], -1)
        ids = torch.from_numpy(self.manifest.ids[seen.positions])
        for i in np.unique(folds[mask]):
            rows = torch.from_numpy(np.flatnonzero(folds == i))
            found = seen.responses[rows.to(seen.responses.device)]
            unit[i] = unit[i].update_by(self.unit_update, found, ids[rows])

    def skip(self, skipped: Sequence[Skipped]) -> None:
        """Note images of the open work unit that could not be read."""
        self.unit_skipped += skipped

    def end_unit(self, label: int) -> None:
        """Fold the open work unit, whose images are all of class ``label``, into the statistics."""
        self.builder.update(label, self.unit)
        if self.matched_builder is not None:
            self.matched_builder.update(label, self.matched_unit)
        self.skipped += self.unit_skipped
        self.units += 1
        self._open_unit()

    def finish(self, origin: Mapping[str, Any]) -> UnitStats:
        """The statistics of all finished work units."""
        stats = self.builder.finish(origin)
        return replace(stats, matched=self.matched_builder and self.matched_builder.finish(origin))

    def _open_unit(self) -> None:
        self.unit = self.builder.zero_unit()
        self.matched_unit = self.builder.zero_unit() if self.matched_builder is not None else []
        self.unit_skipped: list[Skipped] = []

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and header from which ``restore`` goes on after the last finished work unit."""
        tensors, header = self.builder.state()
        if self.matched_builder is not None:
            more, header["matched"] = self.matched_builder.state()
            # a class seen in the matched set only shares its tensors with the whole, and a file may hold none twice
            tensors |= {MATCHED + name: tensor.clone() for name, tensor in more.items()}
        if self.losses is not None:
            tensors |= {LOSSES + name: tensor for name, tensor in self.losses.tensors().items()}
        return tensors, header | {"units": self.units, "skipped": as_rows(self.skipped)}

    def restore(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        """Continue from what ``state`` gave."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        self.builder.restore(tensors, header)
        if self.matched_builder is not None:
            self.matched_builder.restore(part(MATCHED), header["matched"])
        if self.losses is not None:
            self.losses = ImageLosses.of(part(LOSSES))
        self.skipped = from_rows(header["skipped"])
        self.units = header["units"]


def as_rows(skipped: Sequence[Skipped]) -> list[dict[str, str]]:
    """Skipped images for a JSON document."""
    return [asdict(s) for s in skipped]


def from_rows(rows: Sequence[Mapping[str, str]]) -> list[Skipped]:
    """What ``as_rows`` gave."""
    return [Skipped(**row) for row in rows]
