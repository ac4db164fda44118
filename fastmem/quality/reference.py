"""What samples are compared with: a set of real images, their features kept by content, or statistics from a file."""

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
from fastmem.quality.features import FeatureExtractor, Features, Reference
from fastmem.quality.frechet import read_statistics
from fastmem.reporter import SILENT, Reporter, Work
from fastmem.tokens.true_images import spread

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
    reporter: Reporter = SILENT,
) -> Reference:
    """Features of a set of real images, cut by ``recipe`` of one view; out of the folder ``cache`` where it has them.

    Images that cannot be read are left out. With a cache, features are kept in parts of ``PART`` images while they are
    taken, so that a pass that was killed goes on.

    Args:
        source: the images that the manifest was built from.
        manifest: the order of the images.
        recipe: how a picture is cut to one view.
        extractor: the network that makes features.
        description: what the images are, for people.
        cache: folder of features; None keeps none.
        train: whether the model was trained on these images.
        workers: processes that decode images, as in ``load_views``.
        reporter: is told how many images there are, and of those that are done.

    Raises: InputFileError where not one image can be read, or a kept file is damaged; else as ``load_views``.
    """
    reporter.planned(Work(len(manifest)))
    content = _content(source, manifest, recipe)
    header = {"features": extractor.name, "digest": extractor.digest, "content": content}
    key = hashlib.sha256("".join(header.values()).encode()).hexdigest()[:16]
    file = None if cache is None else cache / f"{extractor.name}-{key}.safetensors"
    if file is not None and file.exists():
        features = Features.load(file, header)
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
    reporter: Reporter,
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
            reporter.advance(len(positions))
            continue
        parts.append(_extract_part(source, manifest, positions, recipe, extractor, workers, reporter))
        if part is not None and len(parts[-1]):
            parts[-1].save(part, header)
    features = Features.join([part for part in parts if len(part)] or parts[:1])
    check_readable(source, len(manifest), len(features))
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
    reporter: Reporter,
) -> Features:
    batches = np.array_split(positions, -(-len(positions) // BATCH))
    parts = []
    for asked, batch in zip(batches, load_views(source, manifest, batches, recipe, workers), strict=True):
        if len(batch.positions):
            # logits make the inception score, which is of samples alone
            parts.append(Features(extractor(batch.views[:, 0].numpy()).vectors))
        reporter.advance(len(asked))
    return Features.join(parts) if parts else Features(np.empty((0, extractor.dimensions), np.float32))
