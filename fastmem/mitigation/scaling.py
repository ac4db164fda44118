"""Scaling the fc1 rows of chosen units in place, and undoing it to the very bits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from fastmem.backends.select import choose_backend
from fastmem.errors import UsageError
from fastmem.models.model import Model


class Units(Protocol):
    """Chosen units, as a selection or an edit plan has them: layer, unit int64 [n]."""

    @property
    def layer(self) -> Tensor: ...

    @property
    def unit(self) -> Tensor: ...


@dataclass(eq=False)
class Edit:
    """Units of a model whose fc1 rows are scaled, with what the rows held before; leaving its context undoes it.

    layer, unit: int64 [n]; factor: float64 [n]; saved: for each layer with such units, their rows int64 [m] and what
    these held, [m, width] in the weights' type; fingerprint: the hashes that were known of the weights before; live:
    False once undone.
    """

    model: Model
    layer: Tensor
    unit: Tensor
    factor: Tensor
    saved: dict[int, tuple[Tensor, Tensor]]
    fingerprint: dict[str, str]
    live: bool = field(default=True)

    def __len__(self) -> int:
        return len(self.layer)

    def __enter__(self) -> Edit:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    @torch.no_grad()
    def undo(self) -> None:
        """Put back the very bits that the rows held before; once that is done, nothing more happens.

        Edits of other units may be undone in any order; those that share a unit only latest first.

        Raises: UsageError where a later edit, not yet undone, scaled one of the units again; nothing is changed then.
        """
        if not self.live:
            return
        edits = self.model.edits
        place = next(i for i, edit in enumerate(edits) if edit is self)
        later = edits[place + 1 :]
        shared = sum(int(torch.isin(self._keys(), edit._keys()).sum()) for edit in later)
        if shared:
            raise UsageError(
                f"expected to undo the latest edit of a unit first, got one of which {shared} units were scaled again "
                "by edits that are not undone: undo those before it"
            )
        for layer, (rows, values) in self.saved.items():
            weight = self.model.fc1_layers[layer].weight
            weight.index_copy_(0, rows.to(weight.device), values.to(weight.device))
        del edits[place]
        self.live = False
        self.model.exchange_fingerprint({} if later else self.fingerprint)
        # what was known before them had this edit in it
        for edit in later:
            edit.fingerprint = {}
        self.saved = {}

    def _keys(self) -> Tensor:
        return self.layer * self.model.num_units + self.unit


@torch.no_grad()
def scale_units(model: Model, selection: Units, factor: float | Tensor = 0.5) -> Edit:
    """Multiply the fc1 rows of the selected units, in place; their biases and fc2 stay as they are.

    selection: a Selection, an EditPlan, or anything else with ``layer`` and ``unit``, int64 [n]; factor: a number, or
    one for each unit, float [n].

    Raises: UsageError for a unit that the model lacks or that is named twice, or a factor that is not finite or of
    another shape.

    Source: arXiv 2509.00488, section 5.
    """
    layer, unit = (torch.as_tensor(t, dtype=torch.int64).cpu() for t in (selection.layer, selection.unit))
    check_units(layer, unit, model.num_layers, model.num_units)
    factors = _one_each(factor, len(layer))
    weights = {at: model.fc1_layers[at].weight for at in layer.unique().tolist()}
    rows = {at: unit[layer == at] for at in weights}
    saved = {at: (rows[at], weight[rows[at].to(weight.device)]) for at, weight in weights.items()}
    known = model.exchange_fingerprint({})
    edit = Edit(model, layer, unit, factors, saved, known)
    if len(factors) and bool((factors == factors[0]).all()):
        scale_rows_ = choose_backend("auto", model.device).scale_rows_
        scale_rows_(list(weights.values()), list(rows.values()), float(factors[0]))
    else:
        for at, weight in weights.items():
            _scale_each(weight, rows[at], factors[layer == at])
    model.edits.append(edit)
    return edit


def _scale_each(weight: Tensor, rows: Tensor, factors: Tensor) -> None:
    # as the operator for a single factor does: the product in float32 (float64 for that), rounded once
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    rows, factors = rows.to(weight.device), factors.to(weight.device, wide)
    weight[rows] = (weight[rows].to(wide) * factors[:, None]).to(weight.dtype)


def check_units(layer: Tensor, unit: Tensor, layers: int, units: int) -> None:
    """Raises: UsageError where layer and unit, int64 [n], are not [n] different units of ``layers`` x ``units``."""
    if layer.ndim != 1 or layer.shape != unit.shape:
        raise UsageError(f"expected as many layers as units, got {list(layer.shape)} and {list(unit.shape)}")
    for name, values, count in (("layers", layer, layers), ("units", unit, units)):
        if len(values) and not 0 <= int(values.min()) <= int(values.max()) < count:
            raise UsageError(
                f"expected {name} in 0..{count - 1}, got {int(values.min())}..{int(values.max())}: were they chosen on "
                "another model?"
            )
    if len((layer * units + unit).unique()) < len(layer):
        raise UsageError(f"expected every unit once, got {len(layer)} with some twice: remove the repeats")


def _one_each(factor: float | Tensor, count: int) -> Tensor:
    factors = torch.as_tensor(factor, dtype=torch.float64).cpu()
    if factors.ndim == 0:
        factors = factors.repeat(count)
    if factors.shape != (count,) or not bool(factors.isfinite().all()):
        raise UsageError(
            f"expected a finite factor, or one for each of {count} units, got {_describe(factors)}: give a number such "
            "as 0.5"
        )
    return factors


def _describe(factors: Tensor) -> str:
    bad = factors[~factors.isfinite()]
    return f"{float(bad[0])}" if len(bad) else f"a tensor of shape {list(factors.shape)}"
