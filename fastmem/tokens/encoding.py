"""From images to tokens: decoded, cropped and encoded, or taken from the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmem.data.decoding import DamagedImage, Skipped
from fastmem.data.loading import Batch, ViewReader, load, load_views
from fastmem.data.manifest import Manifest
from fastmem.data.sources import ImageSource
from fastmem.data.views import Views, to_unit_range
from fastmem.errors import InputFileError, UsageError
from fastmem.models.model import Model
from fastmem.tokens.cache import SHARD_IMAGES, Rows, TokenCache

Note = Callable[[str], None]


class TokenBatch(NamedTuple):
    """One batch of images that could be read: manifest positions int64 [n]; tokens int64 [n,V,T] on the model's device;
    skipped: the batch's images that could not be read, in order."""

    positions: np.ndarray
    tokens: Tensor
    skipped: list[Skipped]


def tokens_of(
    model: Model,
    source: ImageSource,
    manifest: Manifest,
    batches: Iterable[np.ndarray | Sequence[int]],
    recipe: Views,
    cache: TokenCache | None = None,
    *,
    keep: bool = True,
    workers: int | None = None,
    note: Note = lambda sentence: None,
) -> Iterator[TokenBatch]:
    """Tokens of the given batches of manifest positions, one `TokenBatch` for each, in their order.

    A batch is taken from the cache only as a whole, so that what is encoded, is encoded together with the images that
    it would be encoded with if there were no cache: for equal batches both give the same bits.

    batches: positions, integers [n], for each batch; cache: None encodes everything; keep: False only reads it;
    workers: as in ``load_views``; note: is told of a damaged shard, and when the cache cannot be written.

    Raises: as ``load_views``.
    """
    if cache is None:
        loaded = load_views(source, manifest, batches, recipe, workers)
        return (TokenBatch(b.positions, encode(model, b.views), b.skipped) for b in loaded)
    reader = _TokenReader(source, manifest, recipe, cache)
    return _through_cache(model, reader, load(reader, batches, workers), keep, note)


def encode(model: Model, views: Tensor) -> Tensor:
    """Tokens int64 [n,V,T] of views uint8 [n,V,S,S,3], on the model's device."""
    if not len(views):
        return torch.empty(*views.shape[:2], model.num_tokens, dtype=torch.int64, device=model.device)
    return model.tokenize(to_unit_range(views.flatten(0, 1).to(model.device))).unflatten(0, views.shape[:2])


@dataclass(frozen=True, eq=False)
class _Read:
    """What a worker hands over: a batch with its views, or with ``tokens`` [n,V,T] in their place where the cache has
    all of them; the content's hash by position; what was wrong with a shard."""

    batch: Batch
    tokens: Tensor | None
    contents: dict[int, bytes]
    damaged: list[str]


class _TokenReader(ViewReader):
    """Batches by their manifest positions, as tokens where the cache has them and else as views."""

    def __init__(self, source: ImageSource, manifest: Manifest, recipe: Views, cache: TokenCache) -> None:
        super().__init__(source, manifest, recipe)
        self.cache = cache
        self.units = manifest.work_units(SHARD_IMAGES)
        self.starts = np.array([unit.start for unit in self.units])
        # the batches of a slice follow one another
        self.last: tuple[int, Rows] = (-1, {})

    def unit_of(self, position: int) -> int:
        """Number of the slice that a manifest position lies in."""
        return int(np.searchsorted(self.starts, position, side="right")) - 1

    def ids_of(self, unit: int) -> np.ndarray:
        """Image ids of a slice, int64 [n]."""
        return self.manifest.ids[self.units[unit].start : self.units[unit].stop]

    def read(self, positions: np.ndarray) -> _Read:
        damaged: list[str] = []
        contents = self._contents(positions.tolist())
        known = {p: found for p in contents if (found := self._known(p, contents[p], damaged)) is not None}
        unknown = np.array([p for p in positions.tolist() if p not in known], dtype=np.int64)
        batch = self.cut(unknown)
        if known and not len(batch.positions):
            # what is not known cannot be read, now as before
            kept = [p for p in positions.tolist() if p in known]
            batch = Batch(np.array(kept, dtype=np.int64), batch.views, batch.skipped)
            return _Read(batch, torch.stack([known[p] for p in kept]), contents, damaged)
        return _Read(self.cut(positions) if known else batch, None, contents, damaged)

    def _contents(self, positions: list[int]) -> dict[int, bytes]:
        found = {}
        for position in positions:
            try:
                found[position] = self.source.digest(int(self.manifest.index[position]))
            except DamagedImage:
                # reading it as a picture says what is wrong with it
                continue
        return found

    def _known(self, position: int, content: bytes, damaged: list[str]) -> Tensor | None:
        unit = self.unit_of(position)
        if self.last[0] != unit:
            try:
                self.last = unit, self.cache.read(self.recipe, self.ids_of(unit))
            except InputFileError as error:
                damaged.append(str(error))
                self.last = unit, {}
        was, tokens = self.last[1].get(int(self.manifest.ids[position]), (b"", None))
        return tokens if was == content else None


def _through_cache(
    model: Model, reader: _TokenReader, loaded: Iterable[_Read], keep: bool, note: Note
) -> Iterator[TokenBatch]:
    writer, told = _Writer(reader, note), set()
    try:
        for read in loaded:
            for sentence in read.damaged:
                if sentence not in told:
                    note(f"{sentence}: these images are encoded again")
                    told.add(sentence)
            tokens = read.tokens
            if tokens is None:
                tokens = encode(model, read.batch.views)
                if keep:
                    writer.add(read.batch.positions, read.contents, tokens.cpu())
            yield TokenBatch(read.batch.positions, tokens.to(model.device, torch.int64), read.batch.skipped)
    finally:
        writer.flush()


class _Writer:
    """Gathers the tokens of a slice until the batches have left it."""

    def __init__(self, reader: _TokenReader, note: Note) -> None:
        self.reader, self.note = reader, note
        self.pending: dict[int, dict[int, tuple[bytes, Tensor]]] = {}
        self.works = True

    def add(self, positions: np.ndarray, contents: dict[int, bytes], tokens: Tensor) -> None:
        """Take a batch's tokens [n,V,T]; slices that it has no part of are written."""
        units = [self.reader.unit_of(p) for p in positions.tolist()]
        self.flush(keep=units)
        for position, unit, row in zip(positions.tolist(), units, tokens, strict=True):
            if position in contents:
                image = int(self.reader.manifest.ids[position])
                self.pending.setdefault(unit, {})[image] = (contents[position], row)

    def flush(self, keep: Iterable[int] = ()) -> None:
        """Write all slices but those."""
        for unit in self.pending.keys() - set(keep):
            rows = self.pending.pop(unit)
            if not self.works:
                continue
            try:
                self.reader.cache.write(self.reader.recipe, self.reader.ids_of(unit), rows)
            except (UsageError, OSError) as error:
                self.works = False
                self.note(f"tokens are no longer kept for the next pass: {error}")
