"""Edit plans: small files that say which units to scale by which factor, for one particular set of weights."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec
import torch
from torch import Tensor

from fastmem.errors import InputFileError, UsageError
from fastmem.files import check_owner, check_tensors, read_tensors, write_tensors
from fastmem.mitigation.scaling import Edit, check_units, scale_units
from fastmem.models.model import Model
from fastmem.ranking.selection import Selection
from fastmem.runs.folder import RunFolder

SCHEMA = "fastmem.edit/1"
HEADER = ("model", "checkpoint", "dtype", "layers", "units", "by", "fraction", "scope", "merge", "seed")
TENSORS = {
    "layer": ("int64", ("n",)),
    "unit": ("int64", ("n",)),
    "factor": ("float64", ("n",)),
    "chosen_on": ("int64", ("m",)),
    "chosen_against": ("int64", ("k",)),
}
# file systems take up to 255 bytes, with the suffix
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")

Size = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]


class OwnerShape(TypedDict, total=False):
    """The run that an edit was made in, which edits of earlier versions do not name."""

    run: str


class HeaderShape(OwnerShape):
    """The header of an edit file."""

    model: str
    checkpoint: str
    dtype: str
    layers: Size
    units: Size
    by: str
    fraction: Annotated[float, msgspec.Meta(ge=0, le=1)]
    scope: str
    merge: str
    seed: int


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
        run: id of the run that it was made in; empty where nobody said.
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
    run: str = ""

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
        run: str = "",
    ) -> EditPlan:
        """Return a plan to scale the selected units of a model.

        Args:
            model: the unedited model.
            selection: the units to scale.
            factor: one number for all units, or one for each unit, float [n].
            chosen_on: ids of the training images that the selection used as memorised, int64 [m]; None for none.
            chosen_against: ids of the held-out images that the selection compared with them, int64 [k]; None for none.
            name: name of the file to be written, without its suffix.
            run: id of the run that the units were chosen in.

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
            run,
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
        """Return the entries of the file's header: every attribute but tensors, name and run."""
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
        """Return whether ``other`` is the same plan, except for its name and its run."""
        mine, theirs = self.tensors(), other.tensors()
        return self.header() == other.header() and all(torch.equal(mine[name], theirs[name]) for name in mine)

    def save(self, path: str | Path) -> None:
        """Write the plan to a safetensors file. Raises: UsageError where the folder cannot be written."""
        owner = {"run": self.run} if self.run else {}
        write_tensors(Path(path), self.tensors(), SCHEMA, {**self.header(), **owner})

    @classmethod
    def load(cls, path: str | Path, run: str = "") -> EditPlan:
        """Read a plan from a file that `save` wrote.

        Args:
            path: the file.
            run: id of the run that it must have been made in; empty takes one of any run.

        Raises: InputFileError where the file is missing or damaged, or belongs to another run.
        """
        path = Path(path)
        tensors, header = read_tensors(path, SCHEMA, HeaderShape)
        # edits of earlier versions name no run
        check_owner(header, path, {"run": run} if run and "run" in header else None)
        # the first files of this format had no tensor of held-out ids
        tensors = {"chosen_against": _no_ids(), **tensors}
        check_tensors(path, tensors, TENSORS)
        known = {name: tensors[name] for name in TENSORS} | {name: header[name] for name in HEADER}
        plan = cls(**known, name=path.stem, run=header.get("run", ""))
        try:
            plan.check()
        except UsageError as error:
            raise InputFileError(
                f"expected a whole edit ({SCHEMA}) in {path}, got a damaged one ({error}): make it again"
            ) from error
        return plan


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


def load_edit(folder: RunFolder, name: str, run: str = "") -> EditPlan:
    """Read an edit plan: the one called ``name`` in a run with the id ``run``, or any file where ``name`` is a path.

    Raises: UsageError where the run has no edit of that name; InputFileError where the file is missing or damaged, or
    an edit of another run lies there.
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
    return EditPlan.load(path, run)
