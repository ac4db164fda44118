"""Mitigation as a stage: units of a scored run are chosen, and an edit that weakens them is kept in the run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmem.errors import UsageError
from fastmem.mitigation.attribution import (
    BATCH_IMAGES,
    HELDOUT_IMAGES,
    attribution,
    candidate_half,
    halves,
    select_by_attribution,
)
from fastmem.mitigation.edit_file import EditPlan, edit_path
from fastmem.mitigation.edited_checkpoint import check_checkpoint_path, save_checkpoint
from fastmem.ranking.selection import SELECTIONS, Selection, select
from fastmem.reporter import SILENT, Reporter
from fastmem.stages.extract import candidate_scores
from fastmem.stages.opened_run import CAUTION, OpenedRun
from fastmem.tokens.true_images import spread

ATTRIBUTION = "attribution"
CHOICES = (*(by for by in SELECTIONS if by != "scores"), ATTRIBUTION)


@dataclass(frozen=True)
class MitigateSettings:
    """How units are chosen and by how much they are weakened.

    Attributes:
        top: share of all units, in (0,1].
        by: the selection, one of ``CHOICES``.
        factor: what the fc1 rows of the units are multiplied by.
        scope: "global", or "per-layer" for as many units in every block.
        merge: how scores of several segments become one: "max", "mean" or "sum".
        seed: of random and matched units, and of the halves that attribution sees.
        batch_size: images of one backward pass of attribution; None takes the usual number.

    Raises: UsageError for an unknown selection, or an option that the selection has no use for.
    """

    top: float = 0.05
    by: str = "unitmem"
    factor: float = 0.5
    scope: str = "global"
    merge: str = "max"
    seed: int = 0
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.by not in CHOICES:
            raise UsageError(f"expected a selection by one of {', '.join(CHOICES)}, got {self.by!r}")
        if self.by == ATTRIBUTION and self.merge != "max":
            raise UsageError(
                f"expected no --merge with attribution, which has no segments, got {self.merge}: leave it out"
            )
        if self.by != ATTRIBUTION and self.batch_size is not None:
            raise UsageError(f"expected --batch-size with --by attribution only, got it with {self.by}: leave it out")

    @property
    def name(self) -> str:
        """A name for the edit, of everything that is not usual."""
        return default_name(self.by, self.top, self.scope, self.merge, self.factor, self.seed)


def mitigate(
    run: OpenedRun,
    top: float = 0.05,
    by: str = "unitmem",
    factor: float = 0.5,
    scope: str = "global",
    name: str | None = None,
    *,
    merge: str = "max",
    seed: int = 0,
    batch_size: int | None = None,
    save_to: str | os.PathLike[str] | None = None,
    reporter: Reporter = SILENT,
) -> EditPlan:
    """Choose the units of a scored run that memorise, and keep an edit in the run that multiplies their fc1 rows.

    The model itself stays as it is; the other stages make the edit while they work.

    Args:
        run: the run.
        top: share of all units, in (0,1].
        by: the selection: a ranking, a control, or "attribution", which chooses on one half of the extraction
            candidates and of the held-out images, and keeps in the edit which.
        factor: what the fc1 rows of the units are multiplied by.
        scope: "global", or "per-layer" for as many units in every block.
        name: of the edit; None makes one of the selection, the share and the factor.
        merge: how scores of several segments become one: "max", "mean" or "sum".
        seed: of random and matched units, and of the halves that attribution sees.
        batch_size: images of one backward pass of attribution; None for 8.
        save_to: file for the edited weights in the official format, .safetensors, .bin or .pth; None writes none.
        reporter: is told what attribution sees.

    Returns: the edit, whose ``name`` the other stages take.

    Raises: UsageError for options that do not fit, held-out images that are missing, a name that another edit of the
    run has, or a file that is there already; InputFileError for a missing or damaged file.
    """
    settings = MitigateSettings(top, by, factor, scope, merge, seed, batch_size)
    target = None if save_to is None else Path(save_to)
    if target is not None:
        check_checkpoint_path(target)
    path = edit_path(run.folder, name or settings.name)
    if by == ATTRIBUTION:
        selection, chosen_on, chosen_against = _choose_by_attribution(run, settings, reporter)
        plan = EditPlan.of(run.model, selection, factor, chosen_on, chosen_against, path.stem, run.id)
    else:
        selection = select(run.train, top, by, scope, merge, seed, heldout=run.heldout if by == "gap" else None)
        plan = EditPlan.of(run.model, selection, factor, name=path.stem, run=run.id)
    keep_edit(plan, path)
    if target is not None:
        with plan.apply(run.model):
            save_checkpoint(run.model, target)
    return plan


def default_name(by: str, fraction: float, scope: str, merge: str, factor: float, seed: int) -> str:
    """The name of an edit, of everything that it was chosen by and that is not usual.

    Args:
        by: the selection.
        fraction: share of all units.
        scope: "global" or "per-layer".
        merge: how scores of several segments became one.
        factor: of the units' rows.
        seed: of the selection.
    """
    parts = [by, f"{fraction:.6%}".rstrip("0%").rstrip(".") + "pct"]
    parts += [scope] * (scope != "global") + [merge] * (merge != "max")
    # a large exponent has a plus sign, which names do without
    parts += [f"x{factor:g}".replace("+", "")] + [f"seed{seed}"] * (seed != 0)
    return "-".join(parts)


def _choose_by_attribution(
    run: OpenedRun, settings: MitigateSettings, reporter: Reporter
) -> tuple[Selection, Tensor, Tensor]:
    """The units of the highest attribution, and the ids of the candidates and held-out images that it has seen."""
    if "heldout" not in run.sources:
        raise UsageError(
            "expected held-out images with --by attribution, got a run without: name them with --heldout PATH"
        )
    hits = candidate_scores(run, reporter=reporter)["train"]
    ids = candidate_half(run.manifests["train"], hits, settings.seed)
    theirs = run.manifests["heldout"]
    unseen = theirs.ids[halves(theirs.ids, theirs.labels, settings.seed)]
    unseen = unseen[spread(len(unseen), HELDOUT_IMAGES)]
    reporter.note(
        f"attribution from one backward pass over {len(ids):,} candidates and {len(unseen):,} held-out images"
    )
    scores = attribution(
        run.model,
        run.sources["train"],
        ids,
        run.sources["heldout"],
        heldout_ids=unseen,
        batch_size=settings.batch_size or BATCH_IMAGES,
        cache=run.cache,
    )
    selection = select_by_attribution(run.train, scores, settings.top, settings.scope, settings.seed)
    return selection, torch.from_numpy(ids), torch.from_numpy(unseen)


def keep_edit(plan: EditPlan, path: Path) -> None:
    """Write an edit's file.

    Raises: UsageError where another edit of that name is there; InputFileError where one of another run is.
    """
    if not path.exists():
        plan.save(path)
    elif not EditPlan.load(path, plan.run).equals(plan):
        raise UsageError(f"expected a new name for the edit, got {path.stem}, which is another one: give it a --name")


def describe_edit(run: OpenedRun, plan: EditPlan, checkpoint: str | None = None) -> dict[str, Any]:
    """What ``fastmem mitigate --json`` prints of an edit of a run; ``checkpoint`` is where its weights were written."""
    per_layer = torch.bincount(plan.layer, minlength=plan.layers).tolist()
    return {
        "run": str(run.path),
        "edit": plan.name,
        "model": plan.model,
        "selection": plan.by,
        "fraction": plan.fraction,
        "factor": float(plan.factor[0]),
        "scope": plan.scope,
        "merge": plan.merge,
        "seed": plan.seed,
        "units_edited": len(plan),
        "units": plan.layers * plan.units,
        "layers_edited": sum(count > 0 for count in per_layer),
        "units_per_layer": per_layer,
        "chosen_on": len(plan.chosen_on),
        "chosen_against": len(plan.chosen_against),
        "file": str(edit_path(run.folder, plan.name)),
        "checkpoint": checkpoint,
        "caution": CAUTION,
    }
