"""Does the folder's class order fit the checkpoint? A wrong one would shift every class-conditional number."""

from __future__ import annotations

import numpy as np
import torch

from fastmem.data.manifest import Manifest
from fastmem.data.sources import ImageSource
from fastmem.errors import UsageError
from fastmem.models.model import Model
from fastmem.tokens.cache import TokenCache
from fastmem.tokens.encoding import tokens_of

IMAGES = 64
BATCH = 16
STANDARD_ERRORS = 2.0
FEW_IMAGES = 8


def check_labels(model: Model, manifest: Manifest) -> None:
    """Raises: UsageError where the data has labels that the checkpoint does not know."""
    highest = int(manifest.labels.max(initial=0))
    if highest >= model.num_classes:
        raise UsageError(
            f"expected labels below the checkpoint's {model.num_classes} classes, got label {highest} for class "
            f"{manifest.classes[highest]}: give the images this model was trained on, or their order with --classes"
        )


def check_class_order(
    model: Model, source: ImageSource, manifest: Manifest, cache: TokenCache | None = None
) -> tuple[float, float] | None:
    """Mean loss of up to 64 images under their own and under shuffled labels; None where all are of one class.

    The images are spread evenly over the manifest; each gets the label of the one half a round further on. Under a
    wrong order both sets of labels are wrong and either may come out ahead by chance, so from 8 images on the own
    labels have to be better by two standard errors of the images' differences.

    Raises: UsageError where the own labels are no better, which means that the class order is another one.
    """
    positions = np.unique(np.linspace(0, len(manifest) - 1, min(IMAGES, len(manifest))).astype(np.int64))
    batches = np.array_split(positions, -(-len(positions) // BATCH))
    tokens, kept = [], []
    recipe = model.view_recipe("center")
    # images from all over are encoded in other company than in a pass, so their tokens are not kept
    for batch in tokens_of(model, source, manifest, batches, recipe, cache, keep=False, workers=0):
        if len(batch.positions):
            tokens.append(batch.tokens[:, 0].cpu())
            kept.append(batch.positions)
    own = torch.from_numpy(manifest.labels[np.concatenate(kept)]) if kept else torch.empty(0, dtype=torch.int64)
    if len(own.unique()) < 2:
        return None
    sizes = [len(t) for t in tokens]
    shuffled = own.roll(len(own) // 2)
    losses = [
        torch.cat([model.outcomes(t, y).loss.mean(1) for t, y in zip(tokens, labels.split(sizes), strict=True)])
        for labels in (own, shuffled)
    ]
    with_own, with_shuffled = (float(loss.double().mean()) for loss in losses)
    gain = (losses[1] - losses[0]).double()
    chance = STANDARD_ERRORS * float(gain.std()) / len(gain) ** 0.5 if len(gain) >= FEW_IMAGES else 0.0
    if not float(gain.mean()) > chance:
        raise UsageError(
            f"expected a clearly lower loss with the images' own labels than with shuffled ones, got {with_own:.4f} "
            f"and {with_shuffled:.4f} nats per token: the class order of {source.description} does not fit the "
            "checkpoint; give it with --classes FILE, or pass --no-class-check for a model without class knowledge"
        )
    return with_own, with_shuffled
