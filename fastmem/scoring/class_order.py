"""Does the folder's class order fit the checkpoint? A wrong one would shift every class-conditional number."""

from __future__ import annotations

from fastmem.data.manifest import Manifest
from fastmem.data.sources import ImageSource
from fastmem.errors import UsageError
from fastmem.models.model import Model
from fastmem.tokens.cache import TokenCache
from fastmem.tokens.true_images import read_true_images, spread

IMAGES = 64
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
    images = read_true_images(model, source, manifest, spread(len(manifest), IMAGES), cache=cache, workers=0)
    own = images.labels
    if len(own.unique()) < 2:
        return None
    shuffled = own.roll(len(own) // 2)
    losses = [model.outcomes(images.tokens, labels).loss.mean(1) for labels in (own, shuffled)]
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
