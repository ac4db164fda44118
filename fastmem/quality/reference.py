"""References that samples are compared with: features of real images, saved in a cache, or statistics from a file."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from fastmem.data.loading import check_readable, load_views
from fastmem.data.manifest import Manifest
from fastmem.data.sources import ImageSource
from fastmem.data.views import Views
from fastmem.files import STALE_SECONDS, remove_leftovers
from fastmem.quality.features import SCHEMA, FeatureExtractor, Features, Reference
from fastmem.quality.frechet import FeatureMoments
from fastmem.quality.npz import image_blocks, image_header, rank, read_statistics
from fastmem.quality.rows import write_rows
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
    file = _cache_file(cache, extractor, header)

    def read(positions: np.ndarray) -> Features:
        return _extract_part(source, manifest, positions, recipe, extractor, workers, reporter)

    features = _features(len(manifest), read, file, header, reporter)
    check_readable(source, len(manifest), len(features))
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
    found = rank(gaussian.sigma)
    few = f" of rank {found:,} of {len(gaussian.mu):,}: of too few images" if found < len(gaussian.mu) else ""
    return Reference(f"statistics {path}{few}", content, gaussian=gaussian)


def images_reference(
    path: Path, extractor: FeatureExtractor, *, cache: Path | None = None, reporter: Reporter = SILENT
) -> Reference:
    """Return a reference of the images in a .npz file, its array ``arr_0``, uint8 [N,S,S,3], as they are.

    Args:
        path: the file.
        extractor: the network that computes features.
        cache: folder where features are saved; None saves nothing.
        reporter: is given the number of images, and the number of images done.

    Raises: InputFileError where the file is missing or damaged, or holds no such images.

    Source: openai/guided-diffusion evaluations/evaluator.py.
    """
    images = image_header(path)
    count, side = images.shape[:2]
    reporter.planned(Work(count))
    digest = hashlib.sha256(f"npz {images.checksum} {images.shape}".encode())
    for block in image_blocks(path, images, 0, min(count, SEEN_PIXELS), SEEN_PIXELS):
        digest.update(block.tobytes())
    content = digest.hexdigest()
    header = {"features": extractor.name, "digest": extractor.digest, "content": content}

    def read(positions: np.ndarray) -> Features:
        parts = []
        for block in image_blocks(path, images, int(positions[0]), int(positions[-1]) + 1, BATCH):
            parts.append(Features(extractor(block).vectors))
            reporter.advance(len(block))
        return Features.join(parts)

    features = _features(count, read, _cache_file(cache, extractor, header), header, reporter)
    return Reference(f"{count:,} images of {side} x {side} in {path}", content, features)


def _cache_file(cache: Path | None, extractor: FeatureExtractor, header: Mapping[str, str]) -> Path | None:
    key = hashlib.sha256("".join(header.values()).encode()).hexdigest()[:16]
    return None if cache is None else cache / f"{extractor.name}-{key}.safetensors"


def _content(source: ImageSource, manifest: Manifest, recipe: Views) -> str:
    """Return the SHA-256 of the names and labels of all images, of the recipe, and of the pixels of some images."""
    digest = hashlib.sha256(f"{manifest.hash} {recipe.name}".encode())
    (batch,) = load_views(source, manifest, [spread(len(manifest), SEEN_PIXELS)], recipe, workers=0)
    digest.update(batch.positions.tobytes())
    digest.update(batch.views.numpy().tobytes())
    return digest.hexdigest()


def _features(
    count: int,
    read: Callable[[np.ndarray], Features],
    file: Path | None,
    header: Mapping[str, str],
    reporter: Reporter,
) -> Features:
    """Return the features of ``count`` images: those in ``file``, or what ``read`` gives for parts of the positions.

    With a file the features stay on disk: parts are saved beside it, and put together a block at a time. Mean and
    covariance are gathered on the way and saved with them.
    """
    parts = np.array_split(np.arange(count), -(-count // PART))
    if file is None:
        found = [read(positions) for positions in parts]
        return Features.join([part for part in found if len(part)] or found[:1])
    # other processes may write there
    remove_leftovers(file.parent, STALE_SECONDS)
    if file.exists():
        # parts stay where a process is killed between its last two steps
        shutil.rmtree(file.with_suffix(".parts"), ignore_errors=True)
        reporter.advance(count)
        return Features.load(file, header)
    saved, moments = [], None
    for number, positions in enumerate(parts):
        place = file.with_suffix(".parts") / f"{number:06d}.safetensors"
        if place.exists():
            part = Features.load(place, header)
            reporter.advance(len(positions))
        else:
            part = read(positions)
            if not len(part):
                continue
            part.save(place, header)
        saved.append(place)
        moments = (moments or FeatureMoments.zero(part.vectors.shape[1])).update(part.vectors[:])
    if moments is None:
        return Features(np.empty((0, 1), np.float32))
    more = {}
    # fewer vectors have a singular covariance
    if moments.count > len(moments.mean):
        gaussian = moments.finish()
        more = {"mu": gaussian.mu, "sigma": gaussian.sigma}
    write_rows(file, SCHEMA, header, Features.load(saved, header).vectors, more)
    shutil.rmtree(file.with_suffix(".parts"), ignore_errors=True)
    return Features.load(file, header)


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
