"""``fastmem status``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastmem.cli.command import command as make_command
from fastmem.cli.command import option
from fastmem.cli.options import JSON, THE_RUN, print_document, tell
from fastmem.reporter import duration
from fastmem.stages.status import INTERRUPTED, NOT_RUNNING, RUNNING, status


@make_command("status", "status --run runs/xxl", "status --run runs/xxl --json")
@option("--run", THE_RUN, "Folder of a run, of one of its stages, or of an index.", required=True, metavar="RUN")
@JSON
def command(run: str, as_json: bool) -> None:
    """Says how far the work in a folder is: what is done and left, how fast, and who does it.

    It can be asked while the work runs, in another terminal or on another machine that sees the folder. What runs below
    a run's folder, such as an extraction, is said too.
    """
    print_document(status(run).document, as_json, print_status)


def print_status(document: Mapping[str, Any]) -> None:
    """A line for each folder in which something was done."""
    for found in (document, *document["stages"]):
        if found["stage"] is not None:
            tell(_sentence(found))


def _sentence(found: Mapping[str, Any]) -> str:
    state = found["state"]
    parts = [f"{state} ({found['advice']})" if found["advice"] else state]
    if found["total"] is not None:
        left = f", {found['left']:,} left" if state != NOT_RUNNING and found["left"] else ""
        parts.append(f"{found['done']:,} of {found['total']:,} {found['things']}{left}")
        if state == RUNNING and found["per_second"] is not None:
            parts.append(f"{found['per_second']:.3g} {found['things']}/s, about {duration(found['seconds_left'])} left")
        if state == RUNNING and found["ranks"] > 1:
            parts.append(f"{found['ranks_alive']} of {found['ranks']} ranks alive")
        if found["skipped"]:
            parts.append(f"{found['skipped']:,} skipped")
    if found["owner"] is not None:
        parts.append(f"process {found['owner']['process']} on {found['owner']['host']} since {found['since']}")
    elif found["updated"] is not None:
        parts.append(f"last heard of {found['updated']}" if state == INTERRUPTED else found["updated"])
    if found["reason"]:
        parts.append(found["reason"])
    return f"{found['stage']} in {found['run']}: {', '.join(parts)}"
