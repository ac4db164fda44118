"""The attacker who holds the weights: looks for fc1 rows of unusually small norm, and scales them back.

Within a layer the logarithm of a row's norm is about normal. Its centre and spread are first told by the median and the
scaled median absolute deviation, which few edited rows hardly move.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmem.models.model import Model

# median absolute deviation to standard deviation, and how unusual is an outlier (Iglewicz and Hoaglin 1993)
SPREAD = 1.4826
OUTLIER = 3.5
# rounds of the fit, which settles in a few; a spread below this is none
FITS = 30
SMALLEST = 1e-12


@dataclass(frozen=True, eq=False)
class SuspectRows:
    """Rows that the attacker takes for scaled.

    layer, unit: int64 [n]; factor: what they are multiplied by, float64 [n].
    """

    layer: Tensor
    unit: Tensor
    factor: Tensor

    def __len__(self) -> int:
        return len(self.layer)


def find_small_rows(model: Model) -> SuspectRows:
    """Rows whose log norm is over 3.5 robust deviations below their layer's median; each goes back to the median."""
    logs, centre, spread = _log_norms(model)
    return _suspects(logs, (centre - logs) > OUTLIER * spread, (centre - logs).exp())


def find_rows_scaled_by(model: Model, factor: float, share: float) -> SuspectRows:
    """Rows that are likelier to be scaled by ``factor`` than not, where a ``share`` of all rows was.

    factor: in (0, 1); share: in (0, 1]; both are what the attacker knows of the edit. A layer's log norms are
    then two normal laws of one spread, a share of them log(factor) below the others; centre and spread are fitted by
    expectation maximisation.
    """
    logs, centre, spread = _log_norms(model)
    if share >= 1:
        return _suspects(logs, torch.ones_like(logs, dtype=torch.bool), torch.full_like(logs, 1 / factor))
    shift = math.log(factor)
    odds = math.log(share / (1 - share))
    for _ in range(FITS):
        evidence = odds + ((logs - centre) ** 2 - (logs - centre - shift) ** 2) / (2 * spread**2)
        scaled = evidence.sigmoid()
        centre = (logs - shift * scaled).mean(1, keepdim=True)
        squares = (1 - scaled) * (logs - centre) ** 2 + scaled * (logs - centre - shift) ** 2
        spread = squares.mean(1, keepdim=True).sqrt().clamp_min(SMALLEST)
    return _suspects(logs, evidence > 0, torch.full_like(logs, 1 / factor))


def _log_norms(model: Model) -> tuple[Tensor, Tensor, Tensor]:
    """Log norm of every row, float64 [layers, units], with centre and spread of its layer, [layers, 1]."""
    norms = torch.stack([layer.weight.double().norm(dim=1).cpu() for layer in model.fc1_layers])
    # a row of zeros has no direction to scale back
    logs = norms.clamp_min(torch.finfo(torch.float64).tiny).log()
    centre = logs.median(1, keepdim=True).values
    spread = SPREAD * (logs - centre).abs().median(1, keepdim=True).values
    return logs, centre, spread.clamp_min(SMALLEST)


def _suspects(logs: Tensor, mask: Tensor, factors: Tensor) -> SuspectRows:
    mask = mask & (logs > math.log(torch.finfo(torch.float64).tiny))
    layer, unit = mask.nonzero(as_tuple=True)
    return SuspectRows(layer, unit, factors[layer, unit])
