"""One batch of the scoring pass, from what the network takes to the statistics, for benches to time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmem.backends.select import choose_backend
from fastmem.models.rar import RAR
from fastmem.models.var import VAR
from fastmem.stats.accumulators import Fold


class ScoringPass:
    """Called, it runs the teacher-forced pass over views of one image and folds the responses into statistics.

    network: RAR with tokens int64 [V,T], or VAR with the inputs float32 [V,L-1,C] of its scales; labels: int64 [V];
    spans: (start, stop) pairs of positions; checked: look for numbers that are not finite, as a model does.
    """

    def __init__(
        self,
        network: RAR | VAR,
        given: Tensor,
        labels: Tensor,
        spans: Sequence[tuple[int, int]],
        checked: bool = True,
    ) -> None:
        self.network, self.given, self.labels, self.spans, self.checked = network, given, labels, spans, checked
        self.backend = choose_backend("auto", torch.device("cpu"))
        shape = self.responses().shape[1:]
        self.fold = Fold.zero(tuple(shape))

    @torch.inference_mode()
    def responses(self) -> Tensor:
        """float32 [V,layers,spans,units]."""
        seen = self.network.observe(self.given, self.labels, self.spans, self.backend.fc1_response, with_logits=False)
        if self.checked and not seen.is_finite():
            raise SystemExit("expected finite numbers from the network that is measured, got others: mend the bench")
        return seen.responses

    @torch.inference_mode()
    def __call__(self) -> None:
        self.fold = self.fold.update_by(self.backend.unit_update_, self.responses()[None], torch.tensor([1]))
