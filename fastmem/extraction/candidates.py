"""Choose the images to extract: in every class those whose tokens the model predicts best under teacher forcing.

The candidate score of an image is the share of its tokens that are the model's most likely ones.

Source: arXiv 2502.02514, section 5.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypedDict

import msgspec
import numpy as np
import torch
from torch import Tensor

from fastmem.data.loading import load_views
from fastmem.data.manifest import Manifest
from fastmem.data.sources import ImageSource
from fastmem.data.views import to_unit_range
from fastmem.errors import InputFileError, UsageError
from fastmem.files import check_tensors, read_tensors, write_tensors
from fastmem.models.model import Model
from fastmem.reporter import SILENT, Reporter
from fastmem.runs.interruption import Interruption
from fastmem.scoring.image_losses import ImageLosses
from fastmem.tokens.cache import TokenCache
from fastmem.tokens.encoding import tokens_of
from fastmem.tokens.true_images import read_true_images

# number of images of every class that are candidates by default
TOP_PER_CLASS = 5
# images of one forward pass by default
BATCH_IMAGES = 16
# time between two saves of an unfinished pass
SAVE_SECONDS = 30.0
STATE_SCHEMA = "fastmem.losses-state/1"


@dataclass(frozen=True, eq=False)
class Targets:
    """Images that an attack tries to extract from a model, in the order of their manifest (by label and id).

    Attributes:
        ids: int64 [N], image ids.
        labels: int64 [N], classes of the images.
        names: ``class/name`` of each image.
        scores: float32 [N], candidate scores in [0,1].
        tokens: int64 [N,T], tokens of one view of each image, usually the centre view.
    """

    ids: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]
    scores: np.ndarray
    tokens: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, chosen: np.ndarray) -> Targets:
        """Return some of the targets, chosen by positions, int64 [n], or by a mask, bool [N]."""
        at = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
        names = tuple(self.names[i] for i in at)
        return Targets(self.ids[at], self.labels[at], names, self.scores[at], self.tokens[torch.from_numpy(at)])


def highest_per_class(manifest: Manifest, scores: np.ndarray, count: int = TOP_PER_CLASS) -> np.ndarray:
    """Return the manifest positions of the ``count`` images of highest score in every class, int64 [n], ascending.

    ``scores``, float [N], are in the order of ``manifest``; images with the score NaN are never chosen. Of images with
    equal scores, those with the smaller ids are chosen.

    Raises: UsageError where there is not one score for each image, or ``count`` is below 1.
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
    *,
    cache: TokenCache | None = None,
    workers: int | None = None,
) -> Targets:
    """Return the images at some manifest positions as targets, with the tokens of their centre views.

    Images that cannot be read are left out.

    Args:
        model: the model whose tokenizer encodes the images.
        source: the images that the manifest was built from.
        manifest: the order of the images.
        scores: candidate scores of all images, float [N] in manifest order.
        positions: manifest positions of the targets, int64 [n], ascending.
        cache: where tokens are looked up; None for no cache.
        workers: number of processes that decode images; None chooses by cores and number of images.

    Raises: UsageError where a position is out of range, the manifest is of another source, or ``workers`` is negative;
    FastmemError where a worker process died.
    """
    images = read_true_images(model, source, manifest, positions, cache=cache, workers=workers)
    return targets_of(manifest, scores, positions, images.ids, images.tokens)


def targets_of(
    manifest: Manifest, scores: np.ndarray, positions: np.ndarray, ids: np.ndarray, tokens: Tensor
) -> Targets:
    """Return targets whose tokens are known already.

    Args:
        manifest: the order of the images.
        scores: candidate scores of all images, float [N] in manifest order.
        positions: manifest positions that were asked for, int64 [m], ascending.
        ids: ids of the images at these positions that could be read, int64 [n], in the same order.
        tokens: tokens of the images that could be read, int64 [n,T].
    """
    at = positions[np.isin(manifest.ids[positions], ids)]
    names = tuple(manifest.names[at].tolist())
    return Targets(manifest.ids[at], manifest.labels[at], names, np.asarray(scores[at], dtype=np.float32), tokens)


