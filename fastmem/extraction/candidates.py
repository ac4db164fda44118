"""Which images are tried: those that the model predicts best under teacher forcing, and their tokens.

Source: arXiv 2502.02514, section 5 (candidates by the share of right arg max tokens, the highest of every class).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastmem.data.loading import load_views
from fastmem.data.manifest import Manifest
from fastmem.data.sources import ImageSource
from fastmem.errors import UsageError
from fastmem.files import read_tensors, write_tensors
from fastmem.models.model import Model, to_unit_range
from fastmem.runs.folder import Interruption
from fastmem.scoring.image_losses import ImageLosses
from fastmem.tokens.cache import TokenCache
from fastmem.tokens.encoding import tokens_of

TOP_PER_CLASS = 5
BATCH_IMAGES = 16
SAVE_SECONDS = 30.0
STATE_SCHEMA = "fastmem.losses-state/1"


@dataclass(frozen=True, eq=False)
class Targets:
    """Images that somebody tries to pull out of a model, ordered by label and id.

    ids, labels: int64 [N]; names: CLASS/NAME; scores: candidate scores float32 [N]; tokens: int64 [N,T] of the centre
    view.
    """

    ids: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]
    scores: np.ndarray
    tokens: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, chosen: np.ndarray) -> Targets:
        """Some of them, by positions or by a mask bool [N]."""
        at = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
        names = tuple(self.names[i] for i in at)
        return Targets(self.ids[at], self.labels[at], names, self.scores[at], self.tokens[torch.from_numpy(at)])


def highest_per_class(manifest: Manifest, scores: np.ndarray, count: int = TOP_PER_CLASS) -> np.ndarray:
    """Positions of the ``count`` highest scores of every class, ascending; ties by the smallest id, NaN never.

    scores: float [N] in manifest order, NaN for images that could not be read or are not to be taken.

    Raises: UsageError for another length, or a count below 1.
    """
    if len(scores) != len(manifest) or count < 1:
        raise UsageError(
            f"expected a score for each of {len(manifest)} images and at least 1 of every class, got {len(scores)} "
            f"scores and {count}"
        )
    chosen = []
    for unit in manifest.work_units():
        at = np.arange(unit.start, unit.stop)
        at = at[~np.isnan(scores[at])]
        chosen.append(np.sort(at[np.lexsort((manifest.ids[at], -scores[at]))[:count]]))
    return np.concatenate([np.empty(0, np.int64), *chosen])


def find_targets(
    model: Model,
    source: ImageSource,
    manifest: Manifest,
    scores: np.ndarray,
    positions: np.ndarray,
    workers: int | None = None,
    with_pictures: bool = True,
) -> tuple[Targets, Tensor]:
    """The images at ``positions`` of a manifest with the tokens of their centre views, and float32 pictures of these
    views [N,3,S,S] in [0,1]; [0,3,S,S] where they are not asked for, which thousands of large ones should not be.

    Images that cannot be read are left out. Raises: as ``load_views``.
    """
    batches = np.array_split(positions, max(1, -(-len(positions) // BATCH_IMAGES)))
    kept, tokens, pictures = [], [], []
    for batch in load_views(source, manifest, batches, model.view_recipe("center"), workers):
        if len(batch.positions):
            images = to_unit_range(batch.views[:, 0])
            kept.append(batch.positions)
            tokens.append(model.tokenize(images).cpu())
            pictures += [images] * with_pictures
    at = np.concatenate([np.empty(0, np.int64), *kept])
    size = model.image_size
    targets = Targets(
        manifest.ids[at],
        manifest.labels[at],
        tuple(manifest.names[at].tolist()),
        np.asarray(scores[at], dtype=np.float32),
        torch.cat([torch.empty(0, model.num_tokens, dtype=torch.int64), *tokens]),
    )
    return targets, torch.cat([torch.empty(0, 3, size, size), *pictures])


def collect_losses(
    model: Model,
    source: ImageSource,
    manifest: Manifest,
    file: Path | None,
    *,
    batch_size: int = BATCH_IMAGES,
    workers: int | None = None,
    cache: TokenCache | None = None,
    advance: Callable[[int], None] = lambda images: None,
) -> ImageLosses:
    """Loss and candidate score of every image's centre view, where the scoring pass kept none.

    file: where they are kept; a pass that was interrupted goes on from the state beside it. None keeps nothing. cache:
    of tokens, for a pass over images that were encoded before, such as by an edited model.

    Raises: UsageError where the file cannot be written; InputFileError for a damaged state. KeyboardInterrupt keeps
    what was done.
    """
    losses, done = ImageLosses.zero(len(manifest), False), 0
    state = None if file is None else file.with_name(f"{file.stem}-state{file.suffix}")
    if state is not None and state.exists():
        tensors, header = read_tensors(state, STATE_SCHEMA)
        if header["manifest"] == manifest.hash:
            losses, done = ImageLosses.of(tensors), header["done"]
            advance(done)

    def save() -> None:
        if state is not None:
            write_tensors(state, losses.tensors(), STATE_SCHEMA, {"manifest": manifest.hash, "done": done})

    batches = [np.arange(i, min(i + batch_size, len(manifest))) for i in range(done, len(manifest), batch_size)]
    saved = time.monotonic()
    with Interruption() as interruption:
        encoded = tokens_of(model, source, manifest, batches, model.view_recipe("center"), cache, workers=workers)
        for positions, batch in zip(batches, encoded, strict=True):
            if len(batch.positions):
                outcomes = model.outcomes(batch.tokens[:, 0], torch.from_numpy(manifest.labels[batch.positions]))
                losses.loss[batch.positions] = outcomes.loss.mean(1).cpu().numpy()
                losses.hits[batch.positions] = model.hit_share(outcomes).cpu().numpy()
            done += len(positions)
            advance(len(positions))
            if interruption.requested:
                save()
                raise KeyboardInterrupt
            if time.monotonic() - saved > SAVE_SECONDS:
                save()
                saved = time.monotonic()
    if file is not None:
        losses.save(file, manifest.hash)
        state.unlink(missing_ok=True)
    return losses
