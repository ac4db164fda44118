"""Attribution: what scaling a unit's row would do to the loss of memorised images, against images never seen.

    score(u) = -d/ds_u [loss(candidates) - loss(held-out)] at s = 1

s_u multiplies row u of fc1's weight; the loss is the mean cross entropy of the true tokens of the centre views under
their own labels, teacher-forced. The derivative is the row sum of weight times gradient; it is taken here from fc1's
output z = x W^T + b as the sum over positions of (z - b) dL/dz, so that no gradient of a weight is ever held.

Held at once: the activations of one micro-batch of ``batch_size`` images, with which memory grows in proportion.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmem.data.loading import check_readable
from fastmem.data.manifest import Manifest
from fastmem.data.sources import ImageSource
from fastmem.errors import UsageError
from fastmem.extraction.candidates import TOP_PER_CLASS, highest_per_class
from fastmem.models.model import Model
from fastmem.ranking.selection import Selection, select
from fastmem.stats import UnitStats
from fastmem.tokens.cache import TokenCache
from fastmem.tokens.true_images import read_true_images, spread

BATCH_IMAGES = 8
HELDOUT_IMAGES = 256


def attribution(
    model: Model,
    source: ImageSource,
    ids: np.ndarray,
    heldout: ImageSource,
    *,
    heldout_ids: np.ndarray | None = None,
    heldout_images: int = HELDOUT_IMAGES,
    batch_size: int = BATCH_IMAGES,
    cache: TokenCache | None = None,
    workers: int | None = None,
) -> Tensor:
    """How much memorised images would lose, beyond images never seen, by weakening each unit: float64 [layers, units].

    Args:
        model: the unedited model.
        source: the training images.
        ids: ids of the memorised images among them, int64 [m].
        heldout: images that the model was not trained on.
        heldout_ids: ids of those that may be taken, int64 [k]; None allows all.
        heldout_images: how many of them are taken at the most, evenly over the classes.
        batch_size: images of one backward pass, which bounds memory.
        cache: where tokens are looked up.
        workers: processes that decode images, as in ``load_views``.

    Raises: UsageError for ids that the source lacks, no ids, or a number below 1; InputFileError where no image of a
    set can be read.
    """
    if heldout_images < 1:
        raise UsageError(f"expected at least 1 held-out image, got {heldout_images}: raise it")
    mine, theirs = Manifest.build(source), Manifest.build(heldout)
    source.index_of(np.asarray(ids, dtype=np.int64))
    allowed = np.arange(len(theirs))
    if heldout_ids is not None:
        heldout.index_of(np.asarray(heldout_ids, dtype=np.int64))
        allowed = np.flatnonzero(np.isin(theirs.ids, heldout_ids))
    memorised = _read_tokens(model, source, mine, np.flatnonzero(np.isin(mine.ids, ids)), cache, workers)
    unseen = _read_tokens(model, heldout, theirs, allowed[spread(len(allowed), heldout_images)], cache, workers)
    return attribution_from_tokens(model, *memorised, *unseen, batch_size=batch_size)


def _read_tokens(
    model: Model,
    source: ImageSource,
    manifest: Manifest,
    positions: np.ndarray,
    cache: TokenCache | None,
    workers: int | None,
) -> tuple[Tensor, Tensor]:
    found = read_true_images(model, source, manifest, positions, cache=cache, workers=workers)
    check_readable(source, len(positions), found.count)
    return found.tokens, found.labels


def attribution_from_tokens(
    model: Model,
    tokens: Tensor,
    labels: Tensor,
    heldout_tokens: Tensor,
    heldout_labels: Tensor,
    batch_size: int = BATCH_IMAGES,
) -> Tensor:
    """As ``attribution``, from true tokens int64 [N,T] under labels int64 [N]: float64 [layers, units].

    Raises: UsageError for no images, a batch below 1, other shapes, or values out of range.
    """
    memorised = loss_slopes(model, tokens, labels, batch_size)
    return loss_slopes(model, heldout_tokens, heldout_labels, batch_size) - memorised


@torch.inference_mode(False)
@torch.enable_grad()
def loss_slopes(model: Model, tokens: Tensor, labels: Tensor, batch_size: int = BATCH_IMAGES) -> Tensor:
    """Derivative of the mean loss by a factor on each unit's row, at 1: float64 [layers, units], nats per token.

    tokens: int64 [N,T]; labels: int64 [N]. Raises: as ``attribution_from_tokens``.
    """
    if not len(tokens) or batch_size < 1:
        raise UsageError(
            f"expected images, in batches of at least 1, got {len(tokens)} in batches of {batch_size}: give more"
        )
    # tokens that a model made are inference tensors, which a backward pass cannot keep: they are copied
    tokens, labels = model.check_inputs(tokens.clone(), labels.clone())
    total = torch.zeros(model.num_layers, model.num_units, dtype=torch.float64, device=model.device)
    for batch, own in zip(tokens.split(batch_size), labels.split(batch_size), strict=True):
        with _factors(model.fc1_layers) as factors:
            logits = model.forward_logits(batch, own)
            loss = functional.cross_entropy(logits.transpose(1, 2), batch, reduction="sum")
        total += torch.stack(torch.autograd.grad(loss, factors))
    return (total / tokens.numel()).cpu()


@contextmanager
def _factors(layers: tuple[nn.Linear, ...]) -> Iterator[list[Tensor]]:
    """While entered, each layer's rows are multiplied by a factor of 1 that can be differentiated, float64 [units]."""
    factors = [
        torch.ones(layer.out_features, dtype=torch.float64, device=layer.weight.device, requires_grad=True)
        for layer in layers
    ]
    hooks = [
        layer.register_forward_hook(lambda layer, _, output, factor=factor: _Scaled.apply(output, layer.bias, factor))
        for layer, factor in zip(layers, factors, strict=True)
    ]
    try:
        yield factors
    finally:
        for hook in hooks:
            hook.remove()


