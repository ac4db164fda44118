"""The bench of a model: its edits, its targets under attack, and its quality."""

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
    """Chooses units for a row: by the run's statistics, or by attribution on the model as it is.

    stats, heldout: of the run; memorised, unseen: what attribution weighs against each other, scored once for the
    unedited model, in batches of ``batch_size``; seed: of the draw for a row's seed.
    """

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
        self.batch_size = batch_size
        self.model, self.stats, self.heldout = model, stats, heldout
        self.memorised, self.unseen, self.seed = memorised, unseen, seed
        self._unedited: Tensor | None = None

    def choose(self, row: Row) -> Selection:
        """The units of one round of a row, on the model as it is.

        Raises: UsageError where they cannot be chosen.
        """
        fraction = row.fraction / row.rounds
        if row.by == ATTRIBUTION:
            return select(self.stats, fraction, "scores", row.scope, row.merge, scores=self._attribution())
        heldout = self.heldout if row.by == "gap" else None
        return select(self.stats, fraction, row.by, row.scope, row.merge, self.seed(row.seed), heldout)

    def _attribution(self) -> Tensor:
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
    """A factor for each unit, float64 [n]: ``factor`` for the highest score, rising to 1 for the lowest of them."""
    score = selection.score.double()
    low, high = score.min(), score.max()
    share = (score - low) / (high - low) if high > low else torch.ones_like(score)
    return 1 - (1 - factor) * share


@dataclass(frozen=True, eq=False)
class ModelBench:
    """What a table measures a model with; see ``fastmem.sweep.table.Bench``.

    prefixes: in tokens; measure: a model's quality by metric, with a seed of its samples; batch_rows: rows that are
    completed at once.
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
        """The model with the row's edit while entered; gives the number of units scaled.

        Raises: RowUnavailable where they cannot be chosen.
        """
        with ExitStack() as edits:
            yield int((self._enter(row, edits) != 1).sum())

    def plan(self, row: Row) -> EditPlan:
        """The row's edit as a file has it: every scaled unit once, by its factor.

        Raises: RowUnavailable where the units cannot be chosen.
        """
        with ExitStack() as edits:
            factors = self._enter(row, edits)
        layer, unit = (factors != 1).nonzero(as_tuple=True)
        factor = factors[layer, unit]
        # the strongest first; UnitMem and the like are not kept by a file
        order = (1 - factor).abs().argsort(descending=True, stable=True)
        layer, unit, factor = layer[order], unit[order], factor[order]
        chosen = Selection(layer, unit, 1 - factor, row.by, row.fraction, row.scope, row.merge, row.seed)
        seen = (self.chooser.memorised, self.chooser.unseen) if row.by == ATTRIBUTION else ()
        return EditPlan.of(self.model, chosen, factor, *(torch.from_numpy(images.ids) for images in seen))

    def _enter(self, row: Row, edits: ExitStack) -> Tensor:
        """Make the row's edit, undone with ``edits``; what every unit is multiplied by, float64 [layers, units]."""
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
        """Similarity of every target to its completions, float32 [P,N]."""
        generated = attack(self.model, self.targets, self.prefixes, batch_size=self.batch_rows)
        return self.judge.similarities(self.model, self.targets, self.prefixes, generated)

    def quality(self, seed: int) -> dict[str, float]:
        """Quality of the model as it is by metric, its samples drawn with ``seed``."""
        return self.measure(self.model, seed)
