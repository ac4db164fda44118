"""How well a model predicts real images: mean teacher-forced loss of sets of them, and of groups within a set.

A loss also falls when a model merely grows less sure of itself. The loss of unseen images is therefore taken at the
temperature that suits them best, too, which an edit cannot improve by confidence alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fastmem.data.loading import load_views
from fastmem.data.manifest import Manifest
from fastmem.data.sources import ImageSource
from fastmem.errors import InputFileError
from fastmem.models.model import Model, to_unit_range

BATCH = 64
MOST_IMAGES = 5000
HELDOUT = "heldout"
TEMPERED = f"loss_{HELDOUT}_tempered"
# steps of 9 %, 1 among them
TEMPERATURES = tuple(2 ** (step / 8) for step in range(-16, 25))


@dataclass(frozen=True, eq=False)
class TrueImages:
    """Real images as tokens of their centre views: an edit leaves the tokenizer alone, so they serve for all edits.

    ids, labels: int64 [N]; tokens: int64 [N,T].
    """

    ids: np.ndarray
    labels: Tensor
    tokens: Tensor

    @property
    def count(self) -> int:
        """N."""
        return len(self.ids)


def spread(total: int, most: int) -> np.ndarray:
    """At most ``most`` positions out of ``total``, evenly spread, so that every class of a manifest keeps its share."""
    return np.unique(np.linspace(0, total - 1, min(total, most)).round().astype(np.int64))


def read_true_images(
    model: Model,
    source: ImageSource,
    manifest: Manifest,
    most: int = MOST_IMAGES,
    workers: int | None = None,
    advance: Callable[[int], None] = lambda images: None,
) -> TrueImages:
    """Tokenize at most ``most`` images, evenly over the manifest; what cannot be read is left out.

    Raises: InputFileError where not one image can be read; else as ``load_views``.
    """
    positions = spread(len(manifest), most)
    batches = np.array_split(positions, -(-len(positions) // BATCH))
    kept, tokens = [], []
    for asked, batch in zip(
        batches, load_views(source, manifest, batches, model.view_recipe("center"), workers), strict=True
    ):
        if len(batch.positions):
            kept.append(batch.positions)
            tokens.append(model.tokenize(to_unit_range(batch.views[:, 0])).cpu())
        advance(len(asked))
    if not kept:
        raise InputFileError(
            f"expected images that can be read in {source.description}, got {len(positions)} that cannot: copy them "
            "again"
        )
    at = np.concatenate(kept)
    return TrueImages(manifest.ids[at], torch.from_numpy(manifest.labels[at]), torch.cat(tokens))


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
