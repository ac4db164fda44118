"""``fastmem demo``."""

from __future__ import annotations

import click

from fastmem.cli.options import say
from fastmem.cli.score import command as score_command
from fastmem.demo.memorisation import dose_table, format_table
from fastmem.models.checkpoints import load_model

MODEL = "rar-tiny"


@click.command("demo")
@click.option("--full", is_flag=True, help="Also generate from prefixes: what comes back of each dose.")
@click.option("--out", metavar="RUN", help="Run folder.  [default: runs/MODEL-DATE]")
@click.pass_context
def command(ctx: click.Context, full: bool, out: str | None) -> None:
    """Scores the embedded model on the embedded images: a table, two pictures, and arrays in a run folder.

    The embedded RAR was trained on 823 of the 1,015 embedded pictures, some of them shown 2, 4, 8 or 16 times as often
    as the rest, so it memorises in graded doses.
    """
    ctx.invoke(score_command, model=MODEL, out=out)
    if full:
        say("\ngenerating from an eighth of the tokens of every image")
        click.echo(format_table(dose_table(load_model(MODEL))))
