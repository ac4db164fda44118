"""Find fc1 rows that an edit may have scaled, by their unusually small norms, as an attacker with the weights would.

The logarithms of the row norms of a layer have about a normal distribution. Its centre and spread are estimated by the
median and the scaled median absolute deviation, on which a few edited rows have little influence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmem.models.model import Model

# standard deviation of a normal distribution as a multiple of its median absolute deviation
SPREAD = 1.4826
# deviation of an outlier, in standard deviations (Iglewicz and Hoaglin 1993)
OUTLIER = 3.5
# rounds of expectation maximisation, which converges in fewer
FITS = 30
# lower bound of the spread, which must not be 0
SMALLEST = 1e-12


@dataclass(frozen=True, eq=False)
class SuspectRows:
    """Rows that the attacker believes were scaled, given by ``layer`` and ``unit``, int64 [n].

    ``factor``, float64 [n], is the number that the attacker multiplies each row by to scale it back.
    """

    layer: Tensor
    unit: Tensor
    factor: Tensor

    def __len__(self) -> int:
        return len(self.layer)


def find_small_rows(model: Model) -> SuspectRows:
    """Return the rows whose log norm is over 3.5 robust deviations below the median of their layer.

    Their factors scale them back to the median norm.
    """
    logs, centre, spread = _log_norms(model)
    return _suspects(logs, (centre - logs) > OUTLIER * spread, (centre - logs).exp())


def find_rows_scaled_by(model: Model, factor: float, share: float) -> SuspectRows:
    """Return the rows that are more likely scaled than not, if the attacker knows the factor and the share of rows.

    ``factor``, in (0,1), is the factor of the edit, and ``share``, in (0,1], the share of all rows that it scaled. The
    log norms of a layer are modelled as a mixture of two normal distributions of equal spread, in which the scaled rows
    are centred at log(factor) below the others. Centre and spread are fitted by expectation maximisation.
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
    """Return the log norm of every row, float64 [layers, units], and centre and spread by layer, [layers, 1]."""
    norms = torch.stack([layer.weight.double().norm(dim=1).cpu() for layer in model.fc1_layers])
    # the logarithm of 0 would be infinite; rows of zeros are left out later, because nothing can be scaled back
    logs = norms.clamp_min(torch.finfo(torch.float64).tiny).log()
    centre = logs.median(1, keepdim=True).values
    spread = SPREAD * (logs - centre).abs().median(1, keepdim=True).values
    return logs, centre, spread.clamp_min(SMALLEST)


def _suspects(logs: Tensor, mask: Tensor, factors: Tensor) -> SuspectRows:
    """Return the rows that ``mask`` marks, without rows of zeros."""
    mask = mask & (logs > math.log(torch.finfo(torch.float64).tiny))
    layer, unit = mask.nonzero(as_tuple=True)
    return SuspectRows(layer, unit, factors[layer, unit])
