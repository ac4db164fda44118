"""Write files so that none is ever half written, and read them with a check of their format."""

from __future__ import annotations

import json
import math
import os
import stat
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from fastmem.errors import InputFileError, UsageError

# ending of temporary files, and how much of the file's own name theirs begins with
PARTIAL, NAME_KEPT = ".partial", 20
# a temporary file that nothing has written to for this long is a dead process's
STALE_SECONDS = 3600.0
# the file that says which process works in a folder begins with this
OWNER_PREFIX = ".owner-"
# a JSON document is no larger than this
JSON_BYTES = 256 * 2**20
# a table has no more rows than this
TABLE_ROWS = 2**27
# bytes of a file that are read at a time for its check sum
CHECKED_AT_ONCE = 16 * 2**20


def _go_on(place: str) -> None:
    """Nothing happens between two steps of a write."""


# called before, within and after every change of a file, so that a test can end the process there
at_boundary: Callable[[str], None] = _go_on


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file completely or not at all.

    ``write`` is called with a temporary path in the same folder, and the file it makes there is renamed to ``path``.
    The temporary file is new and its name cannot be guessed, and a link at ``path`` is replaced and not followed.

    Raises: UsageError where the folder cannot be written.
    """
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        at_boundary(f"before {path.name}")
        handle, name = tempfile.mkstemp(PARTIAL, f".{path.name[:NAME_KEPT]}.", path.parent)
        os.close(handle)
        partial = Path(name)
        write(partial)
        _set_usual_permissions(partial)
        at_boundary(f"written {path.name}")
        os.replace(partial, path)
        at_boundary(f"after {path.name}")
    except OSError as error:
        raise UsageError(
            f"expected to be able to write {path}, got {error.strerror or error}: choose another --out or make room"
        ) from error
    finally:
        # after an error the temporary file may not exist, or something else may be in its place
        if partial is not None and partial.is_file():
            partial.unlink()


def _set_usual_permissions(path: Path) -> None:
    # a temporary file can be read by its owner alone
    umask = os.umask(0)
    os.umask(umask)
    # bucket and network file systems refuse this, and write files that others can read anyway
    with suppress(OSError):
        path.chmod(0o666 & ~umask)


def remove_leftovers(folder: Path, untouched: float = 0.0) -> None:
    """Remove the temporary files that killed processes left in a folder and below it, where they can be removed.

    Folders below it that have an owner of their own are left alone.

    Args:
        folder: the folder.
        untouched: for how many seconds a file must not have been written to. Only the owner of a folder may give less
            than ``STALE_SECONDS``, because others may be writing there.
    """
    latest = time.time() - untouched
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not any(Path(place, name).glob(f"{OWNER_PREFIX}*"))]
        for name in names:
            if name.startswith(".") and name.endswith(PARTIAL):
                # the folder may be one that can only be read
                with suppress(OSError):
                    if not untouched or Path(place, name).lstat().st_mtime < latest:
                        Path(place, name).unlink()


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON document to ``path``, completely or not at all.

    Raises: UsageError where the folder cannot be written.
    """
    write_atomically(path, lambda partial: partial.write_text(as_json_text(document) + "\n"))


