"""How well a model predicts real images: the mean teacher-forced loss of sets and groups of images.

An edit can lower the loss of unseen images merely by making the model less confident. The loss of unseen images is
therefore also computed at the temperature of the softmax that gives the lowest loss, which confidence does not change.
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

# images whose losses are computed at once
BATCH = 64
# name of the set whose loss is also computed at its best temperature, and of that metric
HELDOUT = "heldout"
TEMPERED = f"loss_{HELDOUT}_tempered"
# from 1/4 to 8 in steps of 9 %, with exactly 1 among them
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
    """Return the tokens of the centre views of a set's images, or of a part of them that is even over the classes.

    Args:
        model: the model whose tokenizer encodes the images.
        source: the images that the manifest was built from.
        manifest: the order of the images.
        most: greatest number of images to read.
        cache: where tokens are looked up; None for no cache. New tokens are saved only when all images are read.
        workers: number of processes that decode images; None chooses by cores and number of images.
        reporter: is given the number of images to read, and the number of images read.

    Raises: InputFileError where no image can be read; UsageError where the manifest is of another source or ``workers``
    is negative; FastmemError where a worker process died.
    """
    positions = None if len(manifest) <= most else spread(len(manifest), most)
    asked = min(most, len(manifest))
    reporter.planned(Work(asked))
    found = read_true_images(model, source, manifest, positions, cache=cache, workers=workers, reporter=reporter)
    check_readable(source, asked, found.count)
    return found


def image_losses(model: Model, images: TrueImages) -> np.ndarray:
    """Return the loss of every image under its own class, float64 [N], in nats per token."""
    parts = [
        model.outcomes(tokens, labels).loss.double().mean(1).cpu()
        for tokens, labels in zip(images.tokens.split(BATCH), images.labels.split(BATCH), strict=True)
    ]
    return torch.cat(parts).numpy()


@torch.inference_mode()
def tempered_losses(model: Model, images: TrueImages) -> np.ndarray:
    """Return the loss of every image at each of ``TEMPERATURES``, float64 [len(TEMPERATURES),N], in nats per token.

    The logits are divided by the temperature.

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
    """Return the mean loss of sets of images as ``loss_SET``, and of groups of images as ``loss_GROUP``.

    Losses are means over images, in nats per token. For the set "heldout" there are also ``temperature_heldout``, the
    temperature at which its mean loss is lowest, and ``loss_heldout_tempered``, that lowest loss. ``sets`` are images
    by name, and ``groups`` are image ids, int64 [n], by name; a group without an image in any set is left out.
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
