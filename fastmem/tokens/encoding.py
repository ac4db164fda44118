"""Compute the tokens of images, or take them from the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmem.data.decoding import DamagedImage, Skipped
from fastmem.data.loading import Batch, Flow, ViewReader, load, load_views
from fastmem.data.manifest import Manifest
from fastmem.data.sources import ImageSource
from fastmem.data.token_source import TEN, TokenSource
from fastmem.data.views import CenterCrop, TenCrop, Views, to_unit_range
from fastmem.errors import InputFileError, UsageError
from fastmem.models.model import Model
from fastmem.tokens.cache import SHARD_IMAGES, Rows, TokenCache, parts_of

# a function that is given one sentence for a person to read
Note = Callable[[str], None]


# stored tokens are compared with the model at the first of so many images that is not damaged
TRIED = 64


class TokenBatch(NamedTuple):
    """The tokens of one batch of images, without the images that could not be read.

    Attributes:
        positions: int64 [n], positions in the manifest of the images that could be read.
        tokens: int64 [n,V,T], on the model's device.
        skipped: the batch's images that could not be read, in order.
    """

    positions: np.ndarray
    tokens: Tensor
    skipped: list[Skipped]


def tokens_of(
    model: Model,
    source: ImageSource,
    manifest: Manifest,
    batches: Iterable[np.ndarray | Sequence[int]] | Flow,
    recipe: Views,
    cache: TokenCache | None = None,
    *,
    keep: bool = True,
    workers: int | None = None,
    note: Note = lambda sentence: None,
) -> Iterator[TokenBatch]:
    """Return the tokens of the given batches of manifest positions, one `TokenBatch` for each, in their order.

    A batch is taken from the cache only if the cache holds all of it; else all of it is encoded, as it would be without
    a cache. This way equal batches give exactly equal tokens with and without a cache.

    Args:
        model: the model whose tokenizer encodes.
        source: the images that the manifest was built from.
        manifest: the order of the images.
        batches: manifest positions, integers [n], for each batch.
        recipe: which crops to encode.
        cache: where tokens are looked up and kept; None for no cache.
        keep: whether tokens that were encoded are written to the cache.
        workers: number of processes that decode images; by default up to 4, as cores allow, and none
            for fewer than 256 images.
        note: is given a sentence where a shard of the cache is damaged or the cache cannot be written.

    Raises: UsageError where a position is out of range, the manifest is of another source, or ``workers`` is negative;
    FastmemError where a worker process died (raised while iterating).
    """
    if isinstance(source, TokenSource):
        stored = _StoredReader(source, manifest, recipe)
        stored.check(model, note)
        return (TokenBatch(p, t.to(model.device), s) for p, t, s in load(stored, batches, workers or 0))
    if cache is None:
        loaded = load_views(source, manifest, batches, recipe, workers)
        return (TokenBatch(b.positions, encode(model, b.views), b.skipped) for b in loaded)
    reader = _TokenReader(source, manifest, recipe, cache)
    return _through_cache(model, reader, load(reader, batches, workers), keep, note)


class _StoredReader(ViewReader):
    """Reads batches of tokens that were encoded before, and so are stored in place of the images."""

    def __init__(self, source: TokenSource, manifest: Manifest, recipe: Views) -> None:
        super().__init__(source, manifest, recipe)
        self.stored = source
        self.centre = 0
        self.chosen = [view for part in parts_of(recipe) for view in self._views_of(part)]

    def check(self, model: Model, note: Note) -> None:
        """Check the first tokens against the model. Raises: UsageError where they are another tokenizer's."""
        self.width, self.limit = model.num_tokens, model.vocabulary
        for index in range(min(len(self.stored), TRIED)):
            try:
                found = self.stored.tokens(index)
            except DamagedImage:
                continue
            if found.shape[1] != self.width or found.max() >= self.limit:
                raise UsageError(
                    f"expected {self.width} tokens below {self.limit} of every view for {model.name}, got "
                    f"{found.shape[1]} up to {found.max()} in {self.source.description}: give those of its tokenizer"
                )
            break
        if self.centre and any(isinstance(part, CenterCrop) for part in parts_of(self.recipe)):
            note("the centre view is that of the ten crops, because no other is stored as tokens")

    def _views_of(self, recipe: Views) -> Sequence[int]:
        """Return which of the stored views are those of a recipe."""
        views = self.stored.views
        if isinstance(recipe, TenCrop) and views >= TEN:
            return range(recipe.count)
        if isinstance(recipe, CenterCrop):
            # after the four corners, where there are ten crops
            self.centre = 4 if views >= TEN else 0
            return [self.centre]
        raise UsageError(
            f"expected tokens of the views {recipe.name}, got those of {views} crops in {self.source.description}: "
            "give the images, or --views center"
        )

    def read(self, positions: np.ndarray) -> tuple[np.ndarray, Tensor, list[Skipped]]:
        kept, rows, skipped = [], [], []
        for position in positions.tolist():
            try:
                found = self.stored.tokens(int(self.manifest.index[position]))
                if found.shape[1] != self.width or found.max() >= self.limit:
                    raise DamagedImage(
                        f"damaged tokens: {found.shape[1]} up to {found.max()}, not {self.width} below {self.limit}"
                    )
            except DamagedImage as error:
                skipped.append(Skipped(str(self.manifest.names[position]), error.reason))
            else:
                kept.append(position)
                rows.append(found[self.chosen])
        tokens = np.stack(rows) if rows else np.empty((0, len(self.chosen), self.width), np.int64)
        return np.array(kept, dtype=np.int64), torch.from_numpy(tokens), skipped


