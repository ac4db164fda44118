"""References that samples are compared with: features of real images, saved in a cache, or statistics from a file."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fastmem.data.loading import check_readable, load_views
from fastmem.data.manifest import Manifest
from fastmem.data.sources import ImageSource
from fastmem.data.views import Views
from fastmem.files import STALE_SECONDS, remove_leftovers
from fastmem.quality.features import FeatureExtractor, Features, Reference
from fastmem.quality.frechet import read_statistics
from fastmem.reporter import SILENT, Reporter, Work
from fastmem.tokens.true_images import spread

# images whose features are computed at once
BATCH = 64
# images whose features are saved together while a pass is not finished
PART = 64 * BATCH
# images whose pixels are hashed, together with the names and labels of all images, to notice when a set has changed
SEEN_PIXELS = 64


def read_reference(
    source: ImageSource,
    manifest: Manifest,
    recipe: Views,
    extractor: FeatureExtractor,
    *,
    description: str,
    cache: Path | None = None,
    train: bool = False,
    workers: int | None = None,
    reporter: Reporter = SILENT,
) -> Reference:
    """Return the features of a set of real images, computed now or read from a cache.

    Images that cannot be read are left out. With a cache, features are saved in parts while they are computed, so that
    an interrupted pass can be resumed.

    Args:
        source: the images that the manifest was built from.
        manifest: the order of the images.
        recipe: how one view is cut from each image.
        extractor: the network that computes features.
        description: a few words on the images, for people.
        cache: folder where features are saved; None saves nothing.
        train: whether the model was trained on these images.
        workers: number of processes that decode images; None chooses by cores and number of images.
        reporter: is given the number of images, and the number of images done.

    Raises: InputFileError where no image can be read or a saved file is damaged; UsageError where the manifest is of
    another source or ``workers`` is negative; FastmemError where a worker process died.
    """
    reporter.planned(Work(len(manifest)))
    content = _content(source, manifest, recipe)
    header = {"features": extractor.name, "digest": extractor.digest, "content": content}
    key = hashlib.sha256("".join(header.values()).encode()).hexdigest()[:16]
    file = None if cache is None else cache / f"{extractor.name}-{key}.safetensors"
    if cache is not None:
        # other processes may write there
        remove_leftovers(cache, STALE_SECONDS)
    if file is not None and file.exists():
        features = Features.load(file, header)
        # they stay where a process is killed between its last two steps
        shutil.rmtree(file.with_suffix(".parts"), ignore_errors=True)
        reporter.advance(len(manifest))
    else:
        features = _extract(source, manifest, recipe, extractor, workers, reporter, file, header)
    labels, counts = np.unique(manifest.labels, return_counts=True)
    return Reference(
        f"{description}, {len(features):,} images",
        content,
        features,
        class_counts=dict(zip(labels.tolist(), counts.tolist(), strict=True)),
        train=train,
    )


def file_reference(path: Path, extractor: FeatureExtractor) -> Reference:
    """Return a reference from a .npz file that holds mean and covariance of the features of ``extractor``.

    Raises: InputFileError where the file is missing or damaged, or its arrays have another shape.
    """
    gaussian = read_statistics(path, extractor.dimensions)
    content = hashlib.sha256(gaussian.mu.tobytes() + gaussian.sigma.tobytes()).hexdigest()
    return Reference(f"statistics {path}", content, gaussian=gaussian)


def _content(source: ImageSource, manifest: Manifest, recipe: Views) -> str:
    """Return the SHA-256 of the names and labels of all images, of the recipe, and of the pixels of some images."""
    digest = hashlib.sha256(f"{manifest.hash} {recipe.name}".encode())
    (batch,) = load_views(source, manifest, [spread(len(manifest), SEEN_PIXELS)], recipe, workers=0)
    digest.update(batch.positions.tobytes())
    digest.update(batch.views.numpy().tobytes())
    return digest.hexdigest()


def _extract(
    source: ImageSource,
    manifest: Manifest,
    recipe: Views,
    extractor: FeatureExtractor,
    workers: int | None,
    reporter: Reporter,
    file: Path | None,
    header: Mapping[str, str],
) -> Features:
    """Return the features of all images and write them to ``file``; unfinished work is saved in parts beside it."""
    folder = None if file is None else file.with_suffix(".parts")
    parts = []
    for number, positions in enumerate(np.array_split(np.arange(len(manifest)), -(-len(manifest) // PART))):
        part = None if folder is None else folder / f"{number:06d}.safetensors"
        if part is not None and part.exists():
            parts.append(Features.load(part, header))
            reporter.advance(len(positions))
            continue
        parts.append(_extract_part(source, manifest, positions, recipe, extractor, workers, reporter))
        if part is not None and len(parts[-1]):
            parts[-1].save(part, header)
    features = Features.join([part for part in parts if len(part)] or parts[:1])
    check_readable(source, len(manifest), len(features))
    if file is not None:
        features.save(file, header)
        shutil.rmtree(file.with_suffix(".parts"), ignore_errors=True)
    return features


def _extract_part(
    source: ImageSource,
    manifest: Manifest,
    positions: np.ndarray,
    recipe: Views,
    extractor: FeatureExtractor,
    workers: int | None,
    reporter: Reporter,
) -> Features:
    batches = np.array_split(positions, -(-len(positions) // BATCH))
    parts = []
    for asked, batch in zip(batches, load_views(source, manifest, batches, recipe, workers), strict=True):
        if len(batch.positions):
            # logits are dropped, because they are needed only for the inception score of samples
            parts.append(Features(extractor(batch.views[:, 0].numpy()).vectors))
        reporter.advance(len(asked))
    return Features.join(parts) if parts else Features(np.empty((0, extractor.dimensions), np.float32))
