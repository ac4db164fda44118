"""What samples are compared with: a set of real images, their features kept by content, or statistics from a file."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from fastmem.data.loading import load_views
from fastmem.data.manifest import Manifest
from fastmem.data.sources import ImageSource
from fastmem.data.views import Views
from fastmem.errors import InputFileError
from fastmem.quality.features import FeatureExtractor, Features, Reference
from fastmem.quality.frechet import read_statistics
from fastmem.quality.losses import spread

BATCH = 64
PART = 64 * BATCH
# pictures whose pixels tell whether a set is still the same; names and labels of all do so, too
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
    advance: Callable[[int], None] = lambda images: None,
) -> Reference:
    """Features of a set of real images, cut by ``recipe`` of one view; out of the folder ``cache`` where it has them.

    What cannot be read is left out. train: whether the model saw these images. With a cache, features are kept in
    parts of ``PART`` images while they are taken, so that a pass that was killed goes on.

    Raises: InputFileError where not one image can be read, or a kept file is damaged; else as ``load_views``.
    """
    content = _content(source, manifest, recipe)
    header = {"features": extractor.name, "digest": extractor.digest, "content": content}
    key = hashlib.sha256("".join(header.values()).encode()).hexdigest()[:16]
    file = None if cache is None else cache / f"{extractor.name}-{key}.safetensors"
    if file is not None and file.exists():
        features = Features.load(file, header)
        advance(len(manifest))
    else:
        features = _extract(source, manifest, recipe, extractor, workers, advance, file, header)
    labels, counts = np.unique(manifest.labels, return_counts=True)
    return Reference(
        f"{description}, {len(features):,} images",
        content,
        features,
        class_counts=dict(zip(labels.tolist(), counts.tolist(), strict=True)),
        train=train,
    )


def file_reference(path: Path, extractor: FeatureExtractor) -> Reference:
    """Mean and covariance out of a .npz file. Raises: as ``read_statistics``."""
    gaussian = read_statistics(path, extractor.dimensions)
    content = hashlib.sha256(gaussian.mu.tobytes() + gaussian.sigma.tobytes()).hexdigest()
    return Reference(f"statistics {path}", content, gaussian=gaussian)


def _content(source: ImageSource, manifest: Manifest, recipe: Views) -> str:
    """SHA-256 of names, labels, recipe, and pixels of some images."""
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
    advance: Callable[[int], None],
    file: Path | None,
    header: Mapping[str, str],
) -> Features:
    """Features of all images, written to ``file``, beside which they are kept in parts until then."""
    folder = None if file is None else file.with_suffix(".parts")
    parts = []
    for number, positions in enumerate(np.array_split(np.arange(len(manifest)), -(-len(manifest) // PART))):
        part = None if folder is None else folder / f"{number:06d}.safetensors"
        if part is not None and part.exists():
            parts.append(Features.load(part, header))
            advance(len(positions))
            continue
        parts.append(_extract_part(source, manifest, positions, recipe, extractor, workers, advance))
        if part is not None and len(parts[-1]):
            parts[-1].save(part, header)
    features = Features.join([part for part in parts if len(part)] or parts[:1])
    if not len(features):
        raise InputFileError(
            f"expected images that can be read in {source.description}, got {len(manifest)} that cannot: copy them "
            "again"
        )
    if file is not None:
        features.save(file, header)
        shutil.rmtree(folder, ignore_errors=True)
    return features


def _extract_part(
    source: ImageSource,
    manifest: Manifest,
    positions: np.ndarray,
    recipe: Views,
    extractor: FeatureExtractor,
    workers: int | None,
    advance: Callable[[int], None],
) -> Features:
    batches = np.array_split(positions, -(-len(positions) // BATCH))
    parts = []
    for asked, batch in zip(batches, load_views(source, manifest, batches, recipe, workers), strict=True):
        if len(batch.positions):
            # logits make the inception score, which is of samples alone
            parts.append(Features(extractor(batch.views[:, 0].numpy()).vectors))
        advance(len(asked))
    return Features.join(parts) if parts else Features(np.empty((0, extractor.dimensions), np.float32))
