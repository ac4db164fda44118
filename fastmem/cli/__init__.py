"""The command line: thin, lazy, one sentence per error.

Commands are listed by name and loaded when called, so ``fastmem --help`` loads neither torch nor triton.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module

import click

from fastmem import __version__
from fastmem.cli.streams import on_prepared_streams
from fastmem.errors import FastmemError
from fastmem.runs.interruption import INTERRUPTED, Stopped, stopping

# name -> (module, short help)
COMMANDS = {
    "models": ("fastmem.cli.models", "Lists the models, where their files are, and what is missing."),
    "fetch": ("fastmem.cli.fetch", "Downloads a model's official files and checks them."),
    "score": ("fastmem.cli.score", "Scores every unit of a model in one pass over its training images."),
    "index": ("fastmem.cli.index", "Embeds a training set and makes the index that extraction searches."),
    "extract": ("fastmem.cli.extract", "Pulls training images out of a scored model and judges what comes back."),
    "mitigate": ("fastmem.cli.mitigate", "Weakens the units that memorise: an edit file, or an edited checkpoint."),
    "evaluate": ("fastmem.cli.evaluate", "Measures image quality of a scored model, with or without an edit."),
    "sweep": ("fastmem.cli.sweep", "Measures edits of many sizes and selections beside their controls."),
    "merge": ("fastmem.cli.merge", "Makes one run of several: shards of a job, or runs over different images."),
    "status": ("fastmem.cli.status", "Says how far the work in a folder is, from another terminal too."),
    "report": ("fastmem.cli.report", "Writes one HTML page of everything that a run has found."),
    "demo": ("fastmem.cli.demo", "Goes through a whole study of an embedded model, to its page."),
    "doctor": ("fastmem.cli.doctor", "Says what this machine offers, which backend will run, and what is missing."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are looked up."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        found: click.Command = import_module(COMMANDS[cmd_name][0]).command
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            alike = get_close_matches(args[0], COMMANDS, 1)
            advice = f" Did you mean {alike[0]!r}?" if alike else f" There are {', '.join(COMMANDS)}."
            ctx.fail(f"No such command {args[0]!r}.{advice}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="fastmem")
def cli() -> None:
    """Finds memorised training images in image autoregressive models, and the single units that hold them."""


@on_prepared_streams
def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    0 done, 1 a bound was broken, 2 wrong usage, 3 a bad file, 130 interrupted, 143 or 129 stopped by SIGTERM or SIGHUP.
    """
    with stopping():
        code = _run(args)
    sys.exit(code)


def _run(args: Sequence[str] | None) -> int:
    try:
        code = cli.main(args, prog_name="fastmem", standalone_mode=False)
    except click.ClickException as error:
        error.show(sys.stderr)
        code = error.exit_code
    except FastmemError as error:
        _tell(str(error))
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt) as error:
        _tell("interrupted; what was finished is kept, continue with --resume")
        # click turns every interruption into an abort
        cause = error.__cause__ if isinstance(error, click.Abort) else error
        code = cause.exit_code if isinstance(cause, Stopped) else INTERRUPTED
    except Exception as error:
        # torch's error is known by name, so that this module need not load torch
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
            raise
        _tell(
            "expected the batch to fit into memory, got an out-of-memory error: choose a smaller --batch-size "
            "(what was finished is kept)"
        )
        code = 2
    return code if isinstance(code, int) else 0


def _tell(sentence: str) -> None:
    # click would write UTF-8 to a stream of another encoding that it opens itself
    click.echo(f"fastmem: {sentence}", sys.stderr)
