"""Check that the class order of the images is that of the checkpoint.

In another order images would have wrong labels, and every number that depends on the class would be wrong.
"""

from __future__ import annotations

from fastmem.data.manifest import Manifest
from fastmem.data.sources import ImageSource
from fastmem.errors import UsageError
from fastmem.models.model import Model
from fastmem.tokens.cache import TokenCache
from fastmem.tokens.true_images import read_true_images, spread

IMAGES = 64
# from FEW_IMAGES images on, the loss has to be lower by this many standard errors
STANDARD_ERRORS = 2.0
FEW_IMAGES = 8


def check_labels(model: Model, manifest: Manifest) -> None:
    """Check that the checkpoint knows every label of the images. Raises: UsageError where it does not."""
    highest = int(manifest.labels.max(initial=0))
    if highest >= model.num_classes:
        raise UsageError(
            f"expected labels below the checkpoint's {model.num_classes} classes, got label {highest} for class "
            f"{manifest.classes[highest]}: give the images this model was trained on, or their order with --classes"
        )


def check_class_order(
    model: Model, source: ImageSource, manifest: Manifest, cache: TokenCache | None = None
) -> tuple[float, float] | None:
    """Check that up to 64 images have a lower loss with their own labels than with those of other images.

    The images are spread evenly over the manifest, and each is also tried with the label of the image half of them
    further on. In a wrong class order all labels are wrong, and either loss may be lower by chance, so from 8 images on
    the difference has to be larger than two standard errors.

    Args:
        model: the model.
        source: the images that the manifest was built from.
        manifest: the order of the images.
        cache: where tokens of images are looked up; None for no cache.

    Returns:
        The mean losses with own and with exchanged labels, in nats per token; None where all images are of one class.

    Raises: UsageError where the loss with own labels is not clearly lower.
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
