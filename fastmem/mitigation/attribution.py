"""Attribution: how much weakening a unit raises the loss of memorised images more than the loss of unseen images.

    score(u) = -d/ds_u [loss(memorised) - loss(held-out)] at s = 1

The factor s_u multiplies row u of an fc1 weight matrix. The loss is the mean cross entropy of the true tokens of the
centre views under their own labels, teacher-forced. Its derivative by s_u is computed from fc1's output z = x W^T + b
as the sum over positions of (z - b) dL/dz, so that no gradient of a weight matrix needs memory.

The activations of ``batch_size`` images are in memory at once.
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
from fastmem.models.finite import Witness
from fastmem.models.model import Model
from fastmem.ranking.selection import Selection, select
from fastmem.stats import UnitStats
from fastmem.tokens.cache import TokenCache
from fastmem.tokens.true_images import read_true_images, spread

# images of one backward pass by default
BATCH_IMAGES = 8
# held-out images used at most by default
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
    """Return the attribution score of every unit, float64 [layers, units], in nats per token.

    A score is positive where weakening the unit raises the loss of memorised images more than that of held-out images.

    Args:
        model: the unedited model.
        source: the training images.
        ids: ids of the memorised training images, int64 [m].
        heldout: images that the model was not trained on.
        heldout_ids: ids of the held-out images that may be used, int64 [k]; None for all.
        heldout_images: greatest number of held-out images to use, chosen evenly over the classes.
        batch_size: number of images in one backward pass; memory grows with it.
        cache: where tokens are looked up; None for no cache.
        workers: number of processes that decode images; None chooses by cores and number of images.

    Raises: UsageError where an id is not in its source, there are no ids, or a number is below 1; InputFileError where
    no image of a set can be read.
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
    """Return tokens and labels of the images at some manifest positions."""
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
    """Return the attribution score of every unit, float64 [layers, units], from images that are tokenized already.

    Args:
        model: the model, edited or not.
        tokens: true tokens of the memorised images, int64 [N,T].
        labels: classes of the memorised images, int64 [N].
        heldout_tokens: true tokens of the held-out images, int64 [M,T].
        heldout_labels: classes of the held-out images, int64 [M].
        batch_size: number of images in one backward pass; memory grows with it.

    Raises: UsageError where there are no images, ``batch_size`` is below 1, or tokens or labels have another shape or
    are out of range.
    """
    memorised = loss_slopes(model, tokens, labels, batch_size)
    return loss_slopes(model, heldout_tokens, heldout_labels, batch_size) - memorised


@torch.inference_mode(False)
@torch.enable_grad()
def loss_slopes(model: Model, tokens: Tensor, labels: Tensor, batch_size: int = BATCH_IMAGES) -> Tensor:
    """Return the derivative of the mean loss by a factor on each unit's weights, float64 [layers, units], at factor 1.

    The loss is in nats per token.

    Args:
        model: the model, edited or not.
        tokens: true tokens of the images, int64 [N,T].
        labels: classes of the images, int64 [N].
        batch_size: number of images in one backward pass; memory grows with it.

    Raises: UsageError where there are no images, ``batch_size`` is below 1, or tokens or labels have another shape or
    are out of range; FastmemError where the slopes are not finite, as ``Model.check`` says.
    """
    if not len(tokens) or batch_size < 1:
        raise UsageError(
            f"expected images, in batches of at least 1, got {len(tokens)} in batches of {batch_size}: give more"
        )
    # generated tokens are inference tensors, which a backward pass cannot save, so they are copied
    tokens, labels = model.check_inputs(tokens.clone(), labels.clone())
    total = torch.zeros(model.num_layers, model.num_units, dtype=torch.float64, device=model.device)
    for batch, own in zip(tokens.split(batch_size), labels.split(batch_size), strict=True):
        with _factors(model.fc1_layers) as factors:
            logits = model.forward_logits(batch, own)
            loss = functional.cross_entropy(logits.transpose(1, 2), batch, reduction="sum")
        total += torch.stack(torch.autograd.grad(loss, factors))
    model.check("slopes of the loss", Witness().see(total), tokens, labels)
    return (total / tokens.numel()).cpu()


@contextmanager
def _factors(layers: tuple[nn.Linear, ...]) -> Iterator[list[Tensor]]:
    """Inside this context, multiply each layer's rows by factors of 1, float64 [units], that have a gradient."""
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
    """The function s x W^T + b at s = 1, which returns its input z = x W^T + b, with the derivative by s."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, bias: Tensor, factor: Tensor) -> Tensor:
        # the GELU after fc1 saves the same tensor for its own derivative, so this takes no more memory
        ctx.save_for_backward(output, bias)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, Tensor]:
        output, bias = ctx.saved_tensors
        wide = torch.float64 if output.dtype == torch.float64 else torch.float32
        # float32 is enough within an image, but the sum over many images needs float64
        by_image = ((output.to(wide) - bias.to(wide)) * slope.to(wide)).sum(1)
        return slope, None, by_image.double().sum(0)


def halves(ids: np.ndarray, labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """Split images at random into two halves and return which are in the first half, bool [N].

    The halves are equal to within one image, in every class and as a whole. The split depends on the ids, int64 [N] and
    all different, on the labels, int64 [N], and on the seed, but not on the order of the images.

    Raises: UsageError where there is not one label for each id.
    """
    ids, labels = np.asarray(ids), np.asarray(labels)
    if ids.shape != labels.shape or ids.ndim != 1:
        raise UsageError(f"expected a label for each of {ids.shape} ids, got {labels.shape}")
    drawn = np.argsort(ids)[np.random.default_rng(seed).permutation(len(ids))]
    # images alternate between the halves from class to class, so that the whole halves also differ by at most one
    drawn = drawn[np.argsort(labels[drawn], kind="stable")]
    first = np.zeros(len(ids), dtype=bool)
    first[drawn[::2]] = True
    return first


def candidate_half(manifest: Manifest, scores: np.ndarray, seed: int = 0, per_class: int = TOP_PER_CLASS) -> np.ndarray:
    """Return the ids, int64 [m], of the half of the extraction candidates that units may be chosen on.

    Results should be reported on the other half.

    Args:
        manifest: the order of the training images.
        scores: candidate scores of the training images, float [N] in manifest order; NaN for unreadable images.
        seed: seed of the random split into halves.
        per_class: number of candidates of every class.

    Raises: UsageError where there are no candidates.
    """
    at = highest_per_class(manifest, scores, per_class)
    if not len(at):
        raise UsageError("expected extraction candidates in the run, got none: were all of its images damaged?")
    ids = manifest.ids[at]
    half: np.ndarray = ids[halves(ids, manifest.labels[at], seed)]
    return half


def select_by_attribution(stats: UnitStats, scores: Tensor, fraction: float, scope: str, seed: int) -> Selection:
    """Return the units of highest attribution score.

    Args:
        stats: statistics of the training images.
        scores: attribution scores, float64 [layers, units].
        fraction: share of all units to select, in (0,1].
        scope: "global", or "per-layer" for equally many units in every layer.
        seed: seed of the split into halves that the scores were computed with; it is only recorded.

    Raises: UsageError where ``fraction`` is out of range, ``scope`` is unknown, or the scores have another shape or are
    not finite.
    """
    return replace(select(stats, fraction, "scores", scope, scores=scores), by="attribution", seed=seed)
