"""``fastmem models``."""

from __future__ import annotations

from typing import Any

import click

from fastmem.cli.command import command as make_command
from fastmem.cli.options import JSON, print_json
from fastmem.models.registry import entries


@make_command("models", "models", "models --json")
@JSON
def command(as_json: bool) -> None:
    """Lists the models, where their files are, and what is missing."""
    rows: list[dict[str, Any]] = []
    for entry in entries().values():
        files = (entry.generator_file, entry.tokenizer_file)
        rows.append(
            {
                "name": entry.name,
                "parameters": entry.parameters,
                "published_fid": entry.published_fid,
                "embedded": entry.embedded,
                "files": [str(file.path) for file in files],
                "sources": [file.repository or "in the package" for file in files],
                "missing": [str(file.path) for file in files if not file.path.is_file()],
            }
        )
    if as_json:
        print_json({"models": rows})
        return
    for row in rows:
        state = "ready" if not row["missing"] else f"missing; `fastmem fetch --model {row['name']}` gets it"
        click.echo(f"{row['name']:<10}{row['parameters']:>7}  {state}")
        for path, source in zip(row["files"], row["sources"], strict=True):
            mark = "-" if path in row["missing"] else "+"
            click.echo(f"           {mark} {path}  ({source})")
