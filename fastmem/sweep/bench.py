"""The bench of a model: its edits, its targets under attack, and its losses and samples, prepared once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastmem.errors import UsageError
from fastmem.extraction.attack import attack
from fastmem.extraction.candidates import Targets
from fastmem.extraction.verdicts import Judge
from fastmem.mitigation.attribution import attribution_from_tokens
from fastmem.mitigation.scaling import scale_units
from fastmem.models.model import Model
from fastmem.scoring.selection import Selection, select
from fastmem.stats import UnitStats
from fastmem.sweep.plan import ATTRIBUTION, NO_EDIT, Row
from fastmem.sweep.table import RowUnavailable

BATCH_IMAGES = 64


@dataclass(frozen=True, eq=False)
class Shown:
    """Images by their tokens int64 [N,T] and labels int64 [N]."""

    tokens: Tensor
    labels: Tensor

    def loss(self, model: Model) -> float:
        """Mean loss of the true tokens, nats per token."""
        batches = zip(self.tokens.split(BATCH_IMAGES), self.labels.split(BATCH_IMAGES), strict=True)
        losses = [model.outcomes(tokens, labels).loss.mean(1) for tokens, labels in batches]
        return float(torch.cat(losses).double().mean())


class UnitChooser:
    """Chooses units for a row: by the run's statistics, or by attribution on the model as it is.

    stats, heldout: of the run; memorised, unseen: what attribution weighs against each other, None where it cannot be
    had. Its scores for the unedited model are made once.
    """

    def __init__(
        self, model: Model, stats: UnitStats, heldout: UnitStats | None, memorised: Shown | None, unseen: Shown | None
    ) -> None:
        self.model, self.stats, self.heldout = model, stats, heldout
        self.memorised, self.unseen = memorised, unseen
        self._unedited: Tensor | None = None

    def choose(self, row: Row) -> Selection:
        """The units of one round of a row, on the model as it is.

        Raises: UsageError where they cannot be chosen.
        """
        fraction = row.fraction / row.rounds
        if row.by == ATTRIBUTION:
            return select(self.stats, fraction, "scores", row.scope, row.merge, scores=self._attribution())
        heldout = self.heldout if row.by == "gap" else None
        return select(self.stats, fraction, row.by, row.scope, row.merge, row.seed, heldout)

    def _attribution(self) -> Tensor:
        if self.memorised is None or self.unseen is None:
            raise UsageError("expected held-out images for a selection by attribution, got none: score with --heldout")
        if self.model.edits:
            return self._measure()
        if self._unedited is None:
            self._unedited = self._measure()
        return self._unedited

    def _measure(self) -> Tensor:
        return attribution_from_tokens(
            self.model, self.memorised.tokens, self.memorised.labels, self.unseen.tokens, self.unseen.labels
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

    prefixes: in tokens; losses: images whose mean loss is a metric, by its name; sampled: quality of samples by metric.
    """

    model: Model
    chooser: UnitChooser
    targets: Targets
    judge: Judge
    prefixes: tuple[int, ...]
    losses: dict[str, Shown]
    sampled: Callable[[Model], dict[str, float]]

    @contextmanager
    def edited(self, row: Row) -> Iterator[int]:
        """The model with the row's edit while entered; gives the number of units scaled.

        Raises: RowUnavailable where they cannot be chosen.
        """
        units = 0
        with ExitStack() as edits:
            for _ in range(0 if row == NO_EDIT else row.rounds):
                try:
                    selection = self.chooser.choose(row)
                except UsageError as error:
                    raise RowUnavailable(str(error)) from error
                factor = graded_factors(selection, row.factor) if row.graded else row.factor
                units += len(edits.enter_context(scale_units(self.model, selection, factor)))
            yield units

    def attack(self) -> np.ndarray:
        """Similarity of every target to its completions, float32 [P,N]."""
        generated = attack(self.model, self.targets, self.prefixes)
        return self.judge.similarities(self.model, self.targets, self.prefixes, generated)

    def quality(self) -> dict[str, float]:
        """Losses and quality of samples by metric."""
        return {name: images.loss(self.model) for name, images in self.losses.items()} | self.sampled(self.model)
