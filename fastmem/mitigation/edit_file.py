"""Edit plans: which units to scale and by how much, tied to the weights they were chosen on, as small files."""

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
# what a file's header says, with the types that it must have
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
    """Units to scale, each by its factor, and the weights that they were chosen on.

    Attributes:
        layer: block of each unit, int64 [n].
        unit: its number in the block, int64 [n].
        factor: what its row is multiplied by, float64 [n].
        model: name of the model.
        checkpoint: SHA-256 of the unedited generator.
        dtype: its floating type.
        layers: how many blocks it has.
        units: how many fc1 outputs every block has.
        by: the selection that the units were chosen by.
        fraction: the share of all units that was asked for.
        scope: "global" or "per-layer".
        merge: how scores of several segments became one.
        seed: of the selection.
        chosen_on: ids of the training images that the choice has seen as memorised, int64 [m]; empty unless the units
            were chosen by attribution. No result of the edit should be reported on them.
        chosen_against: ids of the held-out images that it has weighed them against, int64 [k]; likewise.
        name: what the file is called; empty for a plan that has none.
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
        """The plan to scale a selection's units of an unedited model.

        Args:
            model: the unedited model.
            selection: the units.
            factor: one number for all, or one for each unit, float [n].
            chosen_on: ids of the training images that the choice has seen, int64 [m].
            chosen_against: ids of the held-out images that it has seen, int64 [k].
            name: what the file will be called.

        Raises: UsageError for a model with edits, for units that it lacks, or a factor of another shape.
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
            *(_no_ids() if ids is None else ids.cpu() for ids in (chosen_on, chosen_against)),
            name=name,
        )
        plan.check()
        return plan

    def check(self) -> None:
        """Raises: UsageError where the units are not different ones of the model's, each with a finite factor."""
        check_units(self.layer, self.unit, self.layers, self.units)
        if self.factor.shape != self.layer.shape or not bool(self.factor.isfinite().all()):
            raise UsageError(
                f"expected a finite factor for each of {len(self)} units, got {list(self.factor.shape)} with "
                f"{int((~self.factor.isfinite()).sum())} that are not: give a number such as 0.5"
            )

    def apply(self, model: Model) -> Edit:
        """Scale the units of the plan in ``model``, in place.

        Raises: UsageError for a model with other weights than those that the units were chosen on.
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
        """What the file says besides the tensors."""
        return {name: getattr(self, name) for name in HEADER}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, as the file has them."""
        return {
            "layer": self.layer.long(),
            "unit": self.unit.long(),
            "factor": self.factor.double(),
            "chosen_on": self.chosen_on.long(),
            "chosen_against": self.chosen_against.long(),
        }

    def equals(self, other: EditPlan) -> bool:
        """Whether both say the same, whatever their files' names."""
        mine, theirs = self.tensors(), other.tensors()
        return self.header() == other.header() and all(torch.equal(mine[name], theirs[name]) for name in mine)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all. Raises: UsageError where the place cannot be written."""
        write_tensors(Path(path), self.tensors(), SCHEMA, self.header())

    @classmethod
    def load(cls, path: str | Path) -> EditPlan:
        """Read what ``save`` wrote. Raises: InputFileError for a missing, damaged or foreign file."""
        tensors, header = read_tensors(Path(path), SCHEMA)
        try:
            plan = cls(**_checked_tensors(tensors), **_checked_header(header), name=Path(path).stem)
            plan.check()
        except (UsageError, ValueError) as error:
            raise InputFileError(
                f"expected a whole edit ({SCHEMA}) in {path}, got a damaged one ({error}): make it again"
            ) from error
        return plan


def _checked_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # files of the first version have no held-out ids
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
    """Where the edit called ``name`` of a run lies. Raises: UsageError for a name that does not suit a file."""
    if not NAME.fullmatch(name):
        raise UsageError(f"expected a name of letters, digits, dots, dashes and underscores, got {name!r}: rename it")
    return folder.edits_folder / f"{name}.safetensors"


def load_edit(folder: RunFolder, name: str) -> EditPlan:
    """An edit of a run by its name, or any edit file by its path.

    Raises: UsageError for a name that the run does not have; InputFileError for a missing or damaged file.
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
