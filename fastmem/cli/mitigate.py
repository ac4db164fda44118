"""``fastmem mitigate``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from fastmem.cli.extract import candidate_scores
from fastmem.cli.options import JSON, print_json, say
from fastmem.errors import UsageError
from fastmem.mitigation.attribution import (
    BATCH_IMAGES,
    HELDOUT_IMAGES,
    attribution,
    candidate_half,
    halves,
    select_by_attribution,
    spread,
)
from fastmem.mitigation.edit_file import EditPlan, edit_path
from fastmem.mitigation.edited_checkpoint import check_checkpoint_path, save_checkpoint
from fastmem.ranking.selection import SELECTIONS, Selection, select
from fastmem.stages.opened_run import CAUTION, OpenedRun, open_run, run_options

ATTRIBUTION = "attribution"
CHOICES = (*(by for by in SELECTIONS if by != "scores"), ATTRIBUTION)


@click.command("mitigate")
@run_options
@click.option("--top", default="5%", show_default=True, help="Share of all units: 5% or 0.05.")
@click.option("--by", default="unitmem", show_default=True, help=f"{', '.join(CHOICES)}.")
@click.option("--scope", default="global", show_default=True, help="global, or per-layer: every block alike.")
@click.option("--merge", default="max", show_default=True, help="A unit's score over segments: max, mean or sum.")
@click.option("--factor", type=float, default=0.5, show_default=True, help="What the fc1 rows are multiplied by.")
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of random, matched, and attribution's halves."
)
@click.option("--batch-size", type=click.IntRange(1), help=f"Images of a backward pass.  [default: {BATCH_IMAGES}]")
@click.option("--name", help="Name of the edit in the run.  [default: after selection, share and factor]")
@click.option("--save-checkpoint", metavar="FILE", help="Write the edited weights: .safetensors, .bin or .pth.")
@JSON
def command(
    run: str,
    data: str | None,
    heldout: str | None,
    classes: str | None,
    checkpoint: str | None,
    tokenizer: str | None,
    device: str,
    dtype: str | None,
    top: str,
    by: str,
    scope: str,
    merge: str,
    factor: float,
    seed: int,
    batch_size: int | None,
    name: str | None,
    save_checkpoint: str | None,
    as_json: bool,
) -> dict[str, Any]:
    """Weakens the units that memorise: their fc1 rows are multiplied by a factor, nothing else is touched.

    What is written is a small file in the run's edits folder; --edit NAME of the other commands scales the units when
    the model is loaded. With --save-checkpoint the edited weights are written too, in the official format.

    By attribution, units are chosen on one half of the extraction candidates and of the held-out images, and the file
    keeps which: report on the other halves.
    """
    fraction = parse_share(top)
    if by not in CHOICES:
        raise UsageError(f"expected a selection by one of {', '.join(CHOICES)}, got {by!r}")
    if by == ATTRIBUTION and merge != "max":
        raise UsageError(f"expected no --merge with attribution, which has no segments, got {merge}: leave it out")
    if by != ATTRIBUTION and batch_size is not None:
        raise UsageError(f"expected --batch-size with --by attribution only, got it with {by}: leave it out")
    target = None if save_checkpoint is None else Path(save_checkpoint)
    if target is not None:
        check_checkpoint_path(target)
    opened = open_run(
        run,
        data=data,
        heldout=heldout,
        classes=classes,
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
    )
    path = edit_path(opened.folder, name or default_name(by, fraction, scope, merge, factor, seed))
    if by == ATTRIBUTION:
        selection, *chosen = choose_by_attribution(opened, fraction, scope, seed, batch_size or BATCH_IMAGES)
    else:
        heldout_stats = opened.stats("heldout") if by == "gap" and "heldout" in opened.manifests else None
        selection = select(opened.stats(), fraction, by, scope, merge, seed, heldout=heldout_stats)
        chosen = []
    plan = EditPlan.of(opened.model, selection, factor, *chosen)
    keep(plan, path)
    if target is not None:
        write_checkpoint(opened, plan, target)
    document = describe(opened, plan, path, target)
    if as_json:
        print_json(document)
    else:
        print_edit(document)
    say(CAUTION)
    return document


def parse_share(text: str, option: str = "--top") -> float:
    """An option as a share of the units: "5%" or "0.05". Raises: UsageError for anything else."""
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(%?)", text.strip())
    share = float(found[1]) / (100 if found[2] else 1) if found else 0.0
    if not 0 < share <= 1:
        raise UsageError(f"expected {option} above 0 and up to 100 %, such as 5% or 0.05, got {text!r}")
    return share


def default_name(by: str, fraction: float, scope: str, merge: str, factor: float, seed: int) -> str:
    """The name of an edit after everything that it was chosen by and that is not usual."""
    parts = [by, f"{fraction:.6%}".rstrip("0%").rstrip(".") + "pct"]
    parts += [scope] * (scope != "global") + [merge] * (merge != "max")
    # a large exponent has a plus sign, which names do without
    parts += [f"x{factor:g}".replace("+", "")] + [f"seed{seed}"] * (seed != 0)
    return "-".join(parts)


def choose_by_attribution(
    opened: OpenedRun, fraction: float, scope: str, seed: int, batch_size: int
) -> tuple[Selection, Tensor, Tensor]:
    """The units of the highest attribution, and the ids of the candidates and of the held-out images it was found with.

    Raises: UsageError for a run without held-out images.
    """
    if "heldout" not in opened.sources:
        raise UsageError(
            "expected held-out images with --by attribution, got a run without: name them with --heldout PATH"
        )
    hits = candidate_scores(opened, None)["train"]
    ids = candidate_half(opened.manifests["train"], hits, seed)
    theirs = opened.manifests["heldout"]
    unseen = theirs.ids[halves(theirs.ids, theirs.labels, seed)]
    unseen = unseen[spread(len(unseen), HELDOUT_IMAGES)]
    say(f"attribution from one backward pass over {len(ids):,} candidates and {len(unseen):,} held-out images")
    scores = attribution(
        opened.model,
        opened.sources["train"],
        ids,
        opened.sources["heldout"],
        heldout_ids=unseen,
        batch_size=batch_size,
    )
    selection = select_by_attribution(opened.stats(), scores, fraction, scope, seed)
    return selection, torch.from_numpy(ids), torch.from_numpy(unseen)


def keep(plan: EditPlan, path: Path) -> None:
    """Write the edit's file. Raises: UsageError where another edit of that name is there."""
    if not path.exists():
        plan.save(path)
    elif not EditPlan.load(path).equals(plan):
        raise UsageError(f"expected a new name for the edit, got {path.stem}, which is another one: give it a --name")


