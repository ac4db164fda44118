"""Measure edits of a model: choose and scale units, attack the targets, and measure the quality of samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastmem.errors import UsageError
from fastmem.extraction.attack import BATCH_ROWS, attack
from fastmem.extraction.candidates import Targets
from fastmem.extraction.verdicts import Judge
from fastmem.mitigation.attribution import BATCH_IMAGES, attribution_from_tokens
from fastmem.mitigation.edit_file import EditPlan
from fastmem.mitigation.scaling import scale_units
from fastmem.models.model import Model
from fastmem.ranking.selection import Selection, select
from fastmem.stats import UnitStats
from fastmem.sweep.plan import ATTRIBUTION, NO_EDIT, Row
from fastmem.sweep.table import RowUnavailable
from fastmem.tokens.true_images import TrueImages


class UnitChooser:
    """Chooses the units of a row, by the statistics of a run or by attribution on the model with its present edits."""

    def __init__(
        self,
        model: Model,
        stats: UnitStats,
        heldout: UnitStats,
        memorised: TrueImages,
        unseen: TrueImages,
        seed: Callable[[int], int] = int,
        batch_size: int = BATCH_IMAGES,
    ) -> None:
        """Set up the choice of units.

        Args:
            model: the model.
            stats: statistics of the training images.
            heldout: statistics of the held-out images.
            memorised: training images whose loss attribution wants to raise.
            unseen: held-out images whose loss attribution wants to keep.
            seed: gives the seed of random and matched units for a row's seed.
            batch_size: number of images in one backward pass of attribution.
        """
        self.batch_size = batch_size
        self.model, self.stats, self.heldout = model, stats, heldout
        self.memorised, self.unseen, self.seed = memorised, unseen, seed
        self._unedited: Tensor | None = None

    def choose(self, row: Row) -> Selection:
        """Return the units of one round of a row, chosen on the model with its present edits.

        Raises: UsageError where the units cannot be chosen.
        """
        fraction = row.fraction / row.rounds
        if row.by == ATTRIBUTION:
            return select(self.stats, fraction, "scores", row.scope, row.merge, scores=self._attribution())
        heldout = self.heldout if row.by == "gap" else None
        return select(self.stats, fraction, row.by, row.scope, row.merge, self.seed(row.seed), heldout)

    def _attribution(self) -> Tensor:
        """Return attribution scores; those of the unedited model are computed only once."""
        if self.model.edits:
            return self._measure()
        if self._unedited is None:
            self._unedited = self._measure()
        return self._unedited

    def _measure(self) -> Tensor:
        return attribution_from_tokens(
            self.model,
            self.memorised.tokens,
            self.memorised.labels,
            self.unseen.tokens,
            self.unseen.labels,
            self.batch_size,
        )


def graded_factors(selection: Selection, factor: float) -> Tensor:
    """Return a factor for each selected unit, float64 [n], from ``factor`` at the highest score to 1 at the lowest."""
    score = selection.score.double()
    low, high = score.min(), score.max()
    share = (score - low) / (high - low) if high > low else torch.ones_like(score)
    return 1 - (1 - factor) * share


@dataclass(frozen=True, eq=False)
class ModelBench:
    """The bench of a model: makes the edits of rows, attacks the targets and measures the quality.

    Attributes:
        model: the model.
        chooser: chooses the units of a row.
        targets: the images to attack.
        judge: measures how similar completions and their targets are.
        prefixes: prefix lengths, in tokens.
        measure: gives the metrics of a model for a seed of its samples, by name.
        batch_rows: number of completions computed at once.
    """

    model: Model
    chooser: UnitChooser
    targets: Targets
    judge: Judge
    prefixes: tuple[int, ...]
    measure: Callable[[Model, int], dict[str, float]]
    batch_rows: int = BATCH_ROWS

    @contextmanager
    def edited(self, row: Row) -> Iterator[int]:
        """Inside this context the model has the row's edit; the context's value is the number of scaled units.

        Raises: RowUnavailable where the row's units cannot be chosen.
        """
        with ExitStack() as edits:
            yield int((self._enter(row, edits) != 1).sum())

    def plan(self, row: Row) -> EditPlan:
        """Return the row's edit as an edit plan, in which every scaled unit has one factor.

        Raises: RowUnavailable where the row's units cannot be chosen.
        """
        with ExitStack() as edits:
            factors = self._enter(row, edits)
        layer, unit = (factors != 1).nonzero(as_tuple=True)
        factor = factors[layer, unit]
        # sorted by the strength of the edit, because an edit plan does not hold the scores that units were chosen by
        order = (1 - factor).abs().argsort(descending=True, stable=True)
        layer, unit, factor = layer[order], unit[order], factor[order]
        chosen = Selection(layer, unit, 1 - factor, row.by, row.fraction, row.scope, row.merge, row.seed)
        if row.by != ATTRIBUTION:
            return EditPlan.of(self.model, chosen, factor)
        memorised, unseen = (torch.from_numpy(images.ids) for images in (self.chooser.memorised, self.chooser.unseen))
        return EditPlan.of(self.model, chosen, factor, memorised, unseen)

    def _enter(self, row: Row, edits: ExitStack) -> Tensor:
        """Make the row's edit, which ``edits`` undoes, and return the factor of every unit, float64 [layers, units]."""
        factors = torch.ones(self.model.num_layers, self.model.num_units, dtype=torch.float64)
        for _ in range(0 if row.by == NO_EDIT.by else row.rounds):
            try:
                selection = self.chooser.choose(row)
            except UsageError as error:
                raise RowUnavailable(str(error)) from error
            factor = graded_factors(selection, row.factor) if row.graded else row.factor
            edit = edits.enter_context(scale_units(self.model, selection, factor))
            factors[edit.layer, edit.unit] *= edit.factor
        return factors

    def attack(self) -> np.ndarray:
        """Return the similarity of every target and its completion from each prefix length, float32 [P,N]."""
        generated = attack(self.model, self.targets, self.prefixes, batch_size=self.batch_rows)
        return self.judge.similarities(self.model, self.targets, self.prefixes, generated)

    def quality(self, seed: int) -> dict[str, float]:
        """Return the metrics of the model with its present edits, by name, on samples drawn with ``seed``."""
        return self.measure(self.model, seed)
