"""Edit plans: small files that say which units to scale by which factor, for one particular set of weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmem.errors import InputFileError, UsageError
from fastmem.files import read_tensors, write_tensors
from fastmem.mitigation.scaling import Edit, check_units, scale_units
from fastmem.models.model import Model
from fastmem.ranking.selection import Selection
from fastmem.runs.folder import RunFolder

SCHEMA = "fastmem.edit/1"
# entries of a file's header and their types
HEADER = {
    "model": str,
    "checkpoint": str,
    "dtype": str,
    "layers": int,
    "units": int,
    "by": str,
    "fraction": float,
    "scope": str,
    "merge": str,
    "seed": int,
}
TENSORS = ("layer", "unit", "factor", "chosen_on", "chosen_against")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def _no_ids() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True, eq=False)
class EditPlan:
    """Units to scale, a factor for each, and the weights that the units were chosen for.

    Attributes:
        layer: block of each unit, int64 [n].
        unit: position of each unit in its block, int64 [n].
        factor: number that the unit's row of fc1 weights is multiplied by, float64 [n].
        model: name of the model.
        checkpoint: SHA-256 of the unedited generator's weights.
        dtype: floating-point type of the generator's weights.
        layers: number of blocks of the generator.
        units: number of units (fc1 outputs) in every block.
        by: name of the selection that chose the units.
        fraction: share of all units that the selection was asked for.
        scope: "global" or "per-layer".
        merge: how the scores of a unit in several segments were combined.
        seed: seed of the selection.
        chosen_on: ids of the training images that the selection used as memorised, int64 [m]; empty unless the units
            were chosen by attribution. No result of the edit should be reported on these images.
        chosen_against: ids of the held-out images that the selection compared with them, int64 [k]; empty unless the
            units were chosen by attribution. No result of the edit should be reported on these images.
        name: name of the file without its suffix; empty for a plan without a file.
    """

    layer: Tensor
    unit: Tensor
    factor: Tensor
    model: str
    checkpoint: str
    dtype: str
    layers: int
    units: int
    by: str
    fraction: float
    scope: str
    merge: str
    seed: int
    chosen_on: Tensor = field(default_factory=_no_ids)
    chosen_against: Tensor = field(default_factory=_no_ids)
    name: str = ""

    def __len__(self) -> int:
        return len(self.layer)

    @classmethod
    def of(
        cls,
        model: Model,
        selection: Selection,
        factor: float | Tensor = 0.5,
        chosen_on: Tensor | None = None,
        chosen_against: Tensor | None = None,
        name: str = "",
    ) -> EditPlan:
        """Return a plan to scale the selected units of a model.

        Args:
            model: the unedited model.
            selection: the units to scale.
            factor: one number for all units, or one for each unit, float [n].
            chosen_on: ids of the training images that the selection used as memorised, int64 [m]; None for none.
            chosen_against: ids of the held-out images that the selection compared with them, int64 [k]; None for none.
            name: name of the file to be written, without its suffix.

        Raises: UsageError where the model is edited, it lacks a unit, or ``factor`` has another shape or is not finite.
        """
        _check_unedited(model)
        factors = torch.as_tensor(factor, dtype=torch.float64).cpu()
        plan = cls(
            selection.layer.cpu(),
            selection.unit.cpu(),
            factors.repeat(len(selection)) if factors.ndim == 0 else factors,
            model.name,
            model.fingerprint()["checkpoint"],
            str(model.dtype).removeprefix("torch."),
            model.num_layers,
            model.num_units,
            selection.by,
            float(selection.fraction),
            selection.scope,
            selection.merge,
            selection.seed,
            _no_ids() if chosen_on is None else chosen_on.cpu(),
            _no_ids() if chosen_against is None else chosen_against.cpu(),
            name,
        )
        plan.check()
        return plan

    def check(self) -> None:
        """Check the plan. Raises: UsageError where a unit does not exist or is repeated, or a factor is not finite."""
        check_units(self.layer, self.unit, self.layers, self.units)
        if self.factor.shape != self.layer.shape or not bool(self.factor.isfinite().all()):
            raise UsageError(
                f"expected a finite factor for each of {len(self)} units, got {list(self.factor.shape)} with "
                f"{int((~self.factor.isfinite()).sum())} that are not: give a number such as 0.5"
            )

    def apply(self, model: Model) -> Edit:
        """Scale the units of the plan in ``model``, in place, and return the edit, which can be undone.

        Raises: UsageError where the model has other weights than those that the units were chosen for, or is edited.
        """
        _check_unedited(model)
        checkpoint, dtype = model.fingerprint()["checkpoint"], str(model.dtype).removeprefix("torch.")
        if checkpoint != self.checkpoint:
            raise UsageError(
                f"expected the weights that the edit was made for, {self.model} {self.checkpoint[:12]} in "
                f"{self.dtype}, got {model.name} {checkpoint[:12]} in {dtype}: load those, or make an edit for these"
            )
        return scale_units(model, self, self.factor)

    def header(self) -> dict[str, Any]:
        """Return the entries of the file's header: every attribute but the tensors and the name."""
        return {name: getattr(self, name) for name in HEADER}

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the file by name."""
        return {
            "layer": self.layer.long(),
            "unit": self.unit.long(),
            "factor": self.factor.double(),
            "chosen_on": self.chosen_on.long(),
            "chosen_against": self.chosen_against.long(),
        }

    def equals(self, other: EditPlan) -> bool:
        """Return whether ``other`` is the same plan, except for its name."""
        mine, theirs = self.tensors(), other.tensors()
        return self.header() == other.header() and all(torch.equal(mine[name], theirs[name]) for name in mine)

    def save(self, path: str | Path) -> None:
        """Write the plan to a safetensors file. Raises: UsageError where the folder cannot be written."""
        write_tensors(Path(path), self.tensors(), SCHEMA, self.header())

    @classmethod
    def load(cls, path: str | Path) -> EditPlan:
        """Read a plan from a file that `save` wrote. Raises: InputFileError where it is missing or damaged."""
        tensors, header = read_tensors(Path(path), SCHEMA)
        try:
            entries: dict[str, Any] = {**_checked_tensors(tensors), **_checked_header(header)}
            plan = cls(**entries, name=Path(path).stem)
            plan.check()
        except (UsageError, ValueError) as error:
            raise InputFileError(
                f"expected a whole edit ({SCHEMA}) in {path}, got a damaged one ({error}): make it again"
            ) from error
        return plan


def _checked_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # the first files of this format had no tensor of held-out ids
    tensors = {"chosen_against": _no_ids(), **tensors}
    kinds = {name: torch.float64 if name == "factor" else torch.int64 for name in TENSORS}
    found = {name: tensor.dtype for name, tensor in tensors.items() if tensor.ndim == 1}
    if found != kinds:
        raise ValueError(f"tensors {', '.join(sorted(tensors))}")
    return tensors


def _checked_header(header: Mapping[str, Any]) -> dict[str, Any]:
    wrong = [name for name, kind in HEADER.items() if type(header.get(name)) is not kind]
    if wrong:
        raise ValueError(f"no proper {', '.join(wrong)} in the header")
    return {name: header[name] for name in HEADER}


def _check_unedited(model: Model) -> None:
    if model.edits:
        raise UsageError(
            f"expected a model without edits, got one with {len(model.edits)}: undo them first, or scale more units "
            "with scale_units"
        )


def edit_path(folder: RunFolder, name: str) -> Path:
    """Return the path of the edit called ``name`` in a run. Raises: UsageError where the name does not suit a file."""
    if not NAME.fullmatch(name):
        raise UsageError(f"expected a name of letters, digits, dots, dashes and underscores, got {name!r}: rename it")
    return folder.edits_folder / f"{name}.safetensors"


def load_edit(folder: RunFolder, name: str) -> EditPlan:
    """Read an edit plan: the one called ``name`` in a run, or any file where ``name`` is a path.

    Raises: UsageError where the run has no edit of that name; InputFileError where the file is missing or damaged.
    """
    if "/" in name or name.endswith(".safetensors"):
        return EditPlan.load(name)
    path = edit_path(folder, name)
    if not path.is_file():
        known = sorted(file.stem for file in folder.edits_folder.glob("*.safetensors"))
        raise UsageError(
            f"expected an edit of {folder.path} ({', '.join(known) or 'it has none'}), got {name!r}: make one with "
            "`fastmem mitigate`, or give a file"
        )
    return EditPlan.load(path)
