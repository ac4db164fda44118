"""Everything that the page tells of a run, read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastmem.data.manifest import Manifest
from fastmem.data.sources import ImageSource
from fastmem.mitigation.edit_file import EditPlan
from fastmem.models.model import Model
from fastmem.ranking.gap import Gap
from fastmem.ranking.ownership import owned_units, owners
from fastmem.ranking.selection import FRACTION, select
from fastmem.report.extraction_report import Completions, KeptVerdicts
from fastmem.report.page.documents import EvaluationDocument, ExtractionDocument, ScoreDocument, SweepDocument
from fastmem.runs.folder import RunInputs
from fastmem.scoring.image_losses import ImageLosses
from fastmem.stats import UnitStats


@dataclass(frozen=True, eq=False)
class FinishedExtraction:
    """An extraction of the run.

    Attributes:
        name: of its folder.
        document: what it found.
        verdicts: on every target, by set.
        completions: tokens of targets and completions, by set; None where the extraction kept none.
    """

    name: str
    document: ExtractionDocument
    verdicts: Mapping[str, KeptVerdicts]
    completions: Mapping[str, Completions] | None

    @property
    def longest(self) -> int:
        """Position of the longest prefix."""
        return int(np.argmax(self.document.prefixes))

    @property
    def longest_key(self) -> str:
        """The longest prefix, as the document's counts have it."""
        return str(self.document.prefixes[self.longest])


@dataclass(frozen=True, eq=False)
class Story:
    """A scored run and what its later stages have found so far.

    Attributes:
        path: the run folder.
        identity: what run.json says.
        inputs: where weights and images lay.
        model: the model, whose tokenizer decodes completions.
        sources: images by set.
        manifests: their order by set.
        stats: statistics by set.
        losses: losses and hits by set, where they are known.
        gap: of every unit; None without a held-out set that matches.
        score: what scoring found.
        extractions: of the unedited model first.
        evaluations: likewise.
        edits: that the run keeps.
        sweep: None where none is finished.
        unfinished: folders of extractions that were interrupted.
        caution: what no edit protects.
    """

    path: Path
    identity: Mapping[str, Any]
    inputs: RunInputs
    model: Model
    sources: Mapping[str, ImageSource]
    manifests: Mapping[str, Manifest]
    stats: Mapping[str, UnitStats]
    losses: Mapping[str, ImageLosses]
    gap: Gap | None
    score: ScoreDocument
    extractions: tuple[FinishedExtraction, ...]
    evaluations: tuple[EvaluationDocument, ...]
    edits: tuple[EditPlan, ...]
    sweep: SweepDocument | None
    unfinished: tuple[str, ...]
    caution: str

    @property
    def train(self) -> UnitStats:
        """Statistics of the training images."""
        return self.stats["train"]

    @property
    def heldout(self) -> UnitStats | None:
        """Statistics of the held-out images."""
        return self.stats.get("heldout")

    @property
    def main(self) -> FinishedExtraction | None:
        """The extraction that single images are told by: of the unedited model, where there is one."""
        return self.extractions[0] if self.extractions else None

    @cached_property
    def owned(self) -> np.ndarray:
        """How many of the top 5 % of units by UnitMem each training image owns, int64 [N] in manifest order."""
        ids = self.manifests["train"].ids
        if "unitmem" in self.train.undefined:
            return np.zeros(len(ids), np.int64)
        return owned_units(ids, owners(self.train, select(self.train, FRACTION)))
