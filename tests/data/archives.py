"""Images as folder, zip, tar and parquet, for tests."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow
from pyarrow import parquet


def tar_bytes(files: Mapping[str, bytes], tar_format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def write_tar(path: Path, files: Mapping[str, bytes], tar_format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(files, tar_format))
    return path


def write_parquet(
    path: Path,
    files: Mapping[str, bytes],
    classes: Sequence[str] | None = None,
    rows_per_group: int = 3,
    with_names: bool = True,
) -> Path:
    """Hugging Face's layout: an image is its bytes and its path, and a label is a position in ``classes``."""
    owners = [name.split("/", 1)[0] for name in files]
    classes = classes or sorted(set(owners))
    images = [{"bytes": content, "path": name.split("/", 1)[1]} for name, content in files.items()]
    table = pyarrow.table({"image": images, "label": [classes.index(owner) for owner in owners]})
    label = {"names": list(classes), "_type": "ClassLabel"} if with_names else {"dtype": "int64", "_type": "Value"}
    features = {"image": {"_type": "Image"}, "label": label}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, row_group_size=rows_per_group, write_page_checksum=True)
    return path


def write_zip(path: Path, files: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_folder(path: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path
