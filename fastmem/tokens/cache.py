"""A cache of image tokens on disk, so that a second pass over the same images need not decode, crop and encode them.

The cache is a folder of shard files. A shard holds the tokens that one view recipe gives for a slice of a manifest with
images of one class. The name of a shard is a hash of the image ids and of everything else that tokens depend on: the
tokenizer's weights, the recipe, the kind of device and the versions of libraries. Every row holds a hash of its image's
content, so an image whose file has changed is encoded again. Shards are written completely or not at all. Each holds a
check sum; a damaged shard is reported and made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from fastmem.data.manifest import Manifest
from fastmem.data.sources import DIGEST_BYTES
from fastmem.data.views import Joined, Views
from fastmem.errors import InputFileError, UsageError
from fastmem.files import check_tensors, read_tensors, write_tensors
from fastmem.home import can_keep, home
from fastmem.models.model import Model
from fastmem.reporter import SILENT

SCHEMA = "fastmem.tokens/3"
SHARD_IMAGES = 64
# another version of these libraries may decode, resize or encode to slightly different values
LIBRARIES = ("pillow", "torch", "torchvision")
# words in place of a folder: the one in FASTMEM_HOME, and no cache
AUTO, OFF = "auto", "off"

# for each image id a hash of the image's content, and its tokens, int16 or int32 [V,T]
Rows = Mapping[int, tuple[bytes, Tensor]]


class ShardShape(TypedDict):
    """The header of a shard, which holds its own name."""

    file: str


@dataclass(frozen=True)
class TokenCache:
    """A cache of the tokens of one tokenizer; it can be pickled, so that worker processes can read it.

    Attributes:
        folder: folder of the shard files.
        context: JSON text of everything that tokens depend on, besides the image, its id and the recipe.
        num_tokens: tokens of one view, T.
        vocabulary: number of different tokens; where all fit into int16 that is used, else int32.
    """

    folder: Path
    context: str
    num_tokens: int
    vocabulary: int

    @classmethod
    def open(
        cls, where: str | os.PathLike[str] | None, model: Model, note: Callable[[str], None] = SILENT.note
    ) -> TokenCache | None:
        """Return the cache of a model's tokens in the folder ``where``, or None where there is to be no cache.

        "auto" stands for the folder ``tokens`` in ``FASTMEM_HOME``, or no cache where no folder can be made or written
        there, which ``note`` is told; "off" and None stand for no cache.

        Raises: UsageError where ``where`` is a file.
        """
        if where is None or where == OFF:
            return None
        if where == AUTO:
            try:
                folder = home() / "tokens"
            except UsageError as error:
                note(f"tokens are not kept for the next pass: {error}")
                return None
            if not can_keep(folder):
                note(f"tokens are not kept for the next pass: {folder} cannot be written, FASTMEM_HOME names another")
                return None
        else:
            folder = Path(where)
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"expected a folder for cached tokens, got the file {folder}: name another, auto or off")
        context = {
            "schema": SCHEMA,
            "tokenizer": model.tokenizer_hash(),
            "device": model.device.type,
            "libraries": {name: version(name) for name in LIBRARIES},
        }
        return cls(folder, json.dumps(context, sort_keys=True), model.num_tokens, model.vocabulary)

    @property
    def small(self) -> bool:
        """Whether every token fits into int16."""
        return self.vocabulary <= 2**15

    def shard_file(self, recipe: Views, ids: np.ndarray) -> Path:
        """Return the path of the shard for a slice's image ids, int64 [n], and a recipe that is not a `Joined` one."""
        digest = hashlib.sha256(json.dumps([self.context, recipe.name]).encode())
        digest.update(ids.astype("<i8").tobytes())
        name = digest.hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def read(self, recipe: Views, ids: np.ndarray) -> Rows:
        """Return the rows that the cache holds for a slice's image ids, int64 [n].

        For a `Joined` recipe the views of both recipes are put together, first those of the first one.

        Raises: InputFileError where a shard is damaged or is another one's.
        """
        first, *others = (self._read_shard(part, ids) for part in parts_of(recipe))
        for other in others:
            # an image that changed between the writing of the two shards is left out
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
        tensors, _ = read_tensors(file, SCHEMA, ShardShape, {"file": file.name})
        tokens = ("int16" if self.small else "int32", ("n", recipe.count, self.num_tokens))
        check_tensors(
            file, tensors, {"ids": ("int64", ("n",)), "contents": ("uint8", ("n", DIGEST_BYTES)), "tokens": tokens}
        )
        low, high = map(int, tensors["tokens"].aminmax()) if len(tensors["tokens"]) else (0, 0)
        if low < 0 or high >= self.vocabulary:
            raise InputFileError(f"expected tokens below {self.vocabulary} in {file}, got {low} to {high}")
        contents = tensors["contents"].numpy()
        return {i: (contents[row].tobytes(), tensors["tokens"][row]) for row, i in enumerate(tensors["ids"].tolist())}

    def write(self, recipe: Views, ids: np.ndarray, rows: Rows) -> None:
        """Add rows, with tokens [V,T], to the shards for a slice's image ids, int64 [n].

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
        # several processes may write one shard: each has a temporary file of its own, and the one renamed last is kept
        write_tensors(file, tensors, SCHEMA, {"file": file.name})

    def bytes_of(self, recipe: Views, images: int) -> int:
        """Return the number of bytes on disk that the tokens of ``images`` images take under a recipe."""
        row = recipe.count * self.num_tokens * (2 if self.small else 4)
        return images * (row + len(parts_of(recipe)) * (8 + DIGEST_BYTES))

    def stored(self, recipe: Views, manifest: Manifest) -> int:
        """Return the number of a manifest's images in slices whose shard files exist."""
        return sum(
            unit.stop - unit.start
            for unit in manifest.work_units(SHARD_IMAGES)
            if all(self.shard_file(part, manifest.ids[unit.start : unit.stop]).exists() for part in parts_of(recipe))
        )

    def free_bytes(self) -> int:
        """Return the free space, in bytes, of the disk that holds the folder."""
        place = self.folder.absolute()
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(place).free


def parts_of(recipe: Views) -> Sequence[Views]:
    """Return the recipes that a `Joined` recipe consists of; each has its own shards, which other passes can use."""
    return (*parts_of(recipe.first), *parts_of(recipe.second)) if isinstance(recipe, Joined) else (recipe,)