def encode(model: Model, views: Tensor) -> Tensor:
    """Return the tokens, int64 [n,V,T] on the model's device, of views uint8 [n,V,S,S,3] in [0,255]."""
    if not len(views):
        return torch.empty(*views.shape[:2], model.num_tokens, dtype=torch.int64, device=model.device)
    return model.tokenize(to_unit_range(views.flatten(0, 1).to(model.device))).unflatten(0, views.shape[:2])


@dataclass(frozen=True, eq=False)
class _Read:
    """A worker's result for a batch: its views, or its tokens [n,V,T] where the cache holds all of them."""

    batch: Batch
    tokens: Tensor | None
    # hash of each image's content, by manifest position
    contents: dict[int, bytes]
    # messages about damaged shards
    damaged: list[str]


class _TokenReader(ViewReader):
    """Reads batches in worker processes: as tokens where the cache holds the whole batch, else as views."""

    def __init__(self, source: ImageSource, manifest: Manifest, recipe: Views, cache: TokenCache) -> None:
        super().__init__(source, manifest, recipe)
        self.cache = cache
        self.units = manifest.work_units(SHARD_IMAGES)
        self.starts = np.array([unit.start for unit in self.units])
        # the rows of one slice are kept, because the batches of a slice are read one after the other
        self.last: tuple[int, Rows] = (-1, {})

    def unit_of(self, position: int) -> int:
        """Return the number of the slice that contains a manifest position."""
        return int(np.searchsorted(self.starts, position, side="right")) - 1

    def ids_of(self, unit: int) -> np.ndarray:
        """Return the image ids of a slice, int64 [n], by the number of the slice."""
        return self.manifest.ids[self.units[unit].start : self.units[unit].stop]

    def read(self, positions: np.ndarray) -> _Read:
        damaged: list[str] = []
        self.prepare(positions)
        contents = self._contents(positions.tolist())
        known = {p: found for p in contents if (found := self._known(p, contents[p], damaged)) is not None}
        unknown = np.array([p for p in positions.tolist() if p not in known], dtype=np.int64)
        batch = self.cut(unknown)
        if known and not len(batch.positions):
            # the cache holds every image of the batch that can be read
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
                # decoding the image later reports what is wrong with it
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
    """Collects the tokens of a slice, and writes them to the cache when the batches of that slice are over."""

    def __init__(self, reader: _TokenReader, note: Note) -> None:
        self.reader, self.note = reader, note
        self.pending: dict[int, dict[int, tuple[bytes, Tensor]]] = {}
        self.works = True

    def add(self, positions: np.ndarray, contents: dict[int, bytes], tokens: Tensor) -> None:
        """Collect the tokens [n,V,T] of a batch, and write the slices that contain none of its images."""
        units = [self.reader.unit_of(p) for p in positions.tolist()]
        self.flush(keep=units)
        for position, unit, row in zip(positions.tolist(), units, tokens, strict=True):
            if position in contents:
                image = int(self.reader.manifest.ids[position])
                self.pending.setdefault(unit, {})[image] = (contents[position], row)

    def flush(self, keep: Iterable[int] = ()) -> None:
        """Write all collected slices to the cache, except those with the numbers in ``keep``."""
        for unit in self.pending.keys() - set(keep):
            rows = self.pending.pop(unit)
            if not self.works:
                continue
            try:
                self.reader.cache.write(self.reader.recipe, self.reader.ids_of(unit), rows)
            except (UsageError, OSError) as error:
                self.works = False
                self.note(f"tokens are no longer kept for the next pass: {error}")
