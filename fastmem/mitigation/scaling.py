"""Scale the fc1 rows of chosen units in place, and undo that exactly, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from fastmem.backends.select import choose_backend
from fastmem.errors import UsageError
from fastmem.models.model import Model


class Units(Protocol):
    """Any object that names units, such as a selection or an edit plan.

    Attributes:
        layer: block of each unit, int64 [n].
        unit: position of each unit in its block, int64 [n].
    """

    @property
    def layer(self) -> Tensor: ...

    @property
    def unit(self) -> Tensor: ...


@dataclass(eq=False)
class Edit:
    """An edit in force: units of a model whose fc1 rows are scaled, with the values of the rows before.

    An edit is also a context manager, which undoes the edit at its end.

    Attributes:
        model: the edited model.
        layer: block of each unit, int64 [n].
        unit: position of each unit in its block, int64 [n].
        factor: number that the unit's row was multiplied by, float64 [n].
        saved: by layer, the positions of the scaled rows, int64 [m], and their values before, [m, width].
        fingerprint: hashes of the weights that were computed before the edit.
        live: whether the edit is in force; False after it was undone.
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
        """Put back the values that the rows had before, bit for bit; a second call does nothing.

        Edits that share a unit must be undone in the reverse order; other edits can be undone in any order.

        Raises: UsageError where a later edit that is in force shares a unit, or the rows are no longer what this edit
        made of them; then nothing is changed.
        """
        if not self.live:
            return
        edits = self.model.edits
        place = next(i for i, edit in enumerate(edits) if edit is self)
        later = edits[place + 1 :]
        shared = sum(int(torch.isin(self._keys(), edit._keys()).sum()) for edit in later)
        if shared:
            raise UsageError(
                f"expected to undo the latest edit of a unit first, got an edit that shares {shared} units with later "
                "edits in force: undo the later edits first"
            )
        changed = [layer for layer in self.saved if not self._is_as_left(layer)]
        if changed:
            raise UsageError(
                f"expected the scaled rows of block {changed[0]} as this edit left them, got others: the weights were "
                "changed under the edit, so load the model again"
            )
        for layer, (rows, values) in self.saved.items():
            weight = self.model.fc1_layers[layer].weight
            weight.index_copy_(0, rows.to(weight.device), values.to(weight.device))
        del edits[place]
        self.live = False
        self.model.exchange_fingerprint({} if later else self.fingerprint)
        # the hashes that later edits remember were computed with this edit in force, so they are no longer right
        for edit in later:
            edit.fingerprint = {}
        self.saved = {}

    def _is_as_left(self, layer: int) -> bool:
        """Whether the rows of a layer hold what the edit made of them, or what they held before it."""
        rows, before = self.saved[layer]
        weight = self.model.fc1_layers[layer].weight
        now, before = weight[rows.to(weight.device)], before.to(weight.device)
        factors = self.factor[self.layer == layer]
        return now.dtype == before.dtype and any(
            # a NaN that the weights had before is equal to itself here
            bool(((now == values) | (now.isnan() & values.isnan())).all())
            for values in (_scaled(before, factors), before)
        )

    def _keys(self) -> Tensor:
        return self.layer * self.model.num_units + self.unit


@torch.no_grad()
def scale_units(model: Model, selection: Units, factor: float | Tensor = 0.5) -> Edit:
    """Multiply the fc1 weight rows of the selected units by a factor, in place, and return the edit.

    ``selection`` is a selection, an edit plan or any other object with ``layer`` and ``unit``, int64 [n]. ``factor`` is
    one number for all units, or one for each unit, float [n]. Biases and all other weights stay as they are.

    Raises: UsageError where a unit does not exist or is repeated, or ``factor`` has another shape, is not finite, or
    makes a weight infinite; then nothing is changed.

    Source: arXiv 2509.00488, section 5.
    """
    layer, unit = (_integers(t) for t in (selection.layer, selection.unit))
    check_units(layer, unit, model.num_layers, model.num_units)
    factors = _one_each(factor, len(layer))
    weights = {at: model.fc1_layers[at].weight for at in layer.unique().tolist()}
    rows = {at: unit[layer == at] for at in weights}
    saved = {at: (rows[at], weight[rows[at].to(weight.device)]) for at, weight in weights.items()}
    if len(factors) and float(factors.abs().max()) > 1:
        for at, (_, values) in saved.items():
            _check_range(at, values, factors[layer == at])
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
    rows = rows.to(weight.device)
    weight[rows] = _scaled(weight[rows], factors)


def _scaled(values: Tensor, factors: Tensor) -> Tensor:
    """Rows [m,width] times a factor each, float64 [m]."""
    # like the operator for a single factor: a product in float32, or in float64 for float64 weights, rounded once
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    return (values.to(wide) * factors.to(values.device, wide)[:, None]).to(values.dtype)


def _check_range(layer: int, values: Tensor, factors: Tensor) -> None:
    """Refuse factors by which finite weights become infinite in their type."""
    lost = (values.isfinite() & ~_scaled(values, factors).isfinite()).any(1)
    if bool(lost.any()):
        dtype = str(values.dtype).removeprefix("torch.")
        raise UsageError(
            f"expected a factor whose products stay finite in {dtype}, got {float(factors[lost.cpu()][0]):g} for a "
            f"unit of block {layer}: take a smaller one"
        )


def _integers(values: Tensor) -> Tensor:
    found = torch.as_tensor(values).cpu()
    # an empty list becomes a tensor of floats
    if (found.is_floating_point() and len(found)) or found.dtype == torch.bool or found.is_complex():
        raise UsageError(f"expected layers and units as int64, got {found.dtype}: give their numbers, not a mask")
    return found.to(torch.int64)


def check_units(layer: Tensor, unit: Tensor, layers: int, units: int) -> None:
    """Check that units exist and are all different.

    Args:
        layer: block of each unit, int64 [n].
        unit: position of each unit in its block, int64 [n].
        layers: number of blocks of the model.
        units: number of units in every block.

    Raises: UsageError where the shapes differ, a unit does not exist, or a unit is repeated.
    """
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
