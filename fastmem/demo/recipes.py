"""How each tiny model is trained: sizes of the stages, and what training a family's tokenizer takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmem.models.maskgit_vqgan import MaskGITVQGAN
from fastmem.models.vqvae import MultiScaleVQVAE

# weight of the loss that pulls latents to their codes, beside that which pulls codes to their latents
COMMITMENT = 0.25


@dataclass(frozen=True)
class Quantised:
    """Latents after quantisation, and what their training needs.

    latents: float32 [N,Z,G,G], with the straight-through gradient; loss: VQ loss; rows: float32 [n,Z], what codes were
    looked up for; codes: int64 [n].
    """

    latents: Tensor
    loss: Tensor
    rows: Tensor
    codes: Tensor


@dataclass(frozen=True)
class Stage:
    """Optimisation steps, pictures of each, and the peak learning rate."""

    steps: int
    batch: int
    rate: float


@dataclass(frozen=True)
class Recipe:
    """One tiny model: its stages, how its tokenizer quantises, and whether edges count from the first stage on."""

    quantise: Callable[[nn.Module, Tensor], Quantised]
    tokenizer: Stage
    decoder: Stage
    generator: Stage
    edges: bool


def quantise_once(network: MaskGITVQGAN, z: Tensor) -> Quantised:
    """One code for each latent of [N,Z,G,G]."""
    codes = network.quantize(z).flatten()
    looked_up = network.quantize.embedding(codes).view(z.shape[0], *z.shape[2:], -1).permute(0, 3, 1, 2)
    loss = functional.mse_loss(looked_up, z.detach()) + COMMITMENT * functional.mse_loss(z, looked_up.detach())
    return Quantised(z + (looked_up - z).detach(), loss, z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]), codes)


def quantise_by_scales(network: MultiScaleVQVAE, z: Tensor) -> Quantised:
    """Residual codes of every scale for latents [N,Z,G,G]; the loss is the mean over what each scale leaves over."""
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
