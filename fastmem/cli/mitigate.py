"""``fastmem mitigate``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastmem.cli.command import FROM_0, FROM_1, option
from fastmem.cli.command import command as make_command
from fastmem.cli.options import JSON, WORK, RunOptions, parse_share, print_document, run_options, say, tell
from fastmem.cli.progress import terminal_reporter
from fastmem.mitigation.attribution import BATCH_IMAGES
from fastmem.stages.mitigate import CHOICES, MitigateSettings, describe_edit, mitigate
from fastmem.stages.opened_run import CAUTION

UNITS, THE_EDIT = "Which units", "The edit"


@make_command("mitigate", "mitigate --run runs/xxl --top 5%", "mitigate --run runs/xxl --by attribution --name mine")
@run_options
@option("--top", UNITS, "Share of all units, as 5% or 0.05.", default="5%")
@option("--by", UNITS, f"Selection: {', '.join(CHOICES)}.", default="unitmem")
@option("--scope", UNITS, "global, or per-layer for as many units in every block.", default="global")
@option("--merge", UNITS, "How scores of several segments become one: max, mean or sum.", default="max")
@option(
    "--seed",
    UNITS,
    "Seed of random and matched units, and of the halves that attribution sees.",
    type=FROM_0,
    default=0,
)
@option("--factor", THE_EDIT, "What the units' fc1 rows are multiplied by.", type=float, default=0.5)
@option("--name", THE_EDIT, "Name of the edit in the run.  [default: selection, share and factor]")
@option(
    ("--save-checkpoint", "save_to"),
    THE_EDIT,
    "Write the edited weights to a new file: .safetensors, .bin or .pth.",
    metavar="FILE",
)
@option("--batch-size", WORK, f"Images of one backward pass of attribution.  [default: {BATCH_IMAGES}]", type=FROM_1)
@JSON
def command(
    where: RunOptions,
    top: str,
    by: str,
    scope: str,
    merge: str,
    seed: int,
    factor: float,
    name: str | None,
    save_to: str | None,
    batch_size: int | None,
    as_json: bool,
) -> None:
    """Weakens the units that memorise: multiplies their fc1 rows by a factor and touches nothing else.

    Keeps a small file in the run's edits folder; the other commands make the edit when they get its name with --edit.
    With --save-checkpoint the edited weights are written too, in the official format. Attribution chooses units on one
    half of the extraction candidates and of the held-out images; report results on the other halves.
    """
    settings = MitigateSettings(parse_share(top), by, factor, scope, merge, seed, batch_size)
    with terminal_reporter() as reporter:
        run = where.open(reporter)
        plan = mitigate(run, name=name, save_to=save_to, reporter=reporter, **vars(settings))
    print_document(describe_edit(run, plan, save_to), as_json, print_edit)
    say(CAUTION)


def print_edit(document: Mapping[str, Any]) -> None:
    """The edit in words."""
    tell(
        f"{document['model']}: the fc1 rows of {document['units_edited']:,} of {document['units']:,} units "
        f"({document['units_edited'] / document['units'] * 100:.3g} %) by {document['selection']}, in "
        f"{document['layers_edited']} of {len(document['units_per_layer'])} blocks, times {document['factor']:g}"
    )
    tell("units by block: " + " ".join(map(str, document["units_per_layer"])))
    if document["chosen_on"]:
        tell(
            f"chosen on {document['chosen_on']:,} candidates against {document['chosen_against']:,} held-out images, "
            "which the file names: report on the others"
        )
    tell(f"edit {document['edit']}: {document['file']}")
    if document["checkpoint"]:
        tell(document["checkpoint"])