class _Scaled(torch.autograd.Function):
    """The identity on z = x W^T + b, seen as s x W^T + b at s = 1.

    z is what the GELU behind it keeps for its own derivative, so nothing more is held.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, bias: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(output, bias)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, Tensor]:
        output, bias = ctx.saved_tensors
        wide = torch.float64 if output.dtype == torch.float64 else torch.float32
        # one position's share in single precision, the sum over images in double
        by_image = ((output.to(wide) - bias.to(wide)) * slope.to(wide)).sum(1)
        return slope, None, by_image.double().sum(0)


def halves(ids: np.ndarray, labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """Split images in two, evenly in every class and as a whole to within one: bool [N], True for the first half.

    ids: int64 [N], different ones; labels: int64 [N]. The split depends on the seed and on which images there are, not
    on their order.

    Raises: UsageError for another number of labels.
    """
    ids, labels = np.asarray(ids), np.asarray(labels)
    if ids.shape != labels.shape or ids.ndim != 1:
        raise UsageError(f"expected a label for each of {ids.shape} ids, got {labels.shape}")
    drawn = np.argsort(ids)[np.random.default_rng(seed).permutation(len(ids))]
    # dealing on from class to class keeps the whole even too
    drawn = drawn[np.argsort(labels[drawn], kind="stable")]
    first = np.zeros(len(ids), dtype=bool)
    first[drawn[::2]] = True
    return first


def candidate_half(manifest: Manifest, scores: np.ndarray, seed: int = 0, per_class: int = TOP_PER_CLASS) -> np.ndarray:
    """Ids of the half of the extraction candidates to choose on, int64 [m]; the other half is for reporting.

    scores: candidate scores float [N] in manifest order, NaN for images that could not be read.

    Raises: UsageError where there is no candidate to choose on.
    """
    at = highest_per_class(manifest, scores, per_class)
    if not len(at):
        raise UsageError("expected extraction candidates in the run, got none: were all of its images damaged?")
    return manifest.ids[at][halves(manifest.ids[at], manifest.labels[at], seed)]


def select_by_attribution(stats: UnitStats, scores: Tensor, fraction: float, scope: str, seed: int) -> Selection:
    """The units of the highest attribution, float64 [layers, units]; seed: of the halves that it was found with.

    Raises: as ``select``.
    """
    return replace(select(stats, fraction, "scores", scope, scores=scores), by="attribution", seed=seed)