def write_checkpoint(opened: OpenedRun, plan: EditPlan, path: Path) -> None:
    """Write the edited weights, and leave the model unedited."""
    with plan.apply(opened.model):
        save_checkpoint(opened.model, path)


def describe(opened: OpenedRun, plan: EditPlan, path: Path, checkpoint: Path | None) -> dict[str, Any]:
    """The document that ``--json`` prints."""
    per_layer = torch.bincount(plan.layer, minlength=plan.layers).tolist()
    return {
        "run": str(opened.folder.path),
        "edit": path.stem,
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
        "file": str(path),
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "caution": CAUTION,
    }


def print_edit(document: dict[str, Any]) -> None:
    """The edit in words."""
    click.echo(
        f"{document['model']}: the fc1 rows of {document['units_edited']:,} of {document['units']:,} units "
        f"({document['units_edited'] / document['units'] * 100:.3g} %) by {document['selection']}, in "
        f"{document['layers_edited']} of {len(document['units_per_layer'])} blocks, times {document['factor']:g}"
    )
    click.echo("units by block: " + " ".join(map(str, document["units_per_layer"])))
    if document["chosen_on"]:
        click.echo(
            f"chosen on {document['chosen_on']:,} candidates against {document['chosen_against']:,} held-out images, "
            "which the file names: report on the others"
        )
    click.echo(f"edit {document['edit']}: {document['file']}")
    if document["checkpoint"]:
        click.echo(document["checkpoint"])
