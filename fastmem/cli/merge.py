"""``fastmem merge``."""

from __future__ import annotations

import click

from fastmem.cli.command import command as make_command
from fastmem.cli.command import option
from fastmem.cli.options import JSON
from fastmem.cli.progress import terminal_reporter
from fastmem.cli.score import RESULT, print_score
from fastmem.stages.merge import merge


@make_command(
    "merge", "merge runs/part-1 runs/part-2 runs/part-3 --out runs/whole", "merge runs/part-* --out runs/whole"
)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@option("--out", RESULT, "Folder of the merged run, which is new.", required=True, metavar="RUN")
@JSON
def command(runs: tuple[str, ...], out: str, as_json: bool) -> None:
    """Makes one run of several: all shards of a job, or runs over different images with equal model and settings.

    The merged run is as one that was scored in one piece, for all commands that take --run. Their order changes
    nothing, and a shard that is missing, given twice, unfinished or of other settings is named.
    """
    with terminal_reporter() as reporter:
        found = merge(runs, out, reporter=reporter)
    print_score(found.document, found.findings, as_json)
