"""Tokens that were encoded before, on disk: a second pass over the same images skips decoding, views and tokenizer.

A shard holds one recipe's tokens of one class-contiguous slice of a manifest. Its name is a hash of the slice's image
ids and of everything else that makes a token (tokenizer weights, recipe, kind of device, library versions); every
row carries the hash of its image's content, so a picture that changed under its name is encoded again. Shards are
written whole or not at all and carry a check sum: a damaged one is named, and made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from fastmem.data.manifest import Manifest
from fastmem.data.sources import DIGEST_BYTES
from fastmem.data.views import Joined, Views
from fastmem.errors import InputFileError, UsageError
from fastmem.files import read_tensors, write_tensors
from fastmem.home import home
from fastmem.models.model import Model

SCHEMA = "fastmem.tokens/2"
SHARD_IMAGES = 64
# libraries whose next version may decode, resize or encode to other bits
LIBRARIES = ("pillow", "torch", "torchvision")
AUTO, OFF = "auto", "off"

# tokens int16 or int32 [V,T] and the content's hash, by image id
Rows = Mapping[int, tuple[bytes, Tensor]]


@dataclass(frozen=True)
class TokenCache:
    """A folder of shards for one tokenizer; picklable, so that worker processes can read it too.

    context: everything that makes a token besides image, id and recipe; num_tokens: T; small: whether int16 holds every
    token.
    """

    folder: Path
    context: str
    num_tokens: int
    small: bool

    @classmethod
    def open(cls, where: str | os.PathLike[str] | None, model: Model) -> TokenCache | None:
        """The cache in a folder, in ``FASTMEM_HOME`` for "auto", or None for "off" and None.

        Raises: UsageError where a file is in the folder's place.
        """
        if where is None or where == OFF:
            return None
        folder = home() / "tokens" if where == AUTO else Path(where)
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"expected a folder for cached tokens, got the file {folder}: name another, auto or off")
        context = {
            "schema": SCHEMA,
            "tokenizer": model.tokenizer_hash(),
            "device": model.device.type,
            "libraries": {name: version(name) for name in LIBRARIES},
        }
        return cls(folder, json.dumps(context, sort_keys=True), model.num_tokens, model.vocabulary <= 2**15)

    def shard_file(self, recipe: Views, ids: np.ndarray) -> Path:
        """Where the tokens of a slice with image ids int64 [n] lie under a recipe that is not joined."""
        digest = hashlib.sha256(json.dumps([self.context, recipe.name]).encode())
        digest.update(ids.astype("<i8").tobytes())
        name = digest.hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def read(self, recipe: Views, ids: np.ndarray) -> Rows:
        """The rows of a slice that are there, with the views of a joined recipe on end.

        Raises: InputFileError for a damaged shard.
        """
        first, *others = (self._read_shard(part, ids) for part in parts_of(recipe))
        for other in others:
            # a row whose content changed between the two writes belongs to neither
            first = {
                i: (content, torch.cat([tokens, other[i][1]]))
                for i, (content, tokens) in first.items()
                if i in other and other[i][0] == content
            }
        return first

    def _read_shard(self, recipe: Views, ids: np.ndarray) -> Rows:
        file = self.shard_file(recipe, ids)
        if not file.exists():
            return {}
        tensors, header = read_tensors(file, SCHEMA)
        if header.get("file") != file.name or header.get("checksum") != _checksum(tensors):
            raise InputFileError(f"expected tokens with their own check sum in {file}, got others")
        contents = tensors["contents"].numpy()
        return {i: (contents[row].tobytes(), tensors["tokens"][row]) for row, i in enumerate(tensors["ids"].tolist())}

    def write(self, recipe: Views, ids: np.ndarray, rows: Rows) -> None:
        """Add rows, tokens [V,T], to the shards of a slice.

        Raises: UsageError where the folder cannot be written.
        """
        start = 0
        for part in parts_of(recipe):
            own = {i: (content, tokens[start : start + part.count]) for i, (content, tokens) in rows.items()}
            start += part.count
            try:
                before = self._read_shard(part, ids)
            except InputFileError:
                before = {}
            self._write_shard(part, ids, {**before, **own})

    def _write_shard(self, recipe: Views, ids: np.ndarray, rows: Rows) -> None:
        file = self.shard_file(recipe, ids)
        order = sorted(rows)
        contents = np.frombuffer(b"".join(rows[i][0] for i in order), dtype=np.uint8).reshape(-1, DIGEST_BYTES)
        tensors = {
            "ids": torch.tensor(order),
            "contents": torch.from_numpy(contents.copy()),
            "tokens": torch.stack([rows[i][1] for i in order]).to(torch.int16 if self.small else torch.int32),
        }
        # several may write one shard: each makes a file of its own, and the last to rename wins whole
        own = file.with_name(f"{uuid4().hex}-{file.name}")
        write_tensors(own, tensors, SCHEMA, {"file": file.name, "checksum": _checksum(tensors)})
        os.replace(own, file)

    def bytes_of(self, recipe: Views, images: int) -> int:
        """Bytes on disk of that many images' tokens."""
        row = recipe.count * self.num_tokens * (2 if self.small else 4)
        return images * (row + len(parts_of(recipe)) * (8 + DIGEST_BYTES))

    def stored(self, recipe: Views, manifest: Manifest) -> int:
        """How many of a manifest's images lie in slices that were written, by the files that are there."""
        return sum(
            unit.stop - unit.start
            for unit in manifest.work_units(SHARD_IMAGES)
            if all(self.shard_file(part, manifest.ids[unit.start : unit.stop]).exists() for part in parts_of(recipe))
        )

    def free_bytes(self) -> int:
        """Room on the disk that holds the folder."""
        place = self.folder.absolute()
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(place).free


def parts_of(recipe: Views) -> Sequence[Views]:
    """The recipes that are joined in one: each has shards of its own, for whoever wants one of them alone."""
    return (*parts_of(recipe.first), *parts_of(recipe.second)) if isinstance(recipe, Joined) else (recipe,)


def _checksum(tensors: Mapping[str, Any]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in ("ids", "contents", "tokens"):
        if name in tensors:
            digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
