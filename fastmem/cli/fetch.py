"""``fastmem fetch``."""

from __future__ import annotations

from fastmem.cli.command import command as make_command
from fastmem.cli.options import JSON, model_option, print_json, say
from fastmem.models.fetch import fetch
from fastmem.models.registry import LARGE_EXAMPLE, find_entry


@make_command("fetch", f"fetch --model {LARGE_EXAMPLE}", f"fetch --model {LARGE_EXAMPLE} --json")
@model_option()
@JSON
def command(model: str, as_json: bool) -> None:
    """Downloads a model's official files into FASTMEM_HOME and checks them, or says where to put them."""
    paths = fetch(find_entry(model), say)
    if as_json:
        print_json({"model": model, "files": [str(path) for path in paths]})
