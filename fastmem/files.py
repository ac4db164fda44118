"""Write files so that none is ever half written, and read them with a check of their format."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastmem.errors import InputFileError, UsageError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file completely or not at all.

    ``write`` is called with a temporary path in the same folder, and the file it makes there is renamed to ``path``.

    Raises: UsageError where the folder cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        # some libraries make files that only their owner can read, so the usual permissions are set
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)
        os.replace(partial, path)
    except OSError as error:
        raise UsageError(
            f"expected to be able to write {path}, got {error.strerror or error}: choose another --out or make room"
        ) from error
    finally:
        # after an error the temporary file may not exist, or something else may be in its place
        if partial.is_file():
            partial.unlink()


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON document to ``path``, completely or not at all.

    Raises: UsageError where the folder cannot be written.
    """
    text = json.dumps(document, indent=2) + "\n"
    write_atomically(path, lambda partial: partial.write_text(text))


def read_json(path: Path, schema: str) -> dict[str, Any]:
    """Read a JSON document and check that its entry "schema" is ``schema``.

    Raises: InputFileError where the file is missing, is not JSON or has another schema.
    """
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputFileError(f"expected a file {path}, got none: check the path") from error
    except (OSError, ValueError) as error:
        raise InputFileError(f"expected a JSON document in {path}, got a damaged file ({error})") from error
    if not isinstance(document, dict) or document.get("schema") != schema:
        found = document.get("schema") if isinstance(document, dict) else None
        raise InputFileError(f"expected a {schema} document in {path}, got {found or 'something else'}")
    return document


def write_tensors(path: Path, tensors: Mapping[str, Any], schema: str, header: Mapping[str, Any]) -> None:
    """Write tensors to a safetensors file, completely or not at all.

    Args:
        path: the file.
        tensors: tensors of any shape and dtype, by name.
        schema: name and version of the file's format; `read_tensors` checks it.
        header: more values for the file's metadata, which JSON can hold.

    Raises: UsageError where the folder cannot be written.
    """
    from safetensors.torch import save_file

    # a single entry: the library writes several in any order, and equal contents must make equal files
    metadata = {"fastmem": json.dumps({"schema": schema, **header})}
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda partial: save_file(contiguous, partial, metadata))


def write_table(path: Path, columns: Mapping[str, Any] | Any, metadata: Mapping[str, str] | None = None) -> None:
    """Write a parquet file, completely or not at all.

    ``columns`` holds the columns by name or is a pyarrow table; ``metadata`` replaces the metadata of its schema.

    Raises: UsageError where the folder cannot be written.
    """
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table(columns) if isinstance(columns, Mapping) else columns
    if metadata is not None:
        table = table.replace_schema_metadata(metadata)
    write_atomically(path, lambda partial: parquet.write_table(table, partial))


def read_tensors(path: Path, schema: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the tensors and the header of a file that `write_tensors` wrote with the same ``schema``.

    Raises: InputFileError where the file is missing, is damaged or has another schema.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InputFileError(f"expected a file {path}, got none: check the path")
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("fastmem", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, ValueError, SafetensorError) as error:
        raise InputFileError(f"expected a whole safetensors file in {path}, got a damaged one ({error})") from error
    if header.get("schema") != schema:
        raise InputFileError(f"expected a {schema} file in {path}, got {header.get('schema', 'something else')}")
    return tensors, header