def read_pictures(model: Model, source: ImageSource, manifest: Manifest, targets: Targets) -> Tensor:
    """Return the centre views of targets as pictures, float32 [n,3,S,S] in [0,1]; unreadable images are left out.

    ``source`` holds the images, ``manifest`` their order, and ``model`` says how they are cropped. All pictures are in
    memory at once, so callers should ask for a few dozen targets at a time.

    Args:
        model: the model whose centre view is cut from each image.
        source: the images that the manifest was built from.
        manifest: the order of the images.
        targets: the images to read.

    Raises: UsageError where the manifest is of another source.
    """
    positions = np.flatnonzero(np.isin(manifest.ids, targets.ids))
    size = model.image_size
    batches = [positions] if len(positions) else []
    loaded = load_views(source, manifest, batches, model.view_recipe("center"), workers=0)
    return torch.cat([torch.empty(0, 3, size, size), *(to_unit_range(batch.views[:, 0]) for batch in loaded)])


class StateShape(TypedDict):
    """The header of a pass that goes on: whose images, and how many of them are done."""

    manifest: str
    done: Annotated[int, msgspec.Meta(ge=0)]


def progress_file(file: Path) -> Path:
    """Return where `collect_losses` saves its progress towards a file; a killed process can leave it beside that."""
    return file.with_name(f"{file.stem}-state{file.suffix}")


def collect_losses(
    model: Model,
    source: ImageSource,
    manifest: Manifest,
    file: Path | None,
    *,
    batch_size: int = BATCH_IMAGES,
    workers: int | None = None,
    cache: TokenCache | None = None,
    owner: Mapping[str, str] | None = None,
    reporter: Reporter = SILENT,
) -> ImageLosses:
    """Return the loss and the candidate score of every image, computed on its centre view and saved to a file.

    An interrupted pass saves its progress beside the file, and the next call resumes from there.

    Args:
        model: the model, edited or not.
        source: the images that the manifest was built from.
        manifest: the order of the images.
        file: where the losses are saved; None saves neither losses nor progress.
        batch_size: number of images in one forward pass.
        workers: number of processes that decode images; None chooses by cores and number of images.
        cache: where tokens are looked up and saved; None for no cache.
        owner: entries that say which run and set the images are of, for the file.
        reporter: its ``advance`` is given the number of images done, and its ``note`` a sentence for a damaged file of
            the cache.

    Raises: UsageError where the file cannot be written; InputFileError where the saved progress is damaged;
    KeyboardInterrupt on Ctrl-C, after the progress was saved.
    """
    losses, done = ImageLosses.zero(len(manifest), False), 0
    state = None if file is None else progress_file(file)
    if state is not None and state.exists():
        tensors, header = read_tensors(state, STATE_SCHEMA, StateShape, owner)
        if header["manifest"] == manifest.hash:
            check_tensors(state, tensors, dict.fromkeys(("loss", "hits"), ("float32", (len(manifest),))))
            losses, done = ImageLosses.of(tensors), header["done"]
            if done > len(manifest):
                raise InputFileError(
                    f"expected at most {len(manifest)} images that are done in {state}, got {done}: remove the file"
                )
            reporter.advance(done)

    def save() -> None:
        if state is not None:
            write_tensors(
                state, losses.tensors(), STATE_SCHEMA, {"manifest": manifest.hash, "done": done, **(owner or {})}
            )

    batches = [np.arange(i, min(i + batch_size, len(manifest))) for i in range(done, len(manifest), batch_size)]
    saved = time.monotonic()
    with Interruption() as interruption:
        recipe = model.view_recipe("center")
        encoded = tokens_of(model, source, manifest, batches, recipe, cache, workers=workers, note=reporter.note)
        for positions, batch in zip(batches, encoded, strict=True):
            if len(batch.positions):
                outcomes = model.outcomes(batch.tokens[:, 0], torch.from_numpy(manifest.labels[batch.positions]))
                losses.loss[batch.positions] = outcomes.loss.mean(1).cpu().numpy()
                losses.hits[batch.positions] = model.hit_share(outcomes).cpu().numpy()
            done += len(positions)
            reporter.advance(len(positions))
            if interruption.requested:
                save()
                raise interruption.stopped
            if time.monotonic() - saved > SAVE_SECONDS:
                save()
                saved = time.monotonic()
    if file is not None and state is not None:
        losses.save(file, manifest.hash, owner)
        state.unlink(missing_ok=True)
    return losses