def as_json_text(document: Mapping[str, Any]) -> str:
    """Return a document as JSON, with null for numbers that JSON does not have: NaN and infinity."""
    return json.dumps(_finite(document), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def read_bounded(path: Path, limit: int = JSON_BYTES) -> bytes:
    """Return the content of a regular file of at most ``limit`` bytes; a device or a pipe is never read.

    Raises: InputFileError where the file is missing, is not a regular file, is larger or cannot be read.
    """
    try:
        # a pipe would be waited for
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise InputFileError(f"expected a regular file at {path}, got a folder, device or pipe: check the path")
            content = file.read(limit + 1)
    except FileNotFoundError as error:
        raise InputFileError(f"expected a file {path}, got none: check the path") from error
    except (OSError, ValueError) as error:
        raise InputFileError(f"expected a file that can be read at {path}, got {error}: check the path") from error
    if len(content) > limit:
        raise InputFileError(f"expected at most {limit:,} bytes in {path}, got more: is it the right file?")
    return content


def read_json(
    path: Path, schema: str, shape: Any = dict[str, Any], owner: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Read a JSON document, and check its entry "schema" and the types of its entries.

    Args:
        path: the file.
        schema: what the entry "schema" must be.
        shape: a TypedDict or another type of which the document must be; more entries may stand beside its own.
        owner: entries that say which run the document belongs to; an entry of them that differs is refused.

    Raises: InputFileError where the file is missing, is not JSON, has another schema or type, or is another run's.
    """
    return _parse(read_bounded(path), path, schema, shape, owner)


def _parse(
    content: bytes | str, path: Path, schema: str, shape: Any, owner: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return a JSON document after all checks; arguments and errors are those of `read_json`."""
    try:
        document = msgspec.json.decode(content, type=dict[str, Any])
    except msgspec.ValidationError as error:
        raise InputFileError(f"expected a {schema} document in {path}, got something else ({error})") from error
    # a document that is nested too deep ends in a RecursionError
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputFileError(f"expected a JSON document in {path}, got a damaged file ({error})") from error
    if document.get("schema") != schema:
        found = document.get("schema") or "something else"
        raise InputFileError(f"expected a {schema} document in {path}, got {found}")
    try:
        msgspec.convert(document, shape)
    except (msgspec.ValidationError, RecursionError) as error:
        raise InputFileError(
            f"expected a whole {schema} document in {path}, got a damaged one ({error}): make it again"
        ) from error
    check_owner(document, path, owner)
    return document


def check_owner(found: Mapping[str, Any], path: Path, owner: Mapping[str, Any] | None) -> None:
    """Check that a file's entries say that it belongs where it was found.

    Args:
        found: entries of the file.
        path: the file, named in the message.
        owner: the entries that it must have; None checks nothing.

    Raises: InputFileError where one differs; it names both sides.
    """
    for key, value in (owner or {}).items():
        if found.get(key) != value:
            raise InputFileError(
                f"expected {key} {_short(value)} in {path}, got {_short(found.get(key))}: was the file copied from "
                "another run?"
            )


def _short(value: Any) -> str:
    return "none" if value is None else str(value)[:24]


def write_tensors(path: Path, tensors: Mapping[str, Any], schema: str, header: Mapping[str, Any]) -> None:
    """Write tensors to a safetensors file, completely or not at all.

    Args:
        path: the file.
        tensors: tensors of any shape and dtype, by name.
        schema: name and version of the file's format; `read_tensors` checks it.
        header: more values for the file's metadata, which JSON can hold.

    Raises: UsageError where the folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    document = _finite({"schema": schema, **header})
    # a single entry: the library writes several in any order, and equal contents must make equal files
    metadata = {"fastmem": json.dumps({**document, "checksum": _checksum(document, contiguous)})}

    def write(partial: Path) -> None:
        try:
            save_file(contiguous, partial, metadata)
        except SafetensorError as error:
            # the library has this error for a full disk
            raise OSError(" ".join(str(error).split())) from error

    write_atomically(path, write)


def _checksum(header: Mapping[str, Any], tensors: Mapping[str, Any]) -> str:
    """Return the CRC-32 of a header and its contiguous tensors: it finds damage, and takes a second for 2.5 GB."""
    import torch

    found = zlib.crc32(json.dumps(header).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), found)
        if tensor.numel():
            found = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), found)
    return f"{found:08x}"


def file_checksum(path: Path) -> str:
    """Return the CRC-32 of a file in hexadecimal. Raises: InputFileError where it cannot be read."""
    found = 0
    try:
        with open(path, "rb") as file:
            while part := file.read(CHECKED_AT_ONCE):
                found = zlib.crc32(part, found)
    except OSError as error:
        raise InputFileError(f"expected a file that can be read at {path}, got {error}: check the path") from error
    return f"{found:08x}"


def write_table(path: Path, columns: Mapping[str, Any] | Any, metadata: Mapping[str, str] | None = None) -> None:
    """Write a parquet file with check sums of its pages, completely or not at all.

    ``columns`` holds the columns by name or is a pyarrow table; ``metadata`` replaces the metadata of its schema.

    Raises: UsageError where the folder cannot be written.
    """
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table(columns) if isinstance(columns, Mapping) else columns
    if metadata is not None:
        table = table.replace_schema_metadata(metadata)
    write_atomically(path, lambda partial: parquet.write_table(table, partial, write_page_checksum=True))


def read_table(
    path: Path, what: str, columns: Mapping[str, str], owner: Mapping[str, str] | None = None, more: bool = False
) -> Any:
    """Return a parquet file as a pyarrow table.

    Args:
        path: the file.
        what: what it should be, such as "a manifest", for the message.
        columns: columns without empty places, by name with their types as arrow writes them, such as "int64".
        owner: entries of the file's metadata that say what it belongs to; one that differs is refused.
        more: whether other columns of the file are read as well, as they are.

    Raises: InputFileError where the file is missing, is damaged, has other columns or belongs to something else.
    """
    import pyarrow
    from pyarrow import parquet

    if not path.is_file():
        raise InputFileError(f"expected {what} in {path}, got no file: check the path")
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            rows, types = file.metadata.num_rows, {f.name: str(f.type) for f in file.schema_arrow}
            wrong = [f"{name} as {types.get(name)}" for name, kind in columns.items() if types.get(name) != kind]
            if wrong or not 0 <= rows <= TABLE_ROWS:
                raise ValueError(", ".join(wrong) or f"{rows} rows")
            table = file.read(columns=None if more else list(columns))
        # strings must be text, and all columns of one length
        table.validate(full=True)
        empty = [name for name in columns if table[name].null_count]
        if empty:
            raise ValueError(f"empty places in {', '.join(empty)}")
        metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    except (OSError, ValueError, TypeError, KeyError, OverflowError, MemoryError, pyarrow.ArrowException) as error:
        raise InputFileError(
            f"expected {what} in {path}, got a file that cannot be used ({error}): make it again"
        ) from error
    check_owner(metadata, path, owner)
    return table


def read_tensors(
    path: Path, schema: str, shape: Any = dict[str, Any], owner: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the tensors and the header of a file that `write_tensors` wrote with the same ``schema``.

    Args:
        path: the file.
        schema: name and version of the file's format.
        shape: the type of the header, as for `read_json`.
        owner: entries of the header that say which run the file belongs to, as for `read_json`.

    Raises: InputFileError where the file is missing, is damaged, has another schema or check sum, or belongs to
    another run.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InputFileError(f"expected a file {path}, got none: check the path")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("fastmem", "{}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, ValueError, RuntimeError, AttributeError, KeyError, SafetensorError) as error:
        raise InputFileError(f"expected a whole safetensors file in {path}, got a damaged one ({error})") from error
    header = _parse(text, path, schema, shape, owner)
    # files of earlier versions have none
    checksum = header.pop("checksum", None)
    if checksum is not None and checksum != _checksum(header, tensors):
        raise InputFileError(
            f"expected a whole {schema} file in {path}, got one whose check sum is wrong: make it again"
        )
    return tensors, header


def check_tensors(
    path: Path, tensors: Mapping[str, Any], expected: Mapping[str, tuple[str, tuple[int | str, ...]]]
) -> dict[str, int]:
    """Check names, dtypes and shapes of a file's tensors.

    Args:
        path: the file, named in the message.
        tensors: the tensors, by name; others than the expected ones may stand beside them.
        expected: by name, a dtype such as "float32" and a shape. A size is a number, or a letter that must stand for
            the same number everywhere.

    Returns: the numbers that the letters stand for.

    Raises: InputFileError where a tensor is missing or is another one.
    """
    sizes: dict[str, int] = {}
    for name, (dtype, shape) in expected.items():
        found = tensors.get(name)
        fits = found is not None and str(found.dtype) == f"torch.{dtype}" and found.ndim == len(shape)
        if fits and found is not None:
            fits = all(
                size == (want if isinstance(want, int) else sizes.setdefault(want, size))
                for size, want in zip(found.shape, shape, strict=True)
            )
        if not fits:
            got = "none" if found is None else f"{str(found.dtype).removeprefix('torch.')} {list(found.shape)}"
            wanted = f"{dtype} [{','.join(str(sizes.get(str(size), size)) for size in shape)}]"
            raise InputFileError(f"expected a tensor {name} of {wanted} in {path}, got {got}: make the file again")
    return sizes


def check_finite(path: Path, tensors: Mapping[str, Any], empty: Sequence[str] = ()) -> None:
    """Check that the numbers of a file's tensors are finite.

    Args:
        path: the file, named in the message.
        tensors: the tensors, by name.
        empty: endings of the names of those in which -infinity stands for an empty place.

    Raises: InputFileError where one holds NaN or infinity.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            # NaN would be both ends
            low, high = map(float, tensor.aminmax())
            allowed = (-math.inf,) if name.endswith(tuple(empty)) else ()
            if not all(math.isfinite(end) or end in allowed for end in (low, high)):
                raise InputFileError(f"expected finite numbers in {name} of {path}, got others: make the file again")
