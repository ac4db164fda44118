"""``fastmem models``."""

from __future__ import annotations

import os
from typing import Any

from fastmem.cli.command import command as make_command
from fastmem.cli.options import JSON, print_json, tell
from fastmem.errors import UsageError
from fastmem.models.registry import OfficialFile, entries


@make_command("models", "models", "models --json")
@JSON
def command(as_json: bool) -> None:
    """Lists the models, where their files are, and what is missing."""
    rows: list[dict[str, Any]] = []
    for entry in entries().values():
        files = (entry.generator_file, entry.tokenizer_file)
        places = [_place(file) for file in files]
        rows.append(
            {
                "name": entry.name,
                "parameters": entry.parameters,
                "published_fid": entry.published_fid,
                "embedded": entry.embedded,
                "files": [place for place, _ in places],
                "sources": [file.repository or "in the package" for file in files],
                "missing": [place for place, found in places if not found],
            }
        )
    if as_json:
        print_json({"models": rows})
        return
    for row in rows:
        state = "ready" if not row["missing"] else f"missing; `fastmem fetch --model {row['name']}` gets it"
        tell(f"{row['name']:<10}{row['parameters']:>7}  {state}")
        for path, source in zip(row["files"], row["sources"], strict=True):
            mark = "-" if path in row["missing"] else "+"
            tell(f"           {mark} {path}  ({source})")


def _place(file: OfficialFile) -> tuple[str, bool]:
    """Where a file lies or has to be put, and whether it is there; its name where there is no folder for it."""
    try:
        return str(file.path), os.path.isfile(file.path)
    except UsageError:
        return file.name, False
