"""What every stage after scoring gives back: a document, and where the stage's files lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastmem.files import read_json


@dataclass(frozen=True, eq=False)
class StageResult:
    """What a stage found.

    Attributes:
        path: the stage's folder or file.
        document: what the command prints with ``--json``.
    """

    path: Path
    document: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """What the command prints with ``--json``."""
        return dict(self.document)


def read_document(file: Path, schema: str, shape: Any, owner: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stage's finished document from its file, without the schema, as ``--json`` prints it.

    Args:
        file: the document.
        schema: of the stage.
        shape: the types of its entries.
        owner: entries that say which run and which settings it is of.

    Raises: InputFileError for a file that is missing, damaged, of another schema or of another run.
    """
    return {key: value for key, value in read_json(file, schema, shape, owner).items() if key != "schema"}


def settings_document(settings: Any) -> dict[str, Any]:
    """A frozen dataclass of settings as JSON has it, with lists for tuples."""
    document: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    return document


def settings_digest(document: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits that tell settings from others, for names of files."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:8]
