"""Tables as aligned text, which is also valid Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from fastmem.reporter import printable


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table with right-aligned columns from the cells of its ``head`` and of its ``rows``."""
    cells = [[printable(cell).replace("|", r"\|") for cell in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
