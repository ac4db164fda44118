"""Training recipes of the tiny models: sizes of the stages, and the quantisation of each tokenizer during training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastmem.models.maskgit_vqgan import MaskGITVQGAN
from fastmem.models.vqvae import MultiScaleVQVAE

# weight of the loss that moves latents towards their codes; the loss that moves codes towards latents has the weight 1
COMMITMENT = 0.25


@dataclass(frozen=True)
class Quantised:
    """Latents after quantisation, and what the training of the codes needs.

    Attributes:
        latents: quantised latents, float32 [N,Z,G,G], with a straight-through gradient.
        loss: quantisation loss, a scalar.
        rows: vectors for which codes were looked up, float32 [n,Z].
        codes: the codes found for them, int64 [n].
    """

    latents: Tensor
    loss: Tensor
    rows: Tensor
    codes: Tensor


@dataclass(frozen=True)
class Stage:
    """The size of one training stage: number of steps, images in a batch, and peak learning rate."""

    steps: int
    batch: int
    rate: float


@dataclass(frozen=True)
class Recipe:
    """How one tiny model is trained.

    Attributes:
        quantise: quantises latents, given the model's tokenizer, of the class of its family, and the latents.
        tokenizer: size of the stage that trains the tokenizer.
        decoder: size of the stage that trains the tokenizer's decoder alone.
        generator: size of the stage that trains the generator.
        edges: whether the tokenizer's loss also compares edges in its first stage; the decoder's stage always does.
    """

    quantise: Callable[[Any, Tensor], Quantised]
    tokenizer: Stage
    decoder: Stage
    generator: Stage
    edges: bool


def quantise_once(network: MaskGITVQGAN, z: Tensor) -> Quantised:
    """Quantise latents ``z``, float32 [N,Z,G,G], with one code for each position."""
    codes = network.quantize(z).flatten()
    looked_up = network.quantize.embedding(codes).view(z.shape[0], *z.shape[2:], -1).permute(0, 3, 1, 2)
    loss = functional.mse_loss(looked_up, z.detach()) + COMMITMENT * functional.mse_loss(z, looked_up.detach())
    return Quantised(z + (looked_up - z).detach(), loss, z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]), codes)


def quantise_by_scales(network: MultiScaleVQVAE, z: Tensor) -> Quantised:
    """Quantise latents ``z``, float32 [N,Z,G,G], with the residual codes of several scales.

    The loss is the mean over the scales of the error that remains after each scale.
    """
    quantize, scales = network.quantize, len(network.config.patch_nums)
    goal, total = z.detach(), torch.zeros_like(z)
    loss, rows, codes = torch.zeros((), device=z.device), [], []
    with torch.no_grad():
        tokens = quantize.split(quantize(goal))
    for scale, own in enumerate(tokens):
        rows.append(quantize.pool(goal - total.detach(), scale).flatten(0, 1))
        codes.append(own.flatten())
        total = total + quantize.spread(own, scale)
        loss = loss + functional.mse_loss(total, goal) + COMMITMENT * functional.mse_loss(z, total.detach())
    return Quantised(z + (total - z).detach(), loss / scales, torch.cat(rows), torch.cat(codes))


RECIPES = {
    "rar-tiny": Recipe(
        quantise_once,
        tokenizer=Stage(3500, 16, 6e-4),
        decoder=Stage(2500, 16, 6e-4),
        generator=Stage(1100, 64, 1e-3),
        edges=False,
    ),
    "var-tiny": Recipe(
        quantise_by_scales,
        tokenizer=Stage(8000, 64, 6e-4),
        decoder=Stage(5000, 64, 6e-4),
        generator=Stage(1500, 64, 1e-3),
        edges=True,
    ),
}
