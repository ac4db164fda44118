"""How well a model predicts real images: mean teacher-forced loss of sets of them, and of groups within a set.

A loss also falls when a model merely grows less sure of itself. The loss of unseen images is therefore taken at the
temperature that suits them best, too, which an edit cannot improve by confidence alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch.nn import functional

from fastmem.data.loading import check_readable
from fastmem.data.manifest import Manifest
from fastmem.data.sources import ImageSource
from fastmem.models.model import Model
from fastmem.reporter import SILENT, Reporter, Work
from fastmem.tokens.cache import TokenCache
from fastmem.tokens.true_images import MOST_IMAGES, TrueImages, read_true_images, spread

BATCH = 64
HELDOUT = "heldout"
TEMPERED = f"loss_{HELDOUT}_tempered"
# steps of 9 %, 1 among them
TEMPERATURES = tuple(2 ** (step / 8) for step in range(-16, 25))


def read_loss_images(
    model: Model,
    source: ImageSource,
    manifest: Manifest,
    most: int = MOST_IMAGES,
    *,
    cache: TokenCache | None = None,
    workers: int | None = None,
    reporter: Reporter = SILENT,
) -> TrueImages:
    """The images of a set whose loss is taken, evenly over its classes, as tokens of their centre views.

    Args:
        model: whose tokenizer encodes.
        source: the images that the manifest was built from.
        manifest: the order of the images.
        most: how many images at the most.
        cache: where tokens are looked up, and kept where all images are read.
        workers: processes that decode images, as in ``load_views``.
        reporter: is told how many images will be read, and of those that were.

    Raises: InputFileError where not one image can be read; else as ``load_views``.
    """
    positions = None if len(manifest) <= most else spread(len(manifest), most)
    asked = min(most, len(manifest))
    reporter.planned(Work(asked))
    found = read_true_images(model, source, manifest, positions, cache=cache, workers=workers, reporter=reporter)
    check_readable(source, asked, found.count)
    return found


def image_losses(model: Model, images: TrueImages) -> np.ndarray:
    """Loss of every image under its class, nats per token: float64 [N]."""
    parts = [
        model.outcomes(tokens, labels).loss.double().mean(1).cpu()
        for tokens, labels in zip(images.tokens.split(BATCH), images.labels.split(BATCH), strict=True)
    ]
    return torch.cat(parts).numpy()


@torch.inference_mode()
def tempered_losses(model: Model, images: TrueImages) -> np.ndarray:
    """``image_losses`` with the logits divided by each of ``TEMPERATURES``: float64 [len(TEMPERATURES),N].

    Source: temperature scaling, Guo et al. 2017 (arXiv 1706.04599).
    """
    rows = model.rows_of_logits
    parts = []
    for tokens, labels in zip(images.tokens.split(rows), images.labels.split(rows), strict=True):
        logits = model.logits(tokens, labels).transpose(1, 2)
        true = tokens.to(logits.device)
        losses = [functional.cross_entropy(logits / t, true, reduction="none").double().mean(1) for t in TEMPERATURES]
        parts.append(torch.stack(losses).cpu())
    return torch.cat(parts, dim=1).numpy()


def mean_losses(
    model: Model, sets: Mapping[str, TrueImages], groups: Mapping[str, np.ndarray] | None = None
) -> dict[str, float]:
    """``loss_SET`` of every set, and ``loss_GROUP`` of every group of image ids that has an image in one of them.

    Of a set "heldout" also ``loss_heldout_tempered``, the lowest that one temperature for all its images gives, and
    ``temperature_heldout``, that temperature. Means over images, nats per token. groups: ids int64 [n] by name.
    """
    losses, tempered = {}, {}
    for name, images in sets.items():
        if name == HELDOUT:
            table = tempered_losses(model, images)
            losses[name] = table[TEMPERATURES.index(1.0)]
            best = int(table.mean(1).argmin())
            tempered = {
                TEMPERED: float(table[best].mean()),
                f"temperature_{HELDOUT}": TEMPERATURES[best],
            }
        else:
            losses[name] = image_losses(model, images)
    found = {f"loss_{name}": float(values.mean()) for name, values in losses.items()} | tempered
    for group, ids in (groups or {}).items():
        parts = [losses[name][np.isin(images.ids, ids)] for name, images in sets.items()]
        values = np.concatenate(parts) if parts else np.empty(0)
        if len(values):
            found[f"loss_{group}"] = float(values.mean())
    return found
