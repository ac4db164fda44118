"""``fastmem fetch``."""

from __future__ import annotations

import click

from fastmem.cli.options import JSON, MODEL, print_json, say
from fastmem.models.fetch import fetch
from fastmem.models.registry import find_entry


@click.command("fetch")
@MODEL
@JSON
def command(model: str, as_json: bool) -> None:
    """Downloads the official files into FASTMEM_HOME, checks them, or says where to put them."""
    paths = fetch(find_entry(model), say)
    if as_json:
        print_json({"model": model, "files": [str(path) for path in paths]})
